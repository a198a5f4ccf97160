"""Check-in itself: a request and its answers go in, a Decision comes out. The same input gives the same output."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..cards.card import Card
from ..errors import CheckinError, RepositoryError
from ..prompts import is_marked
from ..repository import Repository
from ..repository.atomic import atomic_directory
from .answers import answer_scores, chosen_option, named_card, says_none, with_digits
from .decision import Candidate, Decision
from .encoder.minilm import Encoder, shared_encoder
from .explain import MAX_OPTIONS, explained_words, option_order, option_texts, question, reasons
from .indexing.build import build_index, plain
from .indexing.index import Index, load_index, save_index
from .indexing.stored import StoredCards, store_cards
from .ranking.features import Evidence, gather
from .ranking.judge import MAX_CANDIDATES, Judge, Judgement
from .ranking.posterior import Model, fits_nothing, posterior, rivals, scores, shipped_model, with_judgement
from .rewrite import plain_request, rewrite, with_trigger

MAX_QUESTIONS = 2
MAX_ANSWERS = 8
_SHOWN = 10
_STILL_OPEN = 0.75  # share of the leader's probability that keeps a candidate open after an answer
_PRIOR = 0.75  # weight of the log-odds before the answer against what the answer says
_REACH = 6.0  # log-odds behind the leader beyond which a candidate is no farther from what an answer can bring back


@dataclass(frozen=True)
class _Belief:
    """What a request is thought to mean: p (C,) over the evidence's candidates, and p of none of them."""

    evidence: Evidence
    p: NDArray[np.float32]
    none: float
    judgement: Judgement | None


class Checkin:
    """Check-in over one repository, with its index open. Expensive to create, cheap to ask."""

    def __init__(self, repository: Repository, *, encoder: Encoder | None = None, model: Model | None = None) -> None:
        self._encoder = encoder or shared_encoder()
        self._model = model or shipped_model()
        self.index, self.cards = open_index(repository, self._encoder)
        self._honest = _Honest(self.cards, self.index)

    def ask(self, request: str, answers: Sequence[str] = (), *, judge: Judge | None = None) -> Decision:
        """Decide what ``request`` means, given the answers to the questions asked so far, in order.

        ``judge`` scores the most probable candidates, and its judgement enters the posterior.

        Raises CheckinError for an empty request or too many answers.
        """
        started = time.perf_counter()
        plain = plain_request(request)
        _refuse_unusable(plain, answers)
        belief = self._believe(plain, judge)
        decided = self._decide(request, answers, belief, started)
        return decided if belief.judgement is None else replace(decided, judged_by="llm")

    def _believe(self, request: str, judge: Judge | None) -> _Belief:
        evidence = gather(request, self._honest, self.index, self._encoder)
        p, none = posterior(scores(self._model, evidence))
        if judge is None or not len(p):
            return _Belief(evidence, p, none, None)
        columns = np.argsort(-p, kind="stable")[:MAX_CANDIDATES]
        said = judge(request, [self._card(evidence, int(c)) for c in columns])
        if said is None:
            return _Belief(evidence, p, none, None)
        judgement = Judgement({int(columns[place]): score for place, score in said.scores.items()}, said.verdict)
        return _Belief(evidence, *with_judgement(p, none, judgement), judgement)

    def _decide(self, request: str, answers: Sequence[str], belief: _Belief, started: float) -> Decision:
        evidence, p = belief.evidence, belief.p
        if fits_nothing(self._model, evidence, p, belief.none):
            if answers and len(p) and not says_none(answers[0]):  # the answer may name what the request did not
                return self.ask(f"{answers[0]}, {request}", answers[1:])
            return _abstain(self._candidates(evidence, p), started)
        open_ = self._open(belief)
        for turn, answer in enumerate(answers[:MAX_QUESTIONS]):
            p_or_none = self._fold(evidence, p, open_, answer)
            if p_or_none is None:
                return _abstain(self._candidates(evidence, p), started)
            p = p_or_none
            open_ = np.flatnonzero(p >= _STILL_OPEN * p.max()) if turn + 1 < MAX_QUESTIONS else open_[:1]
        if len(open_) > 1:
            return self._clarify(evidence, open_, self._candidates(evidence, p), started)
        column = int(p.argmax()) if answers else int(open_[0])
        return self._select(request, evidence, column, self._candidates(evidence, p), started)

    def _open(self, belief: _Belief) -> NDArray[np.int64]:
        """Return the columns that the request leaves open, most probable first; a model that is sure decides."""
        evidence, p, judgement = belief.evidence, belief.p, belief.judgement
        if judgement is not None and judgement.verdict != "none":
            best = max(judgement.scores.values())
            top = sorted((c for c, score in judgement.scores.items() if score == best), key=lambda c: -p[c])
            if judgement.verdict == "several" or len(top) == 1:
                return np.array(top, np.int64)
        likely = rivals(self._model.ask, evidence, p)
        order = np.argsort(-likely - 1e-3 * p, kind="stable")
        return np.asarray(order[likely[order] >= self._model.ask.limit], np.int64)

    def _shown(self, evidence: Evidence, open_: NDArray[np.int64]) -> list[int]:
        columns = [int(c) for c in open_[:MAX_OPTIONS]]
        return sorted(columns, key=lambda c: option_order(self._card(evidence, c)))

    def _fold(
        self, evidence: Evidence, p: NDArray[np.float32], open_: NDArray[np.int64], answer: str
    ) -> NDArray[np.float32] | None:
        """Return the posterior after an answer, or None when it refuses everything."""
        if says_none(answer):
            return None
        shown = self._shown(evidence, open_)
        options = option_texts([self._card(evidence, c) for c in shown])
        place = chosen_option(answer, options, len(shown))
        column = (
            shown[place] if place is not None else named_card(answer, [self._card(evidence, c) for c in range(len(p))])
        )
        if column is not None:
            picked = np.full(len(p), 1e-6, np.float32)
            picked[column] = 1.0
            return np.asarray(picked / picked.sum(), np.float32)
        said = gather(with_digits(answer), self._honest, self.index, self._encoder)
        added = answer_scores(said, self.index.n_cards)[evidence.places]
        behind = np.minimum(np.log(p.max() / np.maximum(p, 1e-9)), _REACH)
        behind[open_] = 0.0  # what was asked about is as likely as the leader
        score = added - _PRIOR * behind
        weights = np.exp(score - score.max())
        return np.asarray(weights / weights.sum(), np.float32)

    def _card(self, evidence: Evidence, column: int) -> Card:
        return self.cards[int(evidence.places[column])]

    def _candidates(self, evidence: Evidence, p: NDArray[np.float32]) -> tuple[Candidate, ...]:
        best = np.argsort(-p, kind="stable")[:_SHOWN]
        return tuple(
            Candidate(self._card(evidence, int(c)).id, round(float(p[c]), 4), reasons(evidence, int(c))) for c in best
        )

    def _select(
        self, request: str, evidence: Evidence, column: int, candidates: tuple[Candidate, ...], started: float
    ) -> Decision:
        card = self._card(evidence, column)
        if is_marked(request):
            prompt = with_trigger(request, card)
        else:
            prompt = rewrite(evidence.intent, card, explained_words(evidence, column))
        return Decision("select", card.id, prompt, None, (), candidates, _since(started))

    def _clarify(
        self, evidence: Evidence, open_: NDArray[np.int64], candidates: tuple[Candidate, ...], started: float
    ) -> Decision:
        shown = [self._card(evidence, c) for c in self._shown(evidence, open_)]
        text = question(shown, len(open_))
        return Decision("clarify", None, None, text, option_texts(shown), candidates, _since(started))


class _Honest(Sequence[Card]):
    """The cards as they are scored: without text that is stuffed with keywords."""

    def __init__(self, cards: Sequence[Card], index: Index) -> None:
        self._cards, self._stuffed = cards, index.stuffed

    @overload
    def __getitem__(self, place: int) -> Card: ...
    @overload
    def __getitem__(self, place: slice) -> list[Card]: ...
    def __getitem__(self, place: int | slice) -> Card | list[Card]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        card = self._cards[place]
        return plain(card) if self._stuffed[place] else card

    def __len__(self) -> int:
        return len(self._cards)


def open_index(repository: Repository, encoder: Encoder) -> tuple[Index, Sequence[Card]]:
    """Return the repository's index and its cards: from disk when they are up to date, else built.

    A new index is saved if the folder is writable; otherwise it is used from memory.
    """
    folder, digest = repository.root / "index", repository.digest()
    for _ in range(2):
        with contextlib.suppress(OSError, ValueError):
            index, cards = load_index(folder, digest=digest), StoredCards(folder)
            if index is not None and index.n_cards == len(cards):
                return index, cards
        with contextlib.suppress(RepositoryError, OSError):
            write_index(repository, encoder, folder)
    kept = repository.cards()
    return build_index(kept, encoder, digest=digest, old=load_index(folder, digest=None)), kept


def write_index(repository: Repository, encoder: Encoder, folder: Path) -> int:
    """Build the index and publish its folder whole, in place of an older one; return how many cards it is of.

    Cards that did not change keep their vectors. Raises RepositoryError.
    """
    digest, old = repository.digest(), load_index(folder, digest=None)
    with atomic_directory(folder, replace=True) as place:
        cards = store_cards(repository.each_card(), place)
        save_index(build_index(cards, encoder, digest=digest, old=old), place)
        return len(cards)


def _abstain(candidates: tuple[Candidate, ...], started: float) -> Decision:
    return Decision("abstain", None, None, None, (), candidates, _since(started))


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)


def _refuse_unusable(request: str, answers: Sequence[str]) -> None:
    if not request.strip():
        raise CheckinError("request: must say what to draw, got nothing; try 'my dog on the beach'")
    if len(answers) > MAX_ANSWERS:
        raise CheckinError(
            f"answers: must be at most {MAX_ANSWERS}, got {len(answers)}; ask again with a fuller request"
        )
