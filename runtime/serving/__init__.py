"""Serve a repository over HTTP: an OpenAI-compatible interface, Check-in, metrics, and a page to use it from.

Two processes: the one that answers HTTP and asks Check-in, and the one that holds the engines and draws (worker). When
the second dies, the first starts it anew; only what was being drawn is lost.
"""
