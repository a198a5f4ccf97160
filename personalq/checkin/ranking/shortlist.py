"""Which cards are worth a closer look: BM25, dense vectors and triggers, fused by reciprocal rank."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..indexing.index import Index
from ..language.intent import Intent
from ..language.request_terms import Matrix, Terms
from ..language.words import fold
from .best import greatest

SHORTLIST = 60


def bm25_scores(terms_: Terms, index: Index) -> NDArray[np.float64]:
    total = np.zeros(index.n_cards)
    for zone, found in zip(terms_.zones, terms_.expansions, strict=True):
        for term, value in found.items():
            index.bm25.add_scores(total, term, (1.0 if zone < 2 else 0.5) * value)
    return total


def trigger_hits(intent: Intent, index: Index) -> tuple[Matrix, Matrix]:
    """Return two (N,) arrays: 1 where a made-up trigger stands in the request, 1 where an ordinary phrase does."""
    text = " ".join(fold(intent.text).split())
    rare, common = np.zeros(index.n_cards, np.float32), np.zeros(index.n_cards, np.float32)
    for phrase in _whole_phrases(text):
        if (number := index.triggers.get(phrase)) is None:
            continue
        places = index.trigger_cards[index.trigger_start[number] : index.trigger_start[number + 1]]
        (rare if index.trigger_rare[number] else common)[places] = 1.0
    return rare, common


def _whole_phrases(text: str) -> set[str]:
    """Return every stretch of ``text`` that neither begins nor ends inside a word, of at most 80 characters."""
    inside = [a.isalnum() and b.isalnum() for a, b in pairwise(text)]
    edges = [0, *(i + 1 for i, is_inside in enumerate(inside[:400]) if not is_inside), min(len(text), 401)]
    return {text[a:b] for i, a in enumerate(edges) for b in edges[i + 1 : i + 40] if b - a <= 80}


def shortlist(
    terms_: Terms, index: Index, bm25: NDArray[np.float64], dense: Matrix, dense_head: Matrix, triggered: Matrix
) -> NDArray[np.int64]:
    """Fuse the rankings by reciprocal rank, sum of 1 / (60 + rank), triggers first; return at most SHORTLIST places."""
    score = 10.0 * triggered.astype(np.float64)
    for ranking in (bm25, dense, dense_head):
        order = greatest(ranking, 4 * SHORTLIST)
        score[order] += 1.0 / (60.0 + np.arange(len(order)))
    return greatest(score, SHORTLIST)
