"""The gate: does a bundle still compute what its checkpoint computes? Levels of checks, baselines and reports.

It judges a bundle by its files and goldens with numpy and an engine; no torch, no onnx. Names are loaded when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import Check, Report
    from .gate import Options, run_gate, verify_bundle
    from .subject import Sources

LEVELS = ("integrity", "obedience", "numerics", "images")  # fast ones first

_HOME = {
    "Check": "check",
    "Report": "check",
    "Options": "gate",
    "run_gate": "gate",
    "verify_bundle": "gate",
    "Sources": "subject",
}
__all__ = ["LEVELS", "Check", "Options", "Report", "Sources", "run_gate", "verify_bundle"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime.gate' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
