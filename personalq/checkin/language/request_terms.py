"""The terms of a request: each has a zone (head, attribute, scene), a weight (rarity in the catalogue, 0..1) and
expansions into the cards' vocabulary: itself, and words of near meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..indexing.index import Index
from .intent import Intent
from .words import STOP, fold, split_term, stem, words

ZONES = ("head", "attribute", "scene")
FILLER = frozenset(
    stem(w) for w in ("photo", "picture", "image", "style", "look", "art", "version", "model", "lora", "page")
)
_OWNED = re.compile(r"(?P<owner>[^\W_]+)['\u2019]s\s+(?P<thing>.+)")
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Terms:
    """The request's terms: text, zone 0..2, weight 0..1, and expansions {vocabulary id: match 0..1}."""

    texts: list[str]
    zones: NDArray[np.int64]
    weights: Matrix
    expansions: list[dict[int, float]]


def request_terms(intent: Intent, index: Index) -> list[tuple[str, int]]:
    """Return (word, zone) in order, without stop words and repeats; a word keeps its first, strongest zone.

    In 'my dog's bowl' the bowl is scenery if there are cards of dogs and none of bowls.
    """
    owned = _OWNED.search(intent.head)
    belongings = set(words(owned["thing"])) if owned and _is_about_owner(owned, index) else set()
    found: dict[str, int] = {}
    for zone, text in enumerate((intent.head, intent.attribute, intent.scene)):
        for word in words(text):
            if word not in STOP and len(found) < 40:
                found.setdefault(word, 2 if word in belongings else zone)
    return list(found.items())


def _is_about_owner(owned: re.Match[str], index: Index) -> bool:
    return fold(owned["owner"]) in index.phrases and not any(w in index.phrases for w in words(owned["thing"]))


def expand(words_: list[tuple[str, int]], index: Index) -> Terms:
    """Map request words to vocabulary terms, weighed by rarity."""
    expansions: list[dict[int, float]] = []
    weights: list[float] = []
    scale = np.log(index.n_cards + 1.0) + 1e-6
    for word, _ in words_:
        parts = split_term(word)
        numbers = ((index.vocabulary.get(part), 1.0 if part == parts[0] else 0.7) for part in parts)
        found = {number: value for number, value in numbers if number is not None}
        df = max((int(index.df[i]) for i in found), default=0)
        expansions.append(found)
        is_filler = stem(word) in FILLER
        weights.append((0.15 if is_filler else 1.0) * float(np.log((index.n_cards + 1) / (df + 0.5)) / scale))
    _join_neighbours([w for w, _ in words_], expansions, index)
    zones = np.array([zone for _, zone in words_], np.int64)
    return Terms([w for w, _ in words_], zones, np.clip(np.array(weights, np.float32), 0.02, 1.0), expansions)


def unknown_phrases(words_: list[tuple[str, int]], found: Terms) -> list[str]:
    """Return the words and word pairs whose meaning must be looked up: those that no card uses."""
    head = [(word, bool(has)) for (word, zone), has in zip(words_, found.expansions, strict=True) if zone < 2]
    unknown = [word for word, is_known in head if not is_known and len(word) > 2]
    pairs = [f"{a} {b}" for (a, x), (b, y) in pairwise(head) if not (x and y)]
    return [*unknown[:4], *pairs[:2]]


def add_meanings(found: Terms, index: Index, meaning: dict[str, Matrix]) -> None:
    """Let unknown words and pairs explain themselves by class nouns and tags of near meaning."""
    for phrase, vector in meaning.items():
        near = _near_phrases(phrase, vector, index)
        for place in (p for p, word in enumerate(found.texts) if word in phrase.split()):
            expansion = found.expansions[place]
            for term, value in near.items():
                expansion[term] = max(expansion.get(term, 0.0), value)


def _join_neighbours(words_: list[str], expansions: list[dict[int, float]], index: Index) -> None:
    """Let two neighbours be one word of the cards, or a long beginning of it: 'paper cutout' is also 'papercut'."""
    for place, (a, b) in enumerate(pairwise(words_)):
        joined = stem(a + b)
        for size in range(max(len(a) + 3, 6), len(joined) + 1):
            if (term := index.vocabulary.get(joined[:size])) is not None:
                expansions[place][term] = expansions[place + 1][term] = 1.0


def _near_phrases(phrase: str, vector: Matrix, index: Index) -> dict[int, float]:
    """Return terms of class nouns and tags that mean nearly the same: cosine 0.55 counts 0.3, 0.85 counts 0.9.

    What shares a word with the phrase is near for that word's sake: a 'cuckoo clock' is not an 'alarm clock'.
    """
    if not len(index.phrases):
        return {}
    cosine = index.phrase_vectors32 @ vector
    said = {stem(word) for word in phrase.split()}
    found: dict[int, float] = {}
    for place in np.argsort(-cosine, kind="stable")[:6]:
        parts = words(index.phrases.text(int(place)))
        if cosine[place] >= 0.55 and not said & {stem(part) for part in parts}:
            value = float(min(0.9, 0.3 + 2.0 * (cosine[place] - 0.55)))
            for part in parts:
                for term in split_term(part)[:1]:
                    if (number := index.vocabulary.get(term)) is not None:
                        found.setdefault(number, value)
    return found
