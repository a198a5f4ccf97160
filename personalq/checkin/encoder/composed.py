"""Vectors of texts made from vectors of their tokens: for catalogues so large that encoding every card takes an hour.

Every token is encoded alone, once; a text's mean over its tokens then goes through an affine map that was fitted, by
ridge regression on a sample of this catalogue's own texts, to approximate the encoder's vector of the whole text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .minilm import END, START, WIDTH, Encoder, Vectors

SAMPLE = 2000  # texts that are encoded whole to fit the map
_RIDGE = 90  # ridge penalty, in cards: the best of 1 to 1200 on the real catalogue
_CHUNK = 512  # texts that are split into tokens at once
_MEANS = 64  # texts whose tokens' vectors are in memory at once: about 5 MB


@dataclass(frozen=True)
class TokenRows:
    """Token ids of N texts end to end, without the marks of beginning and end: text i has ``ids[start[i]:start[i + 1]]``."""

    ids: NDArray[np.uint16]
    start: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start) - 1

    def row(self, place: int) -> list[int]:
        """Return the ids of one text, as the encoder takes them."""
        return [START, *map(int, self.ids[self.start[place] : self.start[place + 1]]), END]


@dataclass(frozen=True)
class _Tokens:
    """The vectors (K, 384) of K distinct tokens, and the row of each token id."""

    vectors: Vectors
    row_of: NDArray[np.int32]


@dataclass(frozen=True)
class Composer:
    """The fitted map: a text with mean token vector m gets the unit vector of (m - centre) @ weights + offset."""

    centre: Vectors
    weights: Vectors
    offset: Vectors

    def fill(self, out: NDArray[np.float16], places: NDArray[np.int64], rows: TokenRows, encoder: Encoder) -> None:
        """Put the unit vectors of texts at ``places`` of ``out`` (N, 384)."""
        self._fill(out, places, rows, _token_vectors(rows, encoder))

    def _fill(self, out: NDArray[np.float16], places: NDArray[np.int64], rows: TokenRows, tokens: _Tokens) -> None:
        for begin in range(0, len(rows), _MEANS):
            mean = _means(rows, begin, min(begin + _MEANS, len(rows)), tokens)
            out[places[begin : begin + _MEANS]] = _unit((mean - self.centre) @ self.weights + self.offset)


def compose(rows: TokenRows, encoder: Encoder, *, out: NDArray[np.float16]) -> Composer:
    """Fit the map on a sample of texts, evenly spread; put the vectors of all texts into ``out`` (N, 384)."""
    tokens = _token_vectors(rows, encoder)
    sample = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64))
    truth = encoder.encode_rows([rows.row(int(place)) for place in sample])
    composer = fit(np.concatenate([_means(rows, int(place), int(place) + 1, tokens) for place in sample]), truth)
    composer._fill(out, np.arange(len(rows)), rows, tokens)
    return composer


def fit(means: Vectors, truth: Vectors) -> Composer:
    """Fit the map from mean token vectors (S, 384) to the encoder's vectors (S, 384)."""
    centre, offset = means.mean(0), truth.mean(0)
    x, y = (means - centre).astype(np.float64), truth - offset
    penalty = _RIDGE / len(x) * np.trace(x.T @ x) / WIDTH
    weights = np.linalg.solve(x.T @ x + (penalty + 1e-9) * np.eye(WIDTH), x.T @ y)
    return Composer(centre, weights.astype(np.float32), offset)


class TokenTexts:
    """Texts taken in one by one and kept as tokens."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._waiting = encoder, list[str]()
        self._ids, self._sizes = array("H"), array("i")  # the tokenizer has 30 522 tokens

    def add(self, text: str) -> None:
        """Take in the next text."""
        self._waiting.append(text)
        if len(self._waiting) == _CHUNK:
            self._split()

    def rows(self) -> TokenRows:
        """Return the tokens of all texts; none can be added after."""
        self._split()
        starts = np.concatenate([[0], np.cumsum(self._sizes, dtype=np.int64)]).astype(np.int64)
        return TokenRows(np.frombuffer(self._ids, np.uint16), starts)

    def _split(self) -> None:
        for row in self._encoder.token_rows(self._waiting):
            tokens = row[1:-1] or row[-1:]
            self._ids.extend(tokens)
            self._sizes.append(len(tokens))
        self._waiting.clear()


def token_rows(texts: Sequence[str], encoder: Encoder) -> TokenRows:
    """Return the tokens of texts."""
    found = TokenTexts(encoder)
    for text in texts:
        found.add(text)
    return found.rows()


def _token_vectors(rows: TokenRows, encoder: Encoder) -> _Tokens:
    """Encode the distinct tokens of texts, each alone."""
    used = np.unique(rows.ids)
    row_of = np.zeros(int(used.max(initial=0)) + 1, np.int32)
    row_of[used] = np.arange(len(used))
    return _Tokens(encoder.encode_rows([[START, token, END] for token in used.tolist()]), row_of)


def _means(rows: TokenRows, begin: int, end: int, tokens: _Tokens) -> Vectors:
    """Return the mean token vectors (end - begin, 384) of some texts."""
    start = rows.start[begin : end + 1]
    found = tokens.vectors[tokens.row_of[rows.ids[start[0] : start[-1]]]]
    return np.asarray(np.add.reduceat(found, start[:-1] - start[0], axis=0) / np.diff(start)[:, None], np.float32)


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9), np.float32)
