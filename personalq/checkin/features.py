"""Numbers that say how well a card fits a request: which words it explains, where, and what it contradicts.

Every request term has a zone (head, attribute, scene), a weight (rarity in the catalogue, 0..1) and expansions into
the vocabulary: itself, and words of near meaning. ``match[t, f, c]`` is how much field f of card c has it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..card import Card
from ..card import is_style as is_style_card
from .encoder import Encoder
from .gloss import gloss
from .index import FIELDS, Index
from .intent import MAX_REQUEST, Intent, families_in, parse_request
from .words import STOP, edit_distance, fold, grams, split_term, stem, words

SHORTLIST = 60
ZONES = ("head", "attribute", "scene")
NAMES = (
    "head_any", "head_name", "head_class", "head_text", "attribute_any", "scene_any", "scene_style", "source",
    "noun_class", "noun_any", "noun_style", "head_style", "class_meaning", "name_cover", "name_weight", "trigger_common",
    "dense", "dense_head", "dense_z", "dense_head_z", "dense_rest",
    "dense_gap", "head_dense_gap", "bm25_share", "head_regret", "all_regret", "name_regret",
    "family", "kind", "style_match", "style_mismatch", "personal_style", "colour_clash", "is_style",
)  # fmt: skip
_COLOURS = frozenset(
    stem(word)
    for word in re.findall(
        r"\w+",
        """red orange yellow green blue purple pink brown black white gray ginger golden silver beige cream teal turquoise
        chocolate tan violet magenta""",
    )
)
_FILLER = frozenset(
    stem(w) for w in ("photo", "picture", "image", "style", "look", "art", "version", "model", "lora", "page")
)
_OWNED = re.compile(r"(?P<owner>[^\W_]+)['\u2019]s\s+(?P<thing>.+)")
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Terms:
    """The request's terms: text, zone 0..2, weight 0..1, and expansions {vocabulary id: match 0..1}."""

    texts: list[str]
    zones: NDArray[np.int64]
    weights: Matrix
    expansions: list[dict[int, float]]


@dataclass(frozen=True)
class Evidence:
    """What was found for a shortlist of C cards: places (C,), features (C, len(NAMES)), match (T, F, C).

    ``trigger`` (C,) is 1 for a card whose made-up trigger was said, -1 for the others then, 0 when none was said;
    classes (C,) number the class nouns.
    """

    places: NDArray[np.int64]
    features: Matrix
    trigger: Matrix
    match: Matrix
    classes: NDArray[np.int32]
    terms: Terms
    intent: Intent


def gather(request: str, cards: Sequence[Card], index: Index, encoder: Encoder) -> Evidence:
    """Shortlist cards for a request and describe how each of them fits."""
    text = gloss(request[:MAX_REQUEST], lambda word: word in index.vocabulary or encoder.is_word(word))
    intent = parse_request(respell(text, index, encoder))
    words_ = _request_terms(intent, index)
    request_terms = expand(words_, index)
    unknown = _unknown_phrases(words_, request_terms)
    rest = f"{intent.attribute} {intent.scene}".strip() or intent.text
    vectors = encoder.encode([intent.text, intent.head or intent.text, rest, *unknown])
    add_meanings(request_terms, index, dict(zip(unknown, vectors[3:], strict=True)))
    dense, dense_head, dense_rest = index.cosines(vectors[:3])
    bm25 = _bm25(request_terms, index)
    rare, common = _trigger_hits(intent, index)
    triggered = np.maximum(rare, 0.3 * common)
    places = _shortlist(request_terms, index, bm25, dense, dense_head, triggered)
    match = _match(request_terms, index, places)
    class_meaning = _class_meaning(index, places, vectors[1])
    columns = _columns(intent, cards, index, places, match, request_terms)
    columns |= {
        "class_meaning": class_meaning,
        "dense": dense[places],
        "dense_head": dense_head[places],
        "dense_z": _standing(dense, places),
        "dense_head_z": _standing(dense_head, places),
        "dense_rest": _standing(dense_rest, places),
        "dense_gap": dense[places] - dense.max(initial=-1.0),
        "head_dense_gap": dense_head[places] - dense_head.max(initial=-1.0),
        "bm25_share": (bm25[places] / max(bm25.max(initial=0.0), 1e-6)).astype(np.float32),
        "trigger_common": common[places],
    }
    trigger = 2 * rare[places] - rare.max(initial=0.0)
    features = np.stack([columns[name] for name in NAMES], axis=1).astype(np.float32)
    return Evidence(places, features, trigger, match, index.card_class[places], request_terms, intent)


def _request_terms(intent: Intent, index: Index) -> list[tuple[str, int]]:
    """Return (word, zone) in order, without stop words and repeats; a word keeps its first, strongest zone.

    In 'my dog's bowl' the bowl is scenery if there are cards of dogs and none of bowls.
    """
    owned = _OWNED.search(intent.head)
    belongings = set(words(owned["thing"])) if owned and _is_about_owner(owned, index) else set()
    found: dict[str, int] = {}
    for zone, text in enumerate((intent.head, intent.attribute, intent.scene)):
        for word in words(text):
            if word not in STOP and len(found) < 40:
                found.setdefault(word, 2 if word in belongings else zone)
    return list(found.items())


def _is_about_owner(owned: re.Match[str], index: Index) -> bool:
    return fold(owned["owner"]) in index.phrases and not any(w in index.phrases for w in words(owned["thing"]))


def respell(text: str, index: Index, encoder: Encoder) -> str:
    """Write words that nobody knows as the words of the cards that they are one or two typos away from."""
    fixed = text
    for word in dict.fromkeys(words(text)):
        is_unknown = len(word) > 3 and split_term(word)[0] not in index.vocabulary and not encoder.is_word(word)
        if is_unknown and (right := _spelling(word, index)):
            fixed = re.sub(rf"(?i)\b{re.escape(word)}\b", right, fixed)
    return fixed


def expand(words_: list[tuple[str, int]], index: Index) -> Terms:
    """Map request words to vocabulary terms, weighed by rarity."""
    expansions: list[dict[int, float]] = []
    weights: list[float] = []
    scale = np.log(index.n_cards + 1.0) + 1e-6
    for word, _ in words_:
        parts = split_term(word)
        found = {index.vocabulary[t]: 1.0 if t == parts[0] else 0.7 for t in parts if t in index.vocabulary}
        df = max((int(index.df[i]) for i in found), default=0)
        expansions.append(found)
        is_filler = stem(word) in _FILLER
        weights.append((0.15 if is_filler else 1.0) * float(np.log((index.n_cards + 1) / (df + 0.5)) / scale))
    _join_neighbours([w for w, _ in words_], expansions, index)
    zones = np.array([zone for _, zone in words_], np.int64)
    return Terms([w for w, _ in words_], zones, np.clip(np.array(weights, np.float32), 0.02, 1.0), expansions)


def _unknown_phrases(words_: list[tuple[str, int]], found: Terms) -> list[str]:
    """Return the words and word pairs whose meaning must be looked up: those that no card uses."""
    head = [(word, bool(has)) for (word, zone), has in zip(words_, found.expansions, strict=True) if zone < 2]
    unknown = [word for word, is_known in head if not is_known and len(word) > 2]
    pairs = [f"{a} {b}" for (a, x), (b, y) in pairwise(head) if not (x and y)]
    return [*unknown[:4], *pairs[:2]]


def add_meanings(found: Terms, index: Index, meaning: dict[str, Matrix]) -> None:
    """Let unknown words and pairs explain themselves by class nouns and tags of near meaning."""
    for phrase, vector in meaning.items():
        near = _near_phrases(vector, index)
        for place in (p for p, word in enumerate(found.texts) if word in phrase.split()):
            expansion = found.expansions[place]
            for term, value in near.items():
                expansion[term] = max(expansion.get(term, 0.0), value)


def _spelling(word: str, index: Index) -> str:
    """Return the cards' word within one typo (two in long words), found through shared character pairs, or ''.

    Two typos in a short word are believed only when nearly all letters are still there: a teapot is not a tarot.
    """
    pairs = [index.gram_ids[g] for g in dict.fromkeys(grams(word)) if g in index.gram_ids]
    if not pairs:
        return ""
    hits = np.concatenate([index.gram_words[index.gram_start[p] : index.gram_start[p + 1]] for p in pairs])
    shared = np.bincount(hits, minlength=len(index.spelled))
    best = [index.spelled[int(i)] for i in np.argsort(-shared, kind="stable")[:40] if shared[i] >= 2]
    close = [(edit_distance(word, other, 2), other[0] != word[0], other) for other in best if _may_be(word, other)]
    distance, _, right = min(close, default=(3, True, ""))
    return right if distance <= 2 else ""


def _may_be(word: str, other: str) -> bool:
    if edit_distance(word, other, 1) <= 1:
        return word[0] == other[0] or len(word) > 5
    lost = Counter(word) - Counter(other), Counter(other) - Counter(word)
    return len(word) >= 8 or (len(word) >= 5 and sum(sum(part.values()) for part in lost) <= 1)


def _join_neighbours(words_: list[str], expansions: list[dict[int, float]], index: Index) -> None:
    for place, (a, b) in enumerate(pairwise(words_)):
        term = index.vocabulary.get(stem(a + b))
        if term is not None:
            expansions[place][term] = expansions[place + 1][term] = 1.0


def _near_phrases(vector: Matrix, index: Index) -> dict[int, float]:
    """Return terms of class nouns and tags that mean nearly the same: cosine 0.55 counts 0.3, 0.85 counts 0.9."""
    if not index.phrases:
        return {}
    cosine = index.phrase_vectors32 @ vector
    texts = index.phrase_texts
    found: dict[int, float] = {}
    for place in np.argsort(-cosine, kind="stable")[:4]:
        if cosine[place] >= 0.55:
            value = float(min(0.9, 0.3 + 2.0 * (cosine[place] - 0.55)))
            for word in words(texts[place]):
                for term in split_term(word)[:1]:
                    if term in index.vocabulary:
                        found.setdefault(index.vocabulary[term], value)
    return found


def _bm25(terms_: Terms, index: Index) -> NDArray[np.float64]:
    total = np.zeros(index.n_cards)
    for zone, found in zip(terms_.zones, terms_.expansions, strict=True):
        for term, value in found.items():
            index.bm25.add_scores(total, term, (1.0 if zone < 2 else 0.5) * value)
    return total


def _trigger_hits(intent: Intent, index: Index) -> tuple[Matrix, Matrix]:
    """Return two (N,) arrays: 1 where a made-up trigger stands in the request, 1 where an ordinary phrase does."""
    text = " ".join(fold(intent.text).split())
    rare, common = np.zeros(index.n_cards, np.float32), np.zeros(index.n_cards, np.float32)
    for key in _whole_phrases(text) & index.triggers.keys():
        places, is_rare = index.triggers[key]
        (rare if is_rare else common)[places] = 1.0
    return rare, common


def _whole_phrases(text: str) -> set[str]:
    """Return every stretch of ``text`` that neither begins nor ends inside a word, of at most 80 characters."""
    inside = [a.isalnum() and b.isalnum() for a, b in pairwise(text)]
    edges = [0, *(i + 1 for i, is_inside in enumerate(inside[:400]) if not is_inside), min(len(text), 401)]
    return {text[a:b] for i, a in enumerate(edges) for b in edges[i + 1 : i + 40] if b - a <= 80}


def _shortlist(
    terms_: Terms, index: Index, bm25: NDArray[np.float64], dense: Matrix, dense_head: Matrix, triggered: Matrix
) -> NDArray[np.int64]:
    """Fuse the rankings by reciprocal rank, sum of 1 / (60 + rank), triggers first; return at most SHORTLIST places."""
    score = np.where(triggered > 0, 10.0 * triggered, 0.0).astype(np.float64)
    for ranking in (bm25, dense, dense_head):
        order = _best(np.asarray(ranking, np.float64), 4 * SHORTLIST)
        score[order] += 1.0 / (60.0 + np.arange(len(order)))
    return _best(score, SHORTLIST)


def _best(scores: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    """Return the places of the n greatest scores, greatest first, equal ones by place."""
    if len(scores) > 4 * n:
        least = np.partition(scores, -n)[-n]
        some = np.flatnonzero(scores >= least)
    else:
        some = np.arange(len(scores))
    return np.asarray(some[np.argsort(-scores[some], kind="stable")][:n], np.int64)


def _match(terms_: Terms, index: Index, places: NDArray[np.int64]) -> Matrix:
    """Return match (T, F, C)."""
    n_fields = len(FIELDS)
    if not terms_.texts or not len(index.field_terms):
        return np.zeros((len(terms_.texts), n_fields, len(places)), np.float32)
    table = np.zeros((len(terms_.texts), len(index.vocabulary) + 1), np.float32)
    for row, found in enumerate(terms_.expansions):
        for term, value in found.items():
            table[row, term] = value
    cells = (places[:, None] * n_fields + np.arange(n_fields)).ravel()
    sizes = index.field_start[cells + 1] - index.field_start[cells] + 1  # one empty term each: no segment is empty
    starts = np.cumsum(sizes) - sizes
    inside = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    is_term = inside < np.repeat(sizes - 1, sizes)
    source = np.repeat(index.field_start[cells], sizes) + inside
    ids = np.where(is_term, index.field_terms[np.minimum(source, len(index.field_terms) - 1)], len(index.vocabulary))
    best = np.maximum.reduceat(table[:, ids], starts, axis=1)
    return np.asarray(best.reshape(len(terms_.texts), len(places), n_fields).transpose(0, 2, 1), np.float32)


def _standing(cosine: Matrix, places: NDArray[np.int64]) -> Matrix:
    """Return how many standard deviations above the catalogue's mean each place is (C,)."""
    return np.asarray(
        (cosine[places] - cosine.sum() / max(len(cosine), 1)) / ((cosine.std() if len(cosine) else 0.0) + 0.02),
        np.float32,
    )


def _class_meaning(index: Index, places: NDArray[np.int64], head: Matrix) -> Matrix:
    classes = index.card_class[places]
    if not index.phrases:
        return np.zeros(len(places), np.float32)
    cosine = index.phrase_vectors32 @ head
    return np.where(classes >= 0, cosine[np.maximum(classes, 0)], 0.0).astype(np.float32)


def _columns(
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
    last = _head_noun(terms_)
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
        "noun_class": np.maximum(noun, tags)[last].max(0, initial=0.0) * (1 - is_style),
        "noun_any": anywhere[last].max(0, initial=0.0) * (1 - is_style),
        "noun_style": anywhere[last].max(0, initial=0.0) * is_style,
        "name_cover": name_cover,
        "name_weight": name_weight,
        "head_regret": head_any.max(initial=0.0) - head_any,
        "all_regret": all_any.max(initial=0.0) - all_any,
        "name_regret": name_weight.max(initial=0.0) - name_weight,
        "family": _agreement([families_in(_base_text(card)) for card in chosen], intent.families),
        "kind": _agreement([frozenset({card.kind}) for card in chosen], intent.kinds),
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


def _head_noun(terms_: Terms) -> list[int]:
    """Return the place of the last word of the head, which names what it is in English; nothing without a head."""
    head = [int(i) for i in np.flatnonzero(terms_.zones == 0) if stem(terms_.texts[i]) not in _FILLER]
    return head[-1:]


def _name_cover(terms_: Terms, index: Index, places: NDArray[np.int64], match: Matrix) -> tuple[Matrix, Matrix]:
    """Return how much of each card's name the request says (weighted share), and the weight of what it says."""
    said = (terms_.weights[:, None] * match * np.where(terms_.zones == 2, 0.6, 1.0)[:, None]).sum(0)
    scale = np.log(index.n_cards + 1.0) + 1e-6
    sizes = np.zeros(len(places), np.float32)
    for row, place in enumerate(places):
        cell = place * len(FIELDS)
        ids = index.field_terms[index.field_start[cell] : index.field_start[cell + 1]]
        sizes[row] = float((np.log((index.n_cards + 1) / (index.df[ids] + 0.5)) / scale).sum())
    return np.minimum(said / np.maximum(sizes, 0.3), 1.5).astype(np.float32), said.astype(np.float32)


def _base_text(card: Card) -> str:
    return f"{card.base.replace('/', ' ')} {' '.join(card.tags)}"


def _agreement(have: list[frozenset[str]], want: frozenset[str]) -> Matrix:
    """Return +1 where a card has what is wanted, -1 where it has something else, 0 where either is unknown."""
    return np.array([0 if not want or not h else 1 if want & h else -1 for h in have], np.float32)


def _colour_clash(terms_: Terms, cards: Sequence[Card], anywhere: Matrix) -> Matrix:
    """Return 1 where the request names a colour and the card names only others."""
    asked = [i for i, t in enumerate(terms_.texts) if stem(t) in _COLOURS and terms_.zones[i] < 2]
    if not asked:
        return np.zeros(len(cards), np.float32)
    has_colour = np.array(
        [bool(_COLOURS & {stem(w) for w in words(f"{c.name} {c.description} {' '.join(c.tags)}")}) for c in cards]
    )
    return np.asarray(has_colour & (anywhere[asked].max(0) < 0.5), np.float32)
