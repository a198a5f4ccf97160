"""How each card matches a request: which field has its words, which words are missing, and what clashes.

``match[t, f, c]`` is how much field f of card c has term t.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...cards.card import Card
from ...cards.card import is_style as is_style_card
from ..indexing.index import FIELDS, Index
from ..language.intent import Intent, families_in
from ..language.request_terms import FILLER, Matrix, Terms
from ..language.words import stem, words

_COLOURS = frozenset(
    stem(word)
    for word in re.findall(
        r"\w+",
        """red orange yellow green blue purple pink brown black white gray ginger golden silver beige cream teal turquoise
        chocolate tan violet magenta""",
    )
)


def match_fields(terms_: Terms, index: Index, places: NDArray[np.int64]) -> Matrix:
    """Return match (T, F, C)."""
    n_fields = len(FIELDS)
    if not terms_.texts or not len(index.field_terms):
        return np.zeros((len(terms_.texts), n_fields, len(places)), np.float32)
    known = np.array(sorted({term for found in terms_.expansions for term in found}), np.int64)
    table = np.zeros((len(terms_.texts), len(known) + 1), np.float32)  # the last column: every other term
    for row, found in enumerate(terms_.expansions):
        table[row, np.searchsorted(known, list(found))] = list(found.values())
    cells = (places[:, None] * n_fields + np.arange(n_fields)).ravel()
    sizes = index.field_start[cells + 1] - index.field_start[cells] + 1  # one empty term each: no segment is empty
    source, starts = laid_end_to_end(index.field_start[cells], sizes)
    ids = index.field_terms[np.minimum(source, len(index.field_terms) - 1)]
    ids[starts + sizes - 1] = -1
    column = np.searchsorted(known, ids)
    is_known = np.append(known, -2)[column] == ids
    best = np.maximum.reduceat(table[:, np.where(is_known, column, len(known))], starts, axis=1)
    return np.asarray(best.reshape(len(terms_.texts), len(places), n_fields).transpose(0, 2, 1), np.float32)


def laid_end_to_end(begin: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places begin[i], begin[i] + 1, ... (sizes[i] of them) of every i in one array, and where each i starts."""
    starts = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(begin - starts, sizes), starts


def columns_of(
    intent: Intent, cards: Sequence[Card], index: Index, places: NDArray[np.int64], match: Matrix, terms_: Terms
) -> dict[str, Matrix]:
    """Return the feature columns that come from matched words and card facts, each (C,)."""
    name, noun, tags, triggers, text, source = (match[:, f] for f in range(len(FIELDS)))
    anywhere = (
        np.maximum.reduce([name, noun, tags, triggers, text]) if len(match) else np.zeros((0, len(places)), np.float32)
    )
    chosen = [cards[p] for p in places]
    is_style = np.array([is_style_card(card) for card in chosen], np.float32)
    head, attribute, scene = (terms_.zones == z for z in range(3))
    named = _head_words(terms_)
    last, before_last = named[-1:], named[-2:-1]
    lost = terms_.weights[:, None] * (1 - np.maximum(anywhere, source))
    head_any = _cover(anywhere, terms_.weights, head)
    all_any = _cover(anywhere, terms_.weights, head | attribute)
    name_cover, name_weight = _name_cover(terms_, index, places, np.maximum(name, triggers))
    scene_any = _cover(np.maximum(anywhere, 0), terms_.weights, scene)
    wants_style = float(intent.has_style_cue)
    return {
        "head_any": head_any,
        "head_style": head_any * is_style,
        "head_name": _cover(np.maximum(name, triggers), terms_.weights, head),
        "head_class": _cover(np.maximum(noun, tags), terms_.weights, head),
        "head_text": _cover(text, terms_.weights, head),
        "attribute_any": _cover(anywhere, terms_.weights, attribute),
        "scene_any": scene_any,
        "scene_style": scene_any * is_style,
        "source": (terms_.weights[:, None] * np.where(anywhere > 0, 0, source)).max(0, initial=0.0),
        "head_missing": lost[head].max(0, initial=0.0),
        "modifier_missing": lost[before_last].max(0, initial=0.0),
        "noun_class": np.maximum(noun, tags)[last].max(0, initial=0.0) * (1 - is_style),
        "noun_any": anywhere[last].max(0, initial=0.0) * (1 - is_style),
        "noun_style": anywhere[last].max(0, initial=0.0) * is_style,
        "name_cover": name_cover,
        "name_weight": name_weight,
        "head_regret": head_any.max(initial=0.0) - head_any,
        "all_regret": all_any.max(initial=0.0) - all_any,
        "name_regret": name_weight.max(initial=0.0) - name_weight,
        "family": _agreement(lambda card: families_in(_base_text(card)), chosen, intent.families),
        "kind": _agreement(lambda card: frozenset({card.kind}), chosen, intent.kinds),
        "style_match": wants_style * is_style,
        "style_mismatch": wants_style * (1 - is_style),
        "personal_style": float(intent.is_personal and not intent.has_style_cue) * is_style,
        "colour_clash": _colour_clash(terms_, chosen, anywhere),
        "is_style": is_style,
    }


def _cover(match: Matrix, weights: Matrix, mask: NDArray[np.bool_]) -> Matrix:
    """Return the weighted share of masked terms that each card has: (C,), zero when there are none."""
    total = weights[mask].sum()
    if total <= 0:
        return np.zeros(match.shape[1], np.float32)
    return np.asarray((weights[mask, None] * match[mask]).sum(0) / total, np.float32)


def _head_words(terms_: Terms) -> list[int]:
    """Return the places of the head's words; in English the last one names what it is. Nothing without a head."""
    return [int(i) for i in np.flatnonzero(terms_.zones == 0) if stem(terms_.texts[i]) not in FILLER]


def _name_cover(terms_: Terms, index: Index, places: NDArray[np.int64], match: Matrix) -> tuple[Matrix, Matrix]:
    """Return how much of each card's name the request says (weighted share), and the weight of what it says."""
    said = (terms_.weights[:, None] * match * np.where(terms_.zones == 2, 0.6, 1.0)[:, None]).sum(0)
    sizes = np.maximum(index.name_weights[places], 0.3)
    return np.minimum(said / sizes, 1.5).astype(np.float32), said.astype(np.float32)


def _base_text(card: Card) -> str:
    return f"{card.base.replace('/', ' ')} {' '.join(card.tags)}"


def _agreement(have: Callable[[Card], frozenset[str]], cards: Sequence[Card], want: frozenset[str]) -> Matrix:
    """Return +1 where a card has what is wanted, -1 where it has something else, 0 where either is unknown."""
    if not want:
        return np.zeros(len(cards), np.float32)
    return np.array([0 if not (found := have(card)) else 1 if want & found else -1 for card in cards], np.float32)


def _colour_clash(terms_: Terms, cards: Sequence[Card], anywhere: Matrix) -> Matrix:
    """Return 1 where the request names a colour and the card names only others."""
    asked = [i for i, t in enumerate(terms_.texts) if stem(t) in _COLOURS and terms_.zones[i] < 2]
    if not asked:
        return np.zeros(len(cards), np.float32)
    has_colour = np.array([_has_colour(f"{c.name} {c.description} {' '.join(c.tags)}") for c in cards])
    return np.asarray(has_colour & (anywhere[asked].max(0) < 0.5), np.float32)


@functools.lru_cache(maxsize=4096)
def _has_colour(text: str) -> bool:
    return bool(_COLOURS & {stem(word) for word in words(text)})
