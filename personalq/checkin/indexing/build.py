"""Build the Check-in index of a catalogue: one pass over the cards for terms, then the vectors.

Cards are read one by one and kept as numbers, so that 75 000 of them need little memory.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cards.card import Card
from ..encoder.minilm import WIDTH, Encoder
from ..language.words import fold, grams, joined_pairs, split_term, terms, words
from .bm25 import Postings
from .index import EXACT, Index, phrase_key
from .sentences import Sentences
from .strings import Strings

_STUFFED = 10  # class nouns in one card's text
_LONG, _REPEATED = 30, 5  # a description of more terms than that, each of them said five times on average
_MAX_TERMS = 120  # per field; a card cannot buy attention with length
_TAGS = 12  # of a card, for its sentence and its meaning
_MAX_PHRASES = 8192  # class nouns and tags whose meaning is looked up: the most used ones


def card_fields(card: Card) -> tuple[list[str], ...]:
    """Return the terms of each field of a card, in the order of FIELDS. Example prompts are scenes: not evidence."""
    texts = (
        _with_pairs(card.name),
        _with_pairs(card.class_noun),
        [t for tag in card.tags for t in _tag_terms(tag)],
        _with_pairs(" ".join(card.trigger)),
        terms(card.description),
        terms(card.source) + terms(card.base),
    )
    return tuple(found[:_MAX_TERMS] for found in texts)


def _with_pairs(text: str) -> list[str]:
    return terms(text) + joined_pairs(text)


@functools.lru_cache(maxsize=16384)
def _tag_terms(tag: str) -> tuple[str, ...]:
    return tuple(_with_pairs(tag))


def card_text(card: Card) -> str:
    """Return the sentence that stands for a card in the dense index."""
    tags = ", ".join(card.tags[:_TAGS])
    parts = (card.name.replace("_", " "), card.class_noun, card.description[:400], tags)
    return ". ".join(part.strip(" .") for part in parts if part)


def documents(cards: Iterable[Card]) -> list[list[str]]:
    """Return the BM25 document of every card: all fields and the example prompts."""
    return [_document(card, card_fields(card)) for card in cards]


def _document(card: Card, fields: Sequence[Sequence[str]]) -> list[str]:
    return [*chain.from_iterable(fields), *terms(" ".join(card.example_prompts))[:_MAX_TERMS]]


def class_terms(cards: Iterable[Card]) -> set[str]:
    """Return the terms of all class nouns."""
    return {t for noun in {card.class_noun for card in cards} for t in terms(noun)}


def honest(card: Card, nouns: set[str]) -> Card:
    """Return a card without its tags and description when they are stuffed; ``nouns`` are the class nouns' terms.

    Nobody's checkpoint is a dog, a teapot and a guitar: a text that names ten kinds of thing is there to match every
    request. So is text that says the same few words over and over.
    """
    text = terms(card.description)[:_MAX_TERMS]
    repeats = len(text) > _LONG and len(set(text)) * _REPEATED < len(text)
    if repeats or len(nouns & {*text, *(t for tag in card.tags for t in _tag_terms(tag))}) >= _STUFFED:
        return plain(card)
    return card


def plain(card: Card) -> Card:
    """Return a card without tags and description."""
    return card.model_copy(update={"description": "", "tags": ()})


@dataclass
class _Words:
    """The result of one pass over the cards: terms numbered as they come, and everything in terms of those numbers."""

    sentences: Sentences
    numbers: dict[str, int] = field(default_factory=dict)
    df: array[int] = field(default_factory=lambda: array("q"))
    postings: Postings = field(default_factory=Postings)
    field_sizes: array[int] = field(default_factory=lambda: array("i"))
    field_terms: array[int] = field(default_factory=lambda: array("i"))
    stuffed: array[int] = field(default_factory=lambda: array("B"))
    spelled: set[str] = field(default_factory=set)
    triggers: dict[str, int] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    trigger_pairs: array[int] = field(default_factory=lambda: array("i"))
    phrases: dict[str, int] = field(default_factory=dict)
    nouns: array[int] = field(default_factory=lambda: array("i"))
    tag_sizes: array[int] = field(default_factory=lambda: array("i"))
    tag_phrases: array[int] = field(default_factory=lambda: array("i"))

    def number(self, term: str) -> int:
        """Return a term's number, a new one when it is new."""
        found = self.numbers.setdefault(term, len(self.numbers))
        if found == len(self.df):
            self.df.append(0)
        return found

    def add(self, card: Card, *, is_stuffed: bool) -> None:
        """Read one card."""
        fields = card_fields(card)
        self.postings.add([self.number(t) for t in _document(card, fields)])
        seen: set[int] = set()
        for terms_ in fields:
            numbers = [self.numbers[t] for t in dict.fromkeys(terms_)]
            self.field_sizes.append(len(numbers))
            self.field_terms.extend(numbers)
            seen.update(numbers)
        for number in seen:
            self.df[number] += 1
        self._add_names(card, len(self.sentences))
        self._add_phrases(card)
        self.sentences.add(card_text(card))
        self.stuffed.append(is_stuffed)

    def _add_names(self, card: Card, place: int) -> None:
        for text in (card.name, card.class_noun, *card.tags, *card.trigger):
            self.spelled.update(word for word in _split(text) if len(word) > 3 and not word.isdigit())
        for group in card.trigger:
            for phrase in (group, *group.split(",")):
                key = " ".join(fold(phrase).split())
                if len(key) > 1:
                    number = self.triggers.setdefault(key, len(self.triggers))
                    if number == len(self.written):
                        self.written.append(key if phrase == key else phrase)
                    self.trigger_pairs.extend((number, place))

    def _add_phrases(self, card: Card) -> None:
        keys = [phrase_key(text) for text in (card.class_noun, *card.tags)]
        noun, *tags = (self.phrases.setdefault(key, len(self.phrases)) for key in keys)
        self.nouns.append(noun)
        self.tag_sizes.append(len(tags[:_TAGS]))
        self.tag_phrases.extend(tags[:_TAGS])


@functools.lru_cache(maxsize=16384)
def _split(text: str) -> tuple[str, ...]:
    return tuple(words(text))


def build_index(cards: Sequence[Card], encoder: Encoder, *, digest: str, old: Index | None = None) -> Index:
    """Build the index of ``cards``; the order of cards is the order given. Texts that ``old`` knows keep their vectors.

    ``cards`` is walked over twice.
    """
    nouns, found = class_terms(cards), _Words(Sentences(encoder, is_large=len(cards) > EXACT, old=old))
    for card in cards:
        true = honest(card, nouns)
        found.add(true, is_stuffed=true is not card)
    vocabulary = sorted(found.numbers)
    sorted_place = np.zeros(len(vocabulary), np.int32)
    order = np.array([found.numbers[t] for t in vocabulary], np.int64)
    sorted_place[order] = np.arange(len(vocabulary), dtype=np.int32)
    bm25, found.postings = found.postings.weighed(len(vocabulary), sorted_place), Postings()
    phrases, renumbered = _kept_phrases(found)
    tag_start, tag_phrases = _kept_tags(found, renumbered)
    spelled = sorted(found.spelled)
    grams_, gram_start, gram_words = _gram_postings(spelled)
    triggers = sorted(found.triggers)
    trigger_start, trigger_cards = _trigger_cards(found, triggers)
    words_: dict[str, Any] = {
        "vocabulary": Strings.of(vocabulary),
        "df": np.array(found.df, np.int64)[order],
        "field_start": _starts(found.field_sizes),
        "field_terms": sorted_place[np.array(found.field_terms, np.int32)],
        "stuffed": np.array(found.stuffed, np.uint8),
        "card_class": renumbered[np.array(found.nouns, np.int64)],
        "spellings": Strings.of(spelled),
        "triggers": Strings.of(triggers),
        "trigger_start": trigger_start,
        "trigger_cards": trigger_cards,
        "trigger_rare": np.array(
            [
                _is_made_up(found.written[found.triggers[key]], int(n), found, encoder)
                for key, n in zip(triggers, np.diff(trigger_start), strict=True)
            ],
            np.uint8,
        ),
    }
    sentences = found.sentences
    del found, vocabulary, order, sorted_place, spelled, triggers, trigger_cards  # memory, before vectors want it
    vectors, composer = sentences.vectors()
    return Index(
        digest=digest,
        bm25=bm25,
        text_keys=sentences.keys,
        vectors=vectors,
        composer=composer,
        phrases=Strings.of(phrases),
        phrase_vectors=_phrase_vectors(phrases, encoder, old),
        tag_start=tag_start,
        tag_phrases=tag_phrases,
        grams=grams_,
        gram_start=gram_start,
        gram_words=gram_words,
        **words_,
    )


def _starts(sizes: Sequence[int] | array[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def _phrase_vectors(phrases: Sequence[str], encoder: Encoder, old: Index | None) -> NDArray[np.float16]:
    found = np.zeros((len(phrases), WIDTH), np.float16)
    known = [None if old is None else old.phrases.get(phrase) for phrase in phrases]
    new = [i for i, place in enumerate(known) if place is None]
    found[new] = encoder.encode([phrases[i] for i in new]).astype(np.float16)
    for i, place in enumerate(known):
        if old is not None and place is not None:
            found[i] = old.phrase_vectors[place]
    return found


def _trigger_cards(found: _Words, triggers: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return where the cards of each of the sorted ``triggers`` begin (T + 1,), and the cards, each once, in order."""
    sorted_place = np.zeros(len(triggers), np.int64)
    sorted_place[[found.triggers[key] for key in triggers]] = np.arange(len(triggers))
    pairs = np.array(found.trigger_pairs, np.int64).reshape(-1, 2)
    pairs[:, 0] = sorted_place[pairs[:, 0]]
    pairs = np.unique(pairs, axis=0)
    return _starts(np.bincount(pairs[:, 0], minlength=len(triggers))), pairs[:, 1].astype(np.int32)


def _is_made_up(written: str, n_cards: int, found: _Words, encoder: Encoder) -> bool:
    """Tell whether a trigger is made up: it has a word, not an ordinary one, that only the cards with it use."""
    is_phrase = " " in " ".join(fold(written).split())
    odd = [w for w in words(written) if not encoder.is_word(w) and not (is_phrase and _is_compound(w, encoder))]
    numbers = (found.numbers.get(t) for w in odd for t in split_term(w)[:1])
    return any(found.df[number] <= n_cards for number in numbers if number is not None)


def _is_compound(word: str, encoder: Encoder) -> bool:
    """Tell whether a word is two ordinary words written as one, such as 'cutout': in a phrase, people say that."""
    return any(encoder.is_word(word[:i]) and encoder.is_word(word[i:]) for i in range(3, len(word) - 2))


def _kept_phrases(found: _Words) -> tuple[list[str], NDArray[np.int32]]:
    """Return the class nouns and tags, sorted, of very many the most used ones; and the new number of each old one, or -1."""
    counts = np.bincount(np.array([*found.tag_phrases, *found.nouns], np.int64), minlength=len(found.phrases))
    texts = list(found.phrases)
    usable = [i for i, text in enumerate(texts) if text and len(text) <= 40]
    kept = sorted(sorted(usable, key=lambda i: (-counts[i], texts[i]))[:_MAX_PHRASES], key=texts.__getitem__)
    renumbered = np.full(len(texts), -1, np.int32)
    renumbered[kept] = np.arange(len(kept), dtype=np.int32)
    return [texts[i] for i in kept], renumbered


def _kept_tags(found: _Words, renumbered: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return where each card's tags begin (N + 1,), and the tags by their new numbers."""
    tags = renumbered[np.array(found.tag_phrases, np.int64)]
    owner = np.repeat(np.arange(len(found.sentences)), np.array(found.tag_sizes, np.int64))
    return _starts(np.bincount(owner[tags >= 0], minlength=len(found.sentences))), tags[tags >= 0]


def _gram_postings(vocabulary: Sequence[str]) -> tuple[Strings, NDArray[np.int64], NDArray[np.int32]]:
    found: dict[str, array[int]] = {}
    for place, word in enumerate(vocabulary):
        for gram in dict.fromkeys(grams(word)):
            found.setdefault(gram, array("i")).append(place)
    keys = sorted(found)
    postings = [np.array(found[gram], np.int32) for gram in keys]
    flat = np.concatenate(postings) if postings else np.zeros(0, np.int32)
    return Strings.of(keys), _starts([len(one) for one in postings]), flat
