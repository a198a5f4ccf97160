"""Turn evidence into probabilities over {each candidate, none}: a conditional logit with plain numbers.

z_i = clip((x_i - mean) / std),   score_i = w . z_i + v . tanh(U z_i + c) + b,
p_i = exp(score_i) / (1 + sum_j exp(score_j)),   p_none = the rest.
Sixteen tanh units are there because facets depend on each other: a missing head noun is fatal for a thing and nothing
for a style. The numbers are in model.json, fitted by ``bench/fit_checkin.py``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckinError
from ..indexing.index import FIELDS
from ..language.request_terms import ZONES
from .features import NAMES, Evidence
from .judge import Judgement

Matrix = NDArray[np.float32]
MODEL = Path(__file__).with_name("model.json")
RIVAL_NAMES = (
    "gap", "ahead", "behind", "gap_untied", "tied", "tied_noun", "dense_ahead", "name_ahead", "cover_ahead", "source_ahead",
    "scene_ahead", "head_dense_ahead", "stated_ahead", "same_class", "same_style", "same_trigger", "leader", "noun_said",
)  # fmt: skip
_TIED = 0.12  # weight of words below which two cards account for the same ones
_PER_POINT, _NEUTRAL = 1.2, 1.0  # of a model's judgement, 0 to 3
TRIGGER_SCORE = 4.0  # a made-up trigger that was said decides: its cards gain this, the others lose it


@dataclass(frozen=True)
class Linear:
    """A linear score over named features."""

    mean: Matrix
    std: Matrix
    weights: Matrix
    bias: float

    def __call__(self, features: Matrix) -> Matrix:
        """Return scores for features (..., F)."""
        return np.asarray(((features - self.mean) / self.std) @ self.weights + self.bias, np.float32)


@dataclass(frozen=True)
class Scorer:
    """The candidates' score: a linear part and H tanh units over named features."""

    mean: Matrix
    std: Matrix
    weights: Matrix
    bias: float
    hidden_weights: Matrix
    hidden_bias: Matrix
    out_weights: Matrix

    def __call__(self, features: Matrix) -> Matrix:
        """Return scores for features (..., F); ``hidden_weights`` is (H, F)."""
        z = np.clip((features - self.mean) / self.std, -6, 6)
        hidden = np.tanh(z @ self.hidden_weights.T + self.hidden_bias)
        return np.asarray(z @ self.weights + hidden @ self.out_weights + self.bias, np.float32)


@dataclass(frozen=True)
class AskRule:
    """Tells how probably a rival is meant as much as the leader; ask when one reaches ``limit``."""

    rival: Linear
    limit: float


@dataclass(frozen=True)
class Model:
    """The fitted parts: which card, how probable "none" must be to refuse, and whether to ask."""

    card: Scorer
    none_limit: float
    ask: AskRule


@functools.cache
def shipped_model() -> Model:
    """Return the model that ships with the package."""
    return read_model(json.loads(MODEL.read_text()))


def read_model(data: Mapping[str, Any]) -> Model:
    """Read model.json data; raise CheckinError when it was fitted for other features."""
    for part, names in (("card", NAMES), ("rival", RIVAL_NAMES)):
        if tuple(data[part]["features"]) != names:
            raise CheckinError(f"model.json: {part} must be fitted for {', '.join(names)}; run bench/fit_checkin.py")
    ask = AskRule(Linear(**_arrays(data["rival"])), float(data["ask_limit"]))
    return Model(Scorer(**_arrays(data["card"])), float(data["none_limit"]), ask)


def _arrays(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in entry.items() if key != "features"}
    return {key: np.array(v, np.float32) if isinstance(v, list) else float(v) for key, v in values.items()}


def posterior(scores: Matrix) -> tuple[Matrix, float]:
    """Return (p (C,), p_none)."""
    top = max(float(scores.max(initial=0.0)), 0.0)
    weights = np.exp(scores - top)
    total = float(weights.sum()) + float(np.exp(-top))
    return np.asarray(weights / total, np.float32), float(np.exp(-top)) / total


def with_judgement(p: Matrix, none: float, judgement: Judgement) -> tuple[Matrix, float]:
    """Return (p, p_none) after a model's judgement: Bayes with the likelihoods below, hand-set.

    A point of score multiplies a candidate's odds by e^1.2; what the model left out keeps its own. The verdict "none"
    multiplies the odds of none by e^2, any other by e^-1.
    """
    change = np.array([_PER_POINT * (judgement.scores.get(c, _NEUTRAL) - _NEUTRAL) for c in range(len(p))])
    weights = np.maximum(p, 1e-9) * np.exp(change)
    none_weight = max(none, 1e-9) * np.exp(2.0 if judgement.verdict == "none" else -1.0)
    total = float(weights.sum() + none_weight)
    return np.asarray(weights / total, np.float32), float(none_weight / total)


def explained(evidence: Evidence) -> Matrix:
    """Return how much of each head and attribute term each card explains, times the term's weight: (T', C).

    Who made a card counts wherever it is said: 'a castle in LEGO, by lordjia'.
    """
    by_whom = evidence.match[:, FIELDS.index("source")]
    is_scene = (evidence.terms.zones == ZONES.index("scene"))[:, None]
    found = np.where(is_scene, by_whom, evidence.match.max(1, initial=0.0))
    return np.asarray(found * evidence.terms.weights[:, None], np.float32)


def scores(model: Model, evidence: Evidence) -> Matrix:
    """Return the score of every candidate (C,)."""
    return np.asarray(model.card(evidence.features) + TRIGGER_SCORE * evidence.trigger, np.float32)


def rivals(rule: AskRule, evidence: Evidence, p: Matrix) -> Matrix:
    """Return how probably each candidate is meant as much as the leader (C,); the leader's own place has 1."""
    found = 1 / (1 + np.exp(-np.clip(rule.rival(rival_features(evidence, p)), -30, 30)))
    found[int(p.argmax())] = 1.0
    return np.asarray(found, np.float32)


def rival_features(evidence: Evidence, p: Matrix) -> Matrix:
    """Return what tells each candidate from the leader (C, len(RIVAL_NAMES)).

    ``ahead`` is the weight of the words that only the leader accounts for, ``behind`` of those that only the other
    does. Cards that account for the same words are tied, whatever the retrieval scores say.
    """
    leader = int(p.argmax())
    column = {name: evidence.features[:, i] for i, name in enumerate(NAMES)}
    said = explained(evidence)
    ahead = np.maximum(said[:, [leader]] - said, 0.0).sum(0)
    behind = np.maximum(said - said[:, [leader]], 0.0).sum(0)
    gap = np.clip(np.log(p[leader] / np.maximum(p, 1e-9)), 0.0, 8.0)
    noun = np.maximum(column["noun_any"], column["noun_style"])
    tied = (ahead < _TIED).astype(np.float32)
    less = {name: values[leader] - values for name, values in column.items()}
    columns = {
        "gap": gap,
        "ahead": ahead,
        "behind": behind,
        "gap_untied": gap * (1 - tied),
        "tied": tied,
        "tied_noun": tied * np.minimum(noun, noun[leader]),
        "dense_ahead": less["dense"],
        "name_ahead": less["name_weight"],
        "cover_ahead": less["name_cover"],
        "source_ahead": less["source"],
        "scene_ahead": less["scene_any"],
        "head_dense_ahead": less["dense_head"],
        "stated_ahead": less["family"] + less["kind"],
        "same_class": (evidence.classes == evidence.classes[leader]).astype(np.float32),
        "same_style": (column["is_style"] == column["is_style"][leader]).astype(np.float32),
        "same_trigger": evidence.trigger[leader] * (evidence.trigger == evidence.trigger[leader]),
        "leader": np.full(len(p), p[leader]),
        "noun_said": np.full(len(p), noun[leader]),
    }
    return np.stack([columns[name] for name in RIVAL_NAMES], axis=1).astype(np.float32)


def fits_nothing(model: Model, evidence: Evidence, p: Matrix, none: float) -> bool:
    """Tell whether no card is meant. A card that is the thing that was named, word for word, always fits."""
    return not len(p) or (none > model.none_limit and not _is_named(evidence, int(p.argmax())))


def _is_named(evidence: Evidence, leader: int) -> bool:
    head = np.flatnonzero(evidence.terms.zones == 0)
    missing = evidence.terms.weights[head] * (1 - evidence.match[head].max(1, initial=0.0)[:, leader])
    is_class = evidence.features[leader, NAMES.index("noun_class")] >= 0.9
    return bool(is_class and missing.max(initial=0.0) < _TIED)
