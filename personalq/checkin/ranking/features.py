"""Features that say how well each card of a shortlist fits a request: the input of the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cards.card import Card
from ..encoder.minilm import Encoder
from ..indexing.index import Index
from ..language.gloss import gloss
from ..language.intent import MAX_REQUEST, Intent, parse_request
from ..language.request_terms import Matrix, Terms, add_meanings, expand, request_terms, unknown_phrases
from ..language.spelling import respell
from .facets import columns_of, laid_end_to_end, match_fields
from .shortlist import bm25_scores, shortlist, trigger_hits

NAMES = (
    "head_any", "head_name", "head_class", "head_text", "attribute_any", "scene_any", "scene_style", "source",
    "head_missing", "modifier_missing", "noun_class", "noun_any", "noun_style", "head_style",
    "class_meaning", "tag_meaning", "name_cover", "name_weight", "trigger_common",
    "dense", "dense_head", "dense_z", "dense_head_z", "dense_rest",
    "dense_gap", "head_dense_gap", "bm25_share", "head_regret", "all_regret", "name_regret",
    "family", "kind", "style_match", "style_mismatch", "personal_style", "colour_clash", "is_style",
)  # fmt: skip


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
    said = request_terms(intent, index)
    found = expand(said, index)
    unknown = unknown_phrases(said, found)
    rest = f"{intent.attribute} {intent.scene}".strip() or intent.text
    vectors = encoder.encode_remembering([intent.described, intent.head or intent.described, rest, *unknown])
    add_meanings(found, index, dict(zip(unknown, vectors[3:], strict=True)))
    dense, dense_head, dense_rest = index.cosines(vectors[:3])
    bm25 = bm25_scores(found, index)
    rare, common = trigger_hits(intent, index)
    places = shortlist(found, index, bm25, dense, dense_head, np.maximum(rare, 0.3 * common))
    match = match_fields(found, index, places)
    columns = columns_of(intent, cards, index, places, match, found)
    columns |= _meanings(index, places, vectors[1])
    columns |= {
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
    return Evidence(places, features, trigger, match, index.card_class[places], found, intent)


def _standing(cosine: Matrix, places: NDArray[np.int64]) -> Matrix:
    """Return how many standard deviations above the catalogue's mean each place is (C,)."""
    return np.asarray(
        (cosine[places] - cosine.sum() / max(len(cosine), 1)) / ((cosine.std() if len(cosine) else 0.0) + 0.02),
        np.float32,
    )


def _meanings(index: Index, places: NDArray[np.int64], head: Matrix) -> dict[str, Matrix]:
    """Return how near the head's meaning (384,) comes to each card's class noun, and to its nearest tag, each (C,)."""
    classes = index.card_class[places]
    if not len(index.phrases):
        return {"class_meaning": np.zeros(len(places), np.float32), "tag_meaning": np.zeros(len(places), np.float32)}
    cosine = index.phrase_vectors32 @ head
    by_class = np.where(classes >= 0, cosine[np.maximum(classes, 0)], 0.0).astype(np.float32)
    by_tag, begin = np.zeros(len(places), np.float32), index.tag_start[places]
    sizes = index.tag_start[places + 1] - begin
    tagged = sizes > 0
    if tagged.any():
        source, starts = laid_end_to_end(begin[tagged], sizes[tagged])
        by_tag[tagged] = np.maximum.reduceat(np.maximum(cosine[index.tag_phrases[source]], -1.0), starts)
    return {"class_meaning": by_class, "tag_meaning": np.maximum(by_tag, by_class)}
