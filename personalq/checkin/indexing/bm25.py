"""BM25 with rank-bm25's BM25Okapi weights, kept sparse: a query costs what its terms' postings cost.

score(d) = sum over t of idf(t) * f (k1 + 1) / (f + k1 (1 - b + b |d| / avg)), f = count of t in d; k1 = 1.5, b = 0.75.
Negative idf is lifted to 0.25 of the mean idf, as rank-bm25 does. Every posting stores its finished weight.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

K1, B, EPSILON = 1.5, 0.75, 0.25


@dataclass(frozen=True)
class Bm25:
    """Term-major postings: term t owns ``docs[start[t]:start[t+1]]`` and the weights at the same places."""

    start: NDArray[np.int64]
    docs: NDArray[np.int32]
    weights: NDArray[np.float64]
    n_docs: int

    def scores(self, term_ids: Sequence[int]) -> NDArray[np.float64]:
        """Return the scores (n_docs,) of a query given as vocabulary ids; a repeated term counts again."""
        total = np.zeros(self.n_docs)
        for term in term_ids:
            self.add_scores(total, term, 1.0)
        return total

    def add_scores(self, total: NDArray[np.float64], term: int, factor: float) -> None:
        """Add one term's weights times ``factor`` to ``total`` (n_docs,) in place."""
        span = slice(self.start[term], self.start[term + 1])
        total[self.docs[span]] += factor * self.weights[span]


class Postings:
    """Documents taken in one by one, kept as numbers."""

    def __init__(self) -> None:
        self._terms, self._distinct, self._lengths = (array("i") for _ in range(3))
        self._counts = array("H")  # of a term in a document: a document has some hundred terms

    def add(self, document: Sequence[int]) -> None:
        """Take in the next document, a sequence of term numbers."""
        counts = Counter(document)
        self._terms.extend(counts)
        self._counts.extend(counts.values())
        self._distinct.append(len(counts))
        self._lengths.append(len(document))

    def weighed(self, n_terms: int, renumbered: NDArray[np.int32] | None = None) -> Bm25:
        """Return the weights; ``renumbered`` (n_terms,) gives each term the number it has from now on."""
        n_docs = len(self._lengths)
        lengths = np.array(self._lengths, np.float64)
        term = np.array(self._terms, np.int32)
        term = term if renumbered is None else renumbered[term]
        order = np.argsort(term, kind="stable")
        term = term[order]
        doc = np.repeat(np.arange(n_docs, dtype=np.int32), np.array(self._distinct, np.int64))[order]
        weights = np.array(self._counts, np.uint16)[order].astype(np.float64)  # f, until all of it is put in place
        del order
        df = np.bincount(term, minlength=n_terms).astype(np.float64)
        average = max(lengths.sum() / max(n_docs, 1), 1e-9)
        below = (K1 * (1 - B + B * lengths / average))[doc]
        below += weights
        weights *= K1 + 1
        weights /= below
        weights *= _idf(df, n_docs)[term]
        start = np.concatenate([[0], np.cumsum(df)]).astype(np.int64)
        return Bm25(start, doc, weights, n_docs)


def build_bm25(documents: Iterable[Sequence[int]], n_terms: int) -> Bm25:
    """Weigh documents of vocabulary ids. Empty corpora give no postings."""
    postings = Postings()
    for document in documents:
        postings.add(document)
    return postings.weighed(n_terms)


def _idf(df: NDArray[np.float64], n_docs: int) -> NDArray[np.float64]:
    idf = np.log(n_docs - df + 0.5) - np.log(df + 0.5)
    seen = df > 0
    mean = idf[seen].sum() / max(int(seen.sum()), 1)
    idf[idf < 0] = EPSILON * mean
    return np.asarray(idf, np.float64)
