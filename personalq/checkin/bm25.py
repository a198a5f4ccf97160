"""BM25 with rank-bm25's BM25Okapi weights, kept sparse: a query costs what its terms' postings cost.

score(d) = sum over t of idf(t) * f (k1 + 1) / (f + k1 (1 - b + b |d| / avg)), f = count of t in d; k1 = 1.5, b = 0.75.
Negative idf is lifted to 0.25 of the mean idf, as rank-bm25 does. Every posting stores its finished weight.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def build_bm25(documents: Sequence[Sequence[int]], n_terms: int) -> Bm25:
    """Weigh documents of vocabulary ids. Empty corpora give no postings."""
    n_docs = len(documents)
    lengths = np.array([len(d) for d in documents], np.float64)
    flat = np.array([t for d in documents for t in d], np.int64)
    owner = np.repeat(np.arange(n_docs, dtype=np.int64), lengths.astype(np.int64))
    keys, counts = np.unique(flat * max(n_docs, 1) + owner, return_counts=True)
    term, doc = np.divmod(keys, max(n_docs, 1))
    df = np.bincount(term, minlength=n_terms).astype(np.float64)
    idf = _idf(df, n_docs)
    average = lengths.sum() / max(n_docs, 1)
    f = counts.astype(np.float64)
    weights = idf[term] * (f * (K1 + 1) / (f + K1 * (1 - B + B * lengths[doc] / max(average, 1e-9))))
    start = np.concatenate([[0], np.cumsum(df)]).astype(np.int64)
    return Bm25(start, doc.astype(np.int32), weights, n_docs)


def _idf(df: NDArray[np.float64], n_docs: int) -> NDArray[np.float64]:
    idf = np.log(n_docs - df + 0.5) - np.log(df + 0.5)
    seen = df > 0
    mean = idf[seen].sum() / max(int(seen.sum()), 1)
    idf[idf < 0] = EPSILON * mean
    return np.asarray(idf, np.float64)
