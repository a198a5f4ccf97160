"""The sentences that represent cards, added one by one, and their vectors: encoded whole, or composed in a large catalogue."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
from numpy.typing import NDArray

from ..encoder.composed import Composer, TokenTexts, compose
from ..encoder.minilm import WIDTH, Encoder
from .index import Index

Keys = NDArray[np.int64]


class Sentences:
    """``keys`` (N,) are 64 bits of each sentence's hash. Those that ``old`` knows keep their vectors and are not kept as text."""

    def __init__(self, encoder: Encoder, *, is_large: bool, old: Index | None) -> None:
        self._encoder, self._is_large = encoder, is_large
        self._old = old if old is not None and (old.composer is not None) == is_large else None
        self._place = {} if self._old is None else {int(key): i for i, key in enumerate(self._old.text_keys)}
        self._keys, self._texts, self._tokens = array("q"), dict[int, str](), TokenTexts(encoder)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> Keys:
        """Return the keys in order."""
        return np.array(self._keys, np.int64)

    def add(self, text: str) -> None:
        """Take in the sentence of the next card."""
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
        self._keys.append(key)
        if key in self._place:
            return
        if self._is_large:
            self._tokens.add(text)
        else:
            self._texts[key] = text

    def vectors(self) -> tuple[NDArray[np.float16], Composer | None]:
        """Return the vectors (N, 384), and how they were composed when there are too many to encode each."""
        found = np.zeros((len(self), WIDTH), np.float16)
        is_new = np.array([key not in self._place for key in self._keys], bool)
        if self._old is not None:
            known = np.flatnonzero(~is_new)
            found[known] = self._old.vectors[[self._place[self._keys[i]] for i in known.tolist()]]
        new = np.flatnonzero(is_new)
        if not self._is_large:
            fresh = dict(
                zip(self._texts, self._encoder.encode(list(self._texts.values())).astype(np.float16), strict=True)
            )
            for i in new.tolist():
                found[i] = fresh[self._keys[i]]
            return found, None
        if self._old is None or self._old.composer is None:
            return found, compose(self._tokens.rows(), self._encoder, out=found)
        self._old.composer.fill(found, new, self._tokens.rows(), self._encoder)
        return found, self._old.composer
