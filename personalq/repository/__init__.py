"""The repository folder on disk: taken in whole or not at all, listed, audited, hashed, shared, published at a URL.

Importing this package imports nothing else; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import SHIPPED as SHIPPED
    from .folder import Repository as Repository
    from .results import AddResult as AddResult

__all__ = ["SHIPPED", "AddResult", "Repository"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".folder", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
