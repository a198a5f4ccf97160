"""What Check-in answers with: plain values that print as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["select", "clarify", "abstain"]


@dataclass(frozen=True)
class Candidate:
    """One checkpoint that was considered, how probable it is, and which facets matched or are missing."""

    id: str
    probability: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """``checkpoint`` and ``prompt`` are set on select, ``question`` and ``options`` on clarify; else None and empty.

    ``judged_by`` is "local", or "llm" when a language model's judgement entered the posterior.
    """

    decision: Outcome
    checkpoint: str | None
    prompt: str | None
    question: str | None
    options: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    milliseconds: float
    judged_by: str = "local"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values with the keys of the command line."""
        data = asdict(self)
        data["options"] = list(self.options)
        data["candidates"] = [{**asdict(c), "reasons": list(c.reasons)} for c in self.candidates]
        return data
