"""The Check-in index over all cards: BM25 postings, terms by field, vectors. Made by ``build``.

On disk (``index/``): ``index.safetensors`` (arrays, memory-mapped: what is not asked for is not read), ``index.json``
(version and digest) and the cards (``stored``).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..encoder.composed import Composer
from ..encoder.minilm import WIDTH
from .bm25 import Bm25
from .mapped import map_safetensors, write_safetensors
from .strings import Strings

VERSION = 7
FIELDS = ("name", "class", "tags", "triggers", "description", "source")
EXACT = 5000  # cards up to which each is encoded whole and compared exactly
_REFINED, _DIRECTIONS = 384, 64


@dataclass(frozen=True)
class Index:
    """Everything the scorer reads. N cards, V vocabulary terms, P concept phrases (class nouns and tags).

    ``field_terms[field_start[i * F + f] : field_start[i * F + f + 1]]`` are the vocabulary ids of field f of card i;
    card i's tags are phrases ``tag_phrases[tag_start[i] : tag_start[i + 1]]``; trigger t belongs to the cards
    ``trigger_cards[trigger_start[t] : trigger_start[t + 1]]`` and is made up, nobody says it by chance, when
    ``trigger_rare[t]``; ``spellings`` are the words that a mistyped word may be. ``composer`` is None when every card
    was encoded whole.
    """

    digest: str
    vocabulary: Strings
    bm25: Bm25
    df: NDArray[np.int64]
    field_start: NDArray[np.int64]
    field_terms: NDArray[np.int32]
    stuffed: NDArray[np.uint8]
    text_keys: NDArray[np.int64]
    vectors: NDArray[np.float16]
    composer: Composer | None
    phrases: Strings
    phrase_vectors: NDArray[np.float16]
    card_class: NDArray[np.int32]
    tag_start: NDArray[np.int64]
    tag_phrases: NDArray[np.int32]
    spellings: Strings
    grams: Strings
    gram_start: NDArray[np.int64]
    gram_words: NDArray[np.int32]
    triggers: Strings
    trigger_start: NDArray[np.int64]
    trigger_cards: NDArray[np.int32]
    trigger_rare: NDArray[np.uint8]

    @property
    def n_cards(self) -> int:
        """Number of cards."""
        return len(self.text_keys)

    def cosines(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the cosines (Q, N) of unit vectors (Q, 384) with every card.

        Large catalogues are compared in the 64 directions that vary most, and the best 384 of each query exactly.
        """
        if self.n_cards <= EXACT:
            return np.asarray(queries @ self._vectors32.T, np.float32)
        directions, coarse = self._coarse
        found = np.asarray((queries @ directions) @ coarse.T, np.float32)
        best = np.unique([np.argpartition(row, -_REFINED)[-_REFINED:] for row in found])
        found[:, best] = queries @ self.vectors[best].astype(np.float32).T
        return found

    @functools.cached_property
    def _vectors32(self) -> NDArray[np.float32]:
        return self.vectors.astype(np.float32)

    @functools.cached_property
    def _coarse(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The directions (384, 64) that vary most over a sample of cards, and the cards along them (N, 64)."""
        sample = self.vectors[:: max(self.n_cards // 8192, 1)].astype(np.float32)
        _, basis = np.linalg.eigh(sample.T @ sample)
        directions = np.ascontiguousarray(basis[:, -_DIRECTIONS:])
        parts = [part.astype(np.float32) @ directions for part in np.array_split(self.vectors, self.n_cards // 4096)]
        return directions, np.concatenate(parts)

    @functools.cached_property
    def phrase_vectors32(self) -> NDArray[np.float32]:
        """Phrase vectors (P, 384) as float32."""
        return self.phrase_vectors.astype(np.float32)

    @functools.cached_property
    def name_weights(self) -> NDArray[np.float32]:
        """How much each card's name says, the sum of its terms' rarities (N,)."""
        begin = self.field_start[: -1 : len(FIELDS)]
        end = self.field_start[1 :: len(FIELDS)]
        rarity = np.log((self.n_cards + 1) / (self.df + 0.5)) / (np.log(self.n_cards + 1.0) + 1e-6)
        total = np.concatenate([[0.0], np.cumsum(rarity[self.field_terms])])
        return np.asarray(total[end] - total[begin], np.float32)


def phrase_key(text: str) -> str:
    """Return the form in which class nouns and tags are kept."""
    return " ".join(text.lower().replace("_", " ").split())


_ARRAYS = (
    "df", "field_start", "field_terms", "stuffed", "text_keys", "vectors", "phrase_vectors", "card_class", "tag_start",
    "tag_phrases", "gram_start", "gram_words", "trigger_start", "trigger_cards", "trigger_rare",
)  # fmt: skip
_STRINGS = ("vocabulary", "phrases", "spellings", "grams", "triggers")
_COMPOSER = ("centre", "weights", "offset")


def save_index(index: Index, folder: Path) -> None:
    """Write an index into a folder."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(index, name) for name in _ARRAYS}
    for name in _STRINGS:
        arrays |= getattr(index, name).arrays(f"{name}.")
    arrays |= {f"bm25.{part}": getattr(index.bm25, part) for part in ("start", "docs", "weights")}
    if index.composer is not None:
        arrays |= {f"composer.{part}": getattr(index.composer, part) for part in _COMPOSER}
    write_safetensors(arrays, folder / "index.safetensors")
    (folder / "index.json").write_text(json.dumps({"version": VERSION, "digest": index.digest}))


def load_index(folder: Path, *, digest: str | None) -> Index | None:
    """Return the index in ``folder`` if it is whole and of these cards (None: of any), else None: build it again."""
    try:
        text = json.loads((folder / "index.json").read_bytes())
        if text["version"] != VERSION or digest not in (None, text["digest"]):
            return None
        index = _assemble(text["digest"], map_safetensors(folder / "index.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index if index.vectors.shape == (index.n_cards, WIDTH) else None


def _assemble(digest: str, arrays: dict[str, NDArray[Any]]) -> Index:
    fields: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    fields |= {name: Strings(arrays, f"{name}.") for name in _STRINGS}
    bm25 = [arrays[f"bm25.{part}"] for part in ("start", "docs", "weights")]
    is_composed = f"composer.{_COMPOSER[0]}" in arrays
    return Index(
        digest=digest,
        bm25=Bm25(bm25[0], bm25[1], bm25[2], len(arrays["text_keys"])),
        composer=Composer(*(arrays[f"composer.{part}"] for part in _COMPOSER)) if is_composed else None,
        **fields,
    )
