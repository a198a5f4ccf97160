"""Run bundles without torch: engines, sampling, the image pipeline, look-up, and the checks of an export.

Importing this package imports nothing else; each name below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drawing.attaching import Chosen, open_adapter
    from .drawing.image import side_by_side, write_png
    from .drawing.pipeline import Picture, Pipeline, Settings, Step, start_noise
    from .engines.engine import Engine, open_engine
    from .engines.ort import OrtEngine
    from .gate import Check, Report, verify_bundle
    from .store import Found, Store, find

_HOME = {
    "Chosen": "drawing.attaching",
    "open_adapter": "drawing.attaching",
    "Engine": "engines.engine",
    "OrtEngine": "engines.ort",
    "open_engine": "engines.engine",
    "side_by_side": "drawing.image",
    "write_png": "drawing.image",
    "Picture": "drawing.pipeline",
    "Pipeline": "drawing.pipeline",
    "Settings": "drawing.pipeline",
    "Step": "drawing.pipeline",
    "start_noise": "drawing.pipeline",
    "Found": "store",
    "Store": "store",
    "find": "store",
    "Check": "gate",
    "Report": "gate",
    "verify_bundle": "gate",
}

__all__ = [
    "Check",
    "Chosen",
    "Engine",
    "Found",
    "OrtEngine",
    "Picture",
    "Pipeline",
    "Report",
    "Settings",
    "Step",
    "Store",
    "find",
    "open_adapter",
    "open_engine",
    "side_by_side",
    "start_noise",
    "verify_bundle",
    "write_png",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
