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

from ..errors import CheckinError
from .features import NAMES, ZONES, Evidence

Matrix = NDArray[np.float32]
MODEL = Path(__file__).with_name("model.json")
NONE_NAMES = (
    "none_logit", "best_cover", "best_dense", "best_dense_head", "noun_said", "noun_is_class", "unexplained", "trigger",
)  # fmt: skip
_TIED = 0.12  # weight of words below which two cards account for the same ones
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
    """Ask when a rival's log-odds distance to the leader plus ``lead_weight`` times its unexplained words is small.

    Rivals that account for the same words, head noun included, are as good as the leader whatever the retrieval scores
    say: their distance is multiplied by ``tie_shrink``.
    """

    lead_weight: float
    tie_shrink: float
    limit: float


@dataclass(frozen=True)
class Model:
    """The three fitted parts: which card, whether none fits, whether to ask."""

    card: Scorer
    none: Linear
    ask: AskRule


@functools.cache
def shipped_model() -> Model:
    """Return the model that ships with the package."""
    return read_model(json.loads(MODEL.read_text()))


def read_model(data: Mapping[str, Any]) -> Model:
    """Read model.json data; raise CheckinError when it was fitted for other features."""
    for part, names in (("card", NAMES), ("none", NONE_NAMES)):
        if tuple(data[part]["features"]) != names:
            raise CheckinError(f"model.json: {part} must be fitted for {', '.join(names)}; run bench/fit_checkin.py")
    return Model(Scorer(**_arrays(data["card"])), Linear(**_arrays(data["none"])), AskRule(**data["ask"]))


def _arrays(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in entry.items() if key != "features"}
    return {key: np.array(v, np.float32) if isinstance(v, list) else float(v) for key, v in values.items()}


def posterior(scores: Matrix) -> tuple[Matrix, float]:
    """Return (p (C,), p_none)."""
    top = max(float(scores.max(initial=0.0)), 0.0)
    weights = np.exp(scores - top)
    total = float(weights.sum()) + float(np.exp(-top))
    return np.asarray(weights / total, np.float32), float(np.exp(-top)) / total


def explained(evidence: Evidence) -> Matrix:
    """Return how much of each head and attribute term each card explains, times the term's weight: (T', C)."""
    kept = evidence.terms.zones < ZONES.index("scene")
    if not kept.any():
        return np.zeros((0, len(evidence.places)), np.float32)
    return np.asarray(evidence.match[kept].max(1) * evidence.terms.weights[kept, None], np.float32)


def scores(model: Model, evidence: Evidence) -> Matrix:
    """Return the score of every candidate (C,)."""
    return np.asarray(model.card(evidence.features) + TRIGGER_SCORE * evidence.trigger, np.float32)


def lead(evidence: Evidence, leader: int) -> Matrix:
    """Return how much more of what was said the leader explains than each candidate (C,), 0 for the leader.

    Words count by rarity; a stated base, kind or trigger counts like half a rare word.
    """
    said = explained(evidence)
    ahead = np.maximum(said[:, [leader]] - said, 0.0).sum(0) - np.maximum(said - said[:, [leader]], 0.0).sum(0)
    for column in (*(evidence.features[:, NAMES.index(name)] for name in ("family", "kind")), evidence.trigger):
        ahead = ahead + 0.5 * (column[leader] - column)
    return np.asarray(ahead, np.float32)


def distances(rule: AskRule, evidence: Evidence, p: Matrix) -> Matrix:
    """Return how far behind the leader every candidate is (C,): log(p_leader / p) + lead_weight * lead."""
    leader = int(p.argmax())
    ahead = lead(evidence, leader)
    gap = np.log(p[leader] / np.maximum(p, 1e-9))
    noun = np.maximum(evidence.features[:, NAMES.index("noun_any")], evidence.features[:, NAMES.index("noun_style")])
    is_tied = (ahead < _TIED) & (noun >= 0.5) & (noun[leader] >= 0.5)
    behind = np.where(is_tied, rule.tie_shrink, 1.0) * gap + rule.lead_weight * np.maximum(ahead, -0.2)
    behind[leader] = 0.0
    return np.asarray(behind, np.float32)


def fits_nothing(model: Model, evidence: Evidence, p: Matrix, none: float) -> bool:
    """Tell whether no card is meant. A card that is the thing that was named, word for word, always fits."""
    if not len(p):
        return True
    values = dict(zip(NONE_NAMES, none_features(evidence, p, none), strict=True))
    is_named = values["noun_is_class"] >= 0.9 and values["unexplained"] < _TIED
    return not is_named and float(model.none(np.array(list(values.values()), np.float32))) > 0


def none_features(evidence: Evidence, p: Matrix, none: float) -> Matrix:
    """Return the features of the abstain decision: how well the leader does, in absolute terms."""
    if not len(p):
        return np.array([6.0] + [0.0] * (len(NONE_NAMES) - 1), np.float32)
    leader = int(p.argmax())
    best = dict(zip(NAMES, evidence.features[leader], strict=True))
    head = np.flatnonzero(evidence.terms.zones == 0)
    missing = evidence.terms.weights[head] * (1 - evidence.match[head].max(1, initial=0.0)[:, leader])
    values = (
        float(np.clip(np.log((none + 1e-4) / (1 - none + 1e-4)), -6, 6)),
        best["head_any"],
        best["dense"],
        best["dense_head"],
        best["noun_any"],
        best["noun_class"],
        missing.max(initial=0.0),
        evidence.trigger[leader],
    )
    return np.array(values, np.float32)
