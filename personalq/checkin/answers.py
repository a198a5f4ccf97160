"""Fold an answer into the posterior. An answer picks an option, says neither, or describes what was meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ..cards.card import Card
from .language.request_terms import Matrix
from .language.words import fold, words
from .ranking.features import NAMES, Evidence

_NONE = re.compile(
    r"^\W*(?:no|none|neither|nope|nothing|none of (?:them|these|those)|not (?:any|one) of (?:them|these))\W*$",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"^\W*(?:the\s+|option\s+|number\s+|no\.?\s*|#)*(?P<word>first|second|third|fourth|last|1st|2nd|3rd|4th|[1-4]|one|two|three|four)"
    r"(?:\s+(?:one|option))?\W*$",
    re.IGNORECASE,
)  # fmt: skip
_PLACES = {
    "first": 0, "1st": 0, "1": 0, "one": 0, "second": 1, "2nd": 1, "2": 1, "two": 1,
    "third": 2, "3rd": 2, "3": 2, "three": 2, "fourth": 3, "4th": 3, "4": 3, "four": 3, "last": -1,
}  # fmt: skip
_NUMBERED = re.compile(r"\b(version|number|no\.?|part|volume|model)\s+one\b", re.IGNORECASE)
# How much each feature of the answer moves the log-odds; hand-set, checked on the dev answers by bench.ask. An answer
# only describes: what reads like scenery in it ("the one on a lawn") counts as much as the rest.
_WEIGHTS = {
    "head_any": 3.0, "attribute_any": 3.0, "scene_any": 3.0, "name_cover": 2.0, "source": 4.0,
    "dense": 6.0, "family": 4.0, "kind": 3.0, "colour_clash": -2.0,
}  # fmt: skip
_TRIGGER = 6.0


def with_digits(answer: str) -> str:
    """Write 'version one' as 'version 1': elsewhere 'one' only stands for a thing."""
    return _NUMBERED.sub(r"\1 1", answer)


def says_none(answer: str) -> bool:
    """Tell whether an answer refuses every option."""
    return _NONE.match(answer) is not None


def chosen_option(answer: str, options: Sequence[str], n_options: int) -> int | None:
    """Return the place of the option an answer names by its order or its text, or None."""
    if match := _ORDER.match(answer):
        place = _PLACES[match["word"].lower()]
        return place % n_options if n_options and place < n_options else None
    said = fold(answer).strip(" .!")
    exact = [i for i, option in enumerate(options) if said in (fold(option), fold(option.split(":")[0]))]
    return exact[0] if len(exact) == 1 else None


def named_card(answer: str, cards: Sequence[Card]) -> int | None:
    """Return the place of the only card whose id or whole name is the answer, or None."""
    said = words(answer)
    hits = [i for i, card in enumerate(cards) if answer.strip() == card.id or (said and said == words(card.name))]
    return hits[0] if len(hits) == 1 else None


def answer_scores(evidence: Evidence, n_cards: int) -> Matrix:
    """Return what an answer adds to the log-odds of every card (n_cards,); cards that it does not shortlist get the minimum."""
    score = sum(weight * evidence.features[:, NAMES.index(name)] for name, weight in _WEIGHTS.items())
    score = np.asarray(score + _TRIGGER * evidence.trigger, np.float32)
    total = np.full(n_cards, score.min(initial=0.0), np.float32)
    total[evidence.places] = score
    return total
