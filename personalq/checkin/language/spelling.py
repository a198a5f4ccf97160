"""Correct typos in a request to words that the cards use. Knows letters, not meaning."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from ..encoder.minilm import Encoder
from ..indexing.index import Index
from ..ranking.best import greatest
from .words import edit_distance, grams, split_term, words


def respell(text: str, index: Index, encoder: Encoder) -> str:
    """Write words that nobody knows as the words of the cards that they are one or two typos away from."""
    fixed = text
    for word in dict.fromkeys(words(text)):
        is_unknown = len(word) > 3 and split_term(word)[0] not in index.vocabulary and not encoder.is_word(word)
        if is_unknown and (right := _spelling(word, index)):
            fixed = re.sub(rf"(?i)\b{re.escape(word)}\b", right, fixed)
    return fixed


def _spelling(word: str, index: Index) -> str:
    """Return the cards' word within one typo (two in long words), found through shared character pairs, or ''.

    Two typos in a short word are believed only when nearly all letters are still there: a teapot is not a tarot.
    """
    pairs = [place for gram in dict.fromkeys(grams(word)) if (place := index.grams.get(gram)) is not None]
    if not pairs:
        return ""
    hits = np.concatenate([index.gram_words[index.gram_start[p] : index.gram_start[p + 1]] for p in pairs])
    shared = np.bincount(hits, minlength=len(index.spellings))
    best = [index.spellings.text(int(i)) for i in greatest(shared, 40) if shared[i] >= 2]
    close = [(edit_distance(word, other, 2), other[0] != word[0], other) for other in best if _may_be(word, other)]
    distance, _, right = min(close, default=(3, True, ""))
    return right if distance <= 2 else ""


def _may_be(word: str, other: str) -> bool:
    if edit_distance(word, other, 1) <= 1:
        return word[0] == other[0] or len(word) > 5
    lost = Counter(word) - Counter(other), Counter(other) - Counter(word)
    return len(word) >= 8 or (len(word) >= 5 and sum(sum(part.values()) for part in lost) <= 1)
