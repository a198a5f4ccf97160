"""Whole models in one file, in the original layout: where each parameter lies, and what the file does not hold."""
