"""Check-in: which checkpoint a request means, whether to ask, and the prompt to draw with.

decision = ask(Repository.open(), "my chocolate brown dog on the beach")
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..repository import Repository
from .decision import Candidate, Decision
from .dialogue import Checkin, write_index
from .encoder.minilm import shared_encoder
from .ranking.judge import Judge, judge_at

__all__ = ["Asker", "Candidate", "Checkin", "Decision", "IndexReport", "Judge", "ask", "index", "judge_at"]


@dataclass(frozen=True)
class IndexReport:
    """What ``index`` did."""

    cards: int
    seconds: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.__dict__.copy()


_OPEN: dict[str, tuple[str, Checkin]] = {}


def ask(repository: Repository, request: str, answers: Sequence[str] = (), *, judge: Judge | None = None) -> Decision:
    """Decide what a request means. The repository's Check-in stays in memory until its cards change.

    ``judge`` (see ``judge_at``) lets a language model score the shortlist; without it nothing leaves this machine.
    """
    digest = repository.digest()
    kept = _OPEN.get(str(repository.root))
    if kept is None or kept[0] != digest:
        kept = _OPEN[str(repository.root)] = (digest, Checkin(repository))
    return kept[1].ask(request, answers, judge=judge)


@dataclass(frozen=True)
class Asker:
    """``ask`` for one repository, with or without a model that judges."""

    repository: Repository
    judge: Judge | None = None

    @classmethod
    def at(cls, repository: Repository, llm: str | None, llm_model: str) -> Asker:
        """Return the asker for ``--llm URL --llm-model NAME``; the key is $OPENAI_API_KEY. Raises CheckinError."""
        key = os.environ.get("OPENAI_API_KEY", "")
        return cls(repository, judge_at(llm, llm_model, key=key) if llm else None)

    def __call__(self, request: str, answers: Sequence[str] = ()) -> Decision:
        """Decide what a request means."""
        return ask(self.repository, request, answers, judge=self.judge)


def index(repository: Repository) -> IndexReport:
    """Build the index and publish it; cards that did not change keep their vectors. Raises RepositoryError."""
    started = time.perf_counter()
    folder = repository.root / "index"
    n_cards = write_index(repository, shared_encoder(), folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return IndexReport(n_cards, round(time.perf_counter() - started, 3), size)
