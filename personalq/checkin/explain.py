"""Explain a decision: which words a card accounts for, and the question that tells rivals apart in plain words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..cards.card import Card
from .indexing.index import FIELDS
from .language.words import fold, terms
from .ranking.features import NAMES, Evidence

MAX_OPTIONS = 4
_SHOWN = 0.5
_AS_ASKED = tuple((NAMES.index(name), label) for name, label in (("family", "base"), ("kind", "kind")))
_CLASH = NAMES.index("colour_clash")


def explained_words(evidence: Evidence, column: int) -> set[str]:
    """Return the request's words that a candidate accounts for, folded; the base model it names is not one of them."""
    fields = [f for f, name in enumerate(FIELDS) if name != "source"]
    best = evidence.match[:, fields, column].max(1, initial=0.0)
    return {word for word, value in zip(evidence.terms.texts, best.tolist(), strict=True) if value >= _SHOWN}


def reasons(evidence: Evidence, column: int) -> tuple[str, ...]:
    """Return the facets that matched, clash or are missing, strongest first."""
    found = ["trigger said"] if evidence.trigger[column] > 0 else []
    texts = evidence.terms.texts
    for name, values in zip(FIELDS, evidence.match[:, :, column].T.tolist(), strict=True):
        said = [word for word, value in zip(texts, values, strict=True) if value >= _SHOWN]
        if said:
            found.append(f"{name}: {', '.join(said[:6])}")
    values = evidence.features[column]
    for place, label in _AS_ASKED:
        found += (
            [f"{label} as asked"] if values[place] > 0 else [f"other {label} than asked"] if values[place] < 0 else []
        )
    if values[_CLASH] > 0:
        found.append("other colour than asked")
    known = explained_words(evidence, column)
    missing = [word for word, zone in zip(texts, evidence.terms.zones, strict=True) if zone < 2 and word not in known]
    if missing:
        found.append(f"not on the card: {', '.join(missing[:6])}")
    return tuple(found)


def question(cards: Sequence[Card], n_open: int) -> str:
    """Return one short question about the cards that are still open."""
    nouns = {fold(card.class_noun) for card in cards}
    noun = cards[0].class_noun if len(nouns) == 1 and cards[0].class_noun else "one"
    count = f" of the {n_open}" if n_open > len(cards) else ""
    plural = noun if noun == "one" or not count else _plural(noun)
    if count:
        return f"Which{count} {'candidates' if noun == 'one' else plural} do you mean?"
    return f"Which {noun} do you mean?"


def option_texts(cards: Sequence[Card]) -> tuple[str, ...]:
    """Return one label per card: its name and what is special about it; labels are never equal."""
    names = [card.name.replace("_", " ") for card in cards]
    labels = []
    for card, name in zip(cards, names, strict=True):
        detail = _detail(card)
        labels.append(f"{name}: {detail}" if detail else name)
    return tuple(
        label if labels.count(label) == 1 else f"{label} ({card.id})" for label, card in zip(labels, cards, strict=True)
    )


def option_order(card: Card) -> tuple[str, ...]:
    """Sort key that lists numbered siblings in their order, so that 'the second one' means what a person thinks."""
    return tuple(part.zfill(6) if part.isdigit() else part for part in re.split(r"(\d+)", card.id))


def _detail(card: Card) -> str:
    sentence = re.split(r"(?<=[\w)])[.;](?:\s|$)", card.description, maxsplit=1)[0].strip()
    if not sentence or set(terms(sentence)) <= set(terms(f"{card.name} {card.class_noun}")):
        sentence = ", ".join(card.tags[:4])
    if len(sentence) > 70:
        sentence = f"{sentence[:70].rsplit(' ', 1)[0].rstrip(' ,;')}..."
    return sentence


def _plural(noun: str) -> str:
    return noun if noun.endswith("s") else f"{noun}es" if noun.endswith(("x", "ch", "sh")) else f"{noun}s"
