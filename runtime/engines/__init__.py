"""Engines: the protocol, one file per target, and what keeps them quick to open and small."""
