"""The Check-in index over all cards: BM25 postings, terms by field, vectors. Built once per set of cards.

On disk (``index/``): ``index.safetensors`` (arrays, memory-mapped), ``index.json`` (ids, vocabulary, phrases, digest).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..card import Card
from .bm25 import Bm25, build_bm25
from .encoder import WIDTH, Encoder
from .mapped import map_safetensors
from .words import fold, grams, joined_pairs, split_term, terms, words

VERSION = 6
FIELDS = ("name", "class", "tags", "triggers", "description", "source")
_EXACT, _REFINED, _DIRECTIONS = 5000, 1000, 64
_STUFFED = 10  # class nouns in one card's text
_LONG, _REPEATED = 30, 5  # a description of more terms than that, each of them said five times on average
_MAX_TERMS = 120  # per field; a card cannot buy attention with length


@dataclass(frozen=True)
class Index:
    """Everything the scorer reads. N cards, V vocabulary terms, P concept phrases (class nouns and tags).

    ``field_terms[field_start[i * F + f] : field_start[i * F + f + 1]]`` are the vocabulary ids of field f of card i.
    """

    digest: str
    ids: list[str]
    vocabulary: dict[str, int]
    bm25: Bm25
    df: NDArray[np.int64]
    field_start: NDArray[np.int64]
    field_terms: NDArray[np.int32]
    text_keys: NDArray[np.int64]
    vectors: NDArray[np.float16]
    phrases: dict[str, int]
    phrase_vectors: NDArray[np.float16]
    card_class: NDArray[np.int32]
    spellings: dict[str, int]
    gram_ids: dict[str, int]
    gram_start: NDArray[np.int64]
    gram_words: NDArray[np.int32]

    triggers: dict[str, tuple[list[int], bool]]

    @property
    def n_cards(self) -> int:
        """Number of cards."""
        return len(self.ids)

    @functools.cached_property
    def terms(self) -> list[str]:
        """The vocabulary by id."""
        return list(self.vocabulary)

    @functools.cached_property
    def spelled(self) -> list[str]:
        """The words that a mistyped word may be, by id: those of names, class nouns, tags and triggers."""
        return list(self.spellings)

    @functools.cached_property
    def phrase_texts(self) -> list[str]:
        """The concept phrases by id."""
        return list(self.phrases)

    def cosines(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the cosines (Q, N) of unit vectors (Q, 384) with every card.

        Large catalogues are compared in the 64 directions that vary most, and the best 1000 of each query exactly.
        """
        if self.n_cards <= _EXACT:
            return np.asarray(queries @ self._vectors32.T, np.float32)
        directions, coarse = self._coarse
        found = np.asarray((queries @ directions) @ coarse.T, np.float32)
        for row, query in zip(found, queries, strict=True):
            best = np.sort(np.argpartition(row, -_REFINED)[-_REFINED:])
            row[best] = self.vectors[best].astype(np.float32) @ query
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


def card_fields(card: Card) -> tuple[list[str], ...]:
    """Return the terms of each field of a card, in the order of FIELDS. Example prompts are scenes: not evidence."""
    triggers = " ".join(card.trigger)
    texts = (
        terms(card.name) + joined_pairs(card.name),
        terms(card.class_noun) + joined_pairs(card.class_noun),
        [t for tag in card.tags for t in (*terms(tag), *joined_pairs(tag))],
        terms(triggers) + joined_pairs(triggers),
        terms(card.description),
        terms(card.source) + terms(card.base),
    )
    return tuple(found[:_MAX_TERMS] for found in texts)


def card_text(card: Card) -> str:
    """Return the sentence that stands for a card in the dense index."""
    tags = ", ".join(card.tags[:12])
    parts = (card.name.replace("_", " "), card.class_noun, card.description[:400], tags)
    return ". ".join(part.strip(" .") for part in parts if part)


def documents(cards: Sequence[Card]) -> list[list[str]]:
    """Return the BM25 document of every card: all fields and the example prompts."""
    return [
        [t for field in fields for t in field] + terms(" ".join(card.example_prompts))[:_MAX_TERMS]
        for card, fields in zip(cards, map(card_fields, cards), strict=True)
    ]


def honest(cards: Sequence[Card]) -> list[Card]:
    """Return cards whose tags and description are left out where they are stuffed.

    Nobody's checkpoint is a dog, a teapot and a guitar: a text that names ten kinds of thing is there so that every
    request finds it. So is text that says the same few words over and over.
    """
    nouns = {t for card in cards for t in terms(card.class_noun)}
    plain = {"description": "", "tags": ()}
    return [card.model_copy(update=plain) if _is_stuffed(card, nouns) else card for card in cards]


def _is_stuffed(card: Card, nouns: set[str]) -> bool:
    text = terms(card.description)[:_MAX_TERMS]
    repeats = len(text) > _LONG and len(set(text)) * _REPEATED < len(text)
    return repeats or len(nouns & {*text, *(t for tag in card.tags for t in terms(tag))}) >= _STUFFED


def build_index(cards: Sequence[Card], encoder: Encoder, *, digest: str, old: Index | None = None) -> Index:
    """Build the index of ``cards``; the order of ids is the order given. Texts that ``old`` knows are not encoded again."""
    cards = honest(cards)
    texts = documents(cards)
    vocabulary = {term: i for i, term in enumerate(sorted({t for text in texts for t in text}))}
    fields = [[vocabulary[t] for t in dict.fromkeys(field)] for card in cards for field in card_fields(card)]
    seen = [set(t for part in fields[i : i + len(FIELDS)] for t in part) for i in range(0, len(fields), len(FIELDS))]
    df = np.bincount([t for some in seen for t in some], minlength=len(vocabulary)).astype(np.int64)
    phrases = _phrases(cards)
    spellings = _spellings(cards)
    gram_ids, gram_start, gram_words = _gram_postings(list(spellings))
    return Index(
        digest=digest,
        ids=[card.id for card in cards],
        vocabulary=vocabulary,
        bm25=build_bm25([[vocabulary[t] for t in text] for text in texts], len(vocabulary)),
        df=df,
        field_start=np.concatenate([[0], np.cumsum([len(f) for f in fields])]).astype(np.int64),
        field_terms=np.array([t for field in fields for t in field], np.int32),
        text_keys=(text_keys := _text_keys([card_text(card) for card in cards])),
        vectors=_vectors(cards, text_keys, encoder, old),
        phrases=phrases,
        phrase_vectors=_phrase_vectors(phrases, encoder, old),
        card_class=np.array([phrases.get(phrase_key(card.class_noun), -1) for card in cards], np.int32),
        spellings=spellings,
        gram_ids=gram_ids,
        gram_start=gram_start,
        gram_words=gram_words,
        triggers=_triggers(cards, encoder, vocabulary, df),
    )


def _text_keys(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return 64 bits of each text's hash."""
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(hashes), np.int64)


def _vectors(
    cards: Sequence[Card], keys: NDArray[np.int64], encoder: Encoder, old: Index | None
) -> NDArray[np.float16]:
    """Return the card vectors (N, 384); cards with equal texts share one encoding."""
    place = {} if old is None else {int(key): i for i, key in enumerate(old.text_keys)}
    new = {int(key): card_text(card) for key, card in zip(keys, cards, strict=True) if int(key) not in place}
    fresh = dict(zip(new, encoder.encode(list(new.values())).astype(np.float16), strict=True))
    found = np.zeros((len(cards), WIDTH), np.float16)
    for row, key in enumerate(keys.tolist()):
        found[row] = fresh[key] if old is None or key in fresh else old.vectors[place[key]]
    return found


def _phrase_vectors(phrases: dict[str, int], encoder: Encoder, old: Index | None) -> NDArray[np.float16]:
    known = {} if old is None else old.phrases
    new = [phrase for phrase in phrases if phrase not in known]
    fresh = dict(zip(new, encoder.encode(new).astype(np.float16), strict=True))
    rows = [fresh[p] if old is None or p in fresh else old.phrase_vectors[known[p]] for p in phrases]
    return np.stack(rows) if rows else np.zeros((0, WIDTH), np.float16)


def _triggers(
    cards: Sequence[Card], encoder: Encoder, vocabulary: dict[str, int], df: NDArray[np.int64]
) -> dict[str, tuple[list[int], bool]]:
    """Map every trigger phrase, folded, to its cards and whether it is made up: nobody says it by chance.

    Made up means: it has a word that is not an ordinary one and that only the cards with this trigger use.
    """
    found: dict[str, list[int]] = {}
    written: dict[str, str] = {}
    for place, card in enumerate(cards):
        for group in card.trigger:
            for phrase in (group, *group.split(",")):
                key = " ".join(fold(phrase).split())
                if len(key) > 1 and place not in found.setdefault(key, []):
                    found[key].append(place)
                    written.setdefault(key, phrase)

    def is_made_up(key: str) -> bool:
        odd = [
            w for w in words(written[key]) if not encoder.is_word(w) and not (" " in key and _is_compound(w, encoder))
        ]
        return any(df[vocabulary[t]] <= len(found[key]) for w in odd for t in split_term(w)[:1] if t in vocabulary)

    return {key: (found[key], is_made_up(key)) for key in sorted(found) if found[key]}


def _is_compound(word: str, encoder: Encoder) -> bool:
    """Tell whether a word is two ordinary words written as one, such as 'cutout': in a phrase, people say that."""
    return any(encoder.is_word(word[:i]) and encoder.is_word(word[i:]) for i in range(3, len(word) - 2))


def phrase_key(text: str) -> str:
    """Return the form in which class nouns and tags are kept."""
    return " ".join(text.lower().replace("_", " ").split())


def _phrases(cards: Sequence[Card]) -> dict[str, int]:
    texts = {phrase_key(text) for card in cards for text in (card.class_noun, *card.tags) if text}
    return {text: i for i, text in enumerate(sorted(t for t in texts if t and len(t) <= 40))}


def _spellings(cards: Sequence[Card]) -> dict[str, int]:
    """Return the words that cards are called by, as they are written; descriptions only describe."""
    texts = {text for card in cards for text in (card.name, card.class_noun, *card.tags, *card.trigger)}
    found = {word for text in texts for word in words(text) if len(word) > 3 and not word.isdigit()}
    return {word: i for i, word in enumerate(sorted(found))}


def _gram_postings(vocabulary: list[str]) -> tuple[dict[str, int], NDArray[np.int64], NDArray[np.int32]]:
    found: dict[str, list[int]] = {}
    for place, word in enumerate(vocabulary):
        for gram in dict.fromkeys(grams(word)):
            found.setdefault(gram, []).append(place)
    ids = {gram: i for i, gram in enumerate(sorted(found))}
    start = np.concatenate([[0], np.cumsum([len(found[g]) for g in ids])]).astype(np.int64)
    return ids, start, np.array([w for g in ids for w in found[g]], np.int32)


_ARRAYS = (
    "text_keys", "df", "field_start", "field_terms", "vectors", "phrase_vectors", "card_class", "gram_start", "gram_words",
)  # fmt: skip
_LISTS = ("vocabulary", "phrases", "spellings", "gram_ids")


def save_index(index: Index, folder: Path) -> None:
    """Write an index into an empty folder."""
    bm25 = index.bm25
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    arrays |= {"bm25_start": bm25.start, "bm25_docs": bm25.docs, "bm25_weights": bm25.weights}
    save_file(arrays, folder / "index.safetensors")
    text = {"version": VERSION, "digest": index.digest, "ids": index.ids}
    text |= {name: list(getattr(index, name)) for name in _LISTS}
    text["triggers"] = index.triggers
    (folder / "index.json").write_text(json.dumps(text, ensure_ascii=False))


def load_index(folder: Path, *, digest: str | None) -> Index | None:
    """Return the index in ``folder`` if it is whole and of these cards (None: of any), else None: build it again."""
    try:
        text = json.loads((folder / "index.json").read_bytes())
        if text["version"] != VERSION or digest not in (None, text["digest"]):
            return None
        index = _assemble(text, map_safetensors(folder / "index.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index if index.vectors.shape == (index.n_cards, WIDTH) else None


def _assemble(text: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Index:
    numbered = {name: {term: i for i, term in enumerate(text[name])} for name in _LISTS}
    fields: dict[str, Any] = {**numbered, **{name: arrays[name] for name in _ARRAYS}}
    return Index(
        digest=text["digest"],
        ids=list(text["ids"]),
        bm25=Bm25(arrays["bm25_start"], arrays["bm25_docs"], arrays["bm25_weights"], len(text["ids"])),
        triggers={key: (places, is_rare) for key, (places, is_rare) in text["triggers"].items()},
        **fields,
    )
