"""Find what a builder would refuse, or silently run in float, before anything is built: `personalq export ID --lint trt`."""

from .rules import Finding, lint_trt

__all__ = ["Finding", "lint_trt"]
