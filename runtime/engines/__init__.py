"""Engines: the protocol, one module per target, and what makes them open fast and stay small."""
