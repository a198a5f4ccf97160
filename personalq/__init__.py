"""PersonalQ: find the personalised checkpoint a person means, and serve it compressed and still personal.

import personalq
repository = personalq.open()
decision = personalq.ask(repository, "my chocolate brown dog on the beach")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cards.card import Card as Card
    from .checkin import Decision as Decision
    from .checkin import ask as ask
    from .repository import Repository as Repository

__all__ = ["Card", "Decision", "PersonalQError", "Repository", "ask", "open"]
_HOME = {
    "Card": ".cards.card",
    "Decision": ".checkin",
    "Repository": ".repository",
    "ask": ".checkin",
    "PersonalQError": ".errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import personalq`` itself loads nothing."""
    if name == "open":
        return importlib.import_module(".repository", __name__).Repository.open
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
