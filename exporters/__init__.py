"""Checkpoint + spec -> bundle, bundle -> engine for a target. Importing it imports nothing heavy."""
