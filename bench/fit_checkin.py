"""Fit the numbers of personalq/checkin/model.json on the dev set. Needs scipy and scikit-learn; run by a builder.

    python -m bench.fit_checkin [--out personalq/checkin/model.json]

Training requests: the dev set over its whole catalogue, and over random sub-catalogues of 12 to 150 cards. A request
whose right cards were left out of a sub-catalogue is one that nothing fits; one of whose several right cards only one
was kept is no longer ambiguous. So the fit sees far more refusals, and other catalogue sizes, than the dev set has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from personalq.card import Card, parse_card
from personalq.checkin.encoder import Encoder, shared_encoder
from personalq.checkin.features import NAMES, Evidence, gather
from personalq.checkin.index import Index, build_index
from personalq.checkin.rank import (
    NONE_NAMES,
    TRIGGER_SCORE,
    AskRule,
    Linear,
    Model,
    distances,
    none_features,
    posterior,
    scores,
)

DATA = Path("tests/data")
SUB_WEIGHT = 0.7
L2 = 1e-3


class CachingEncoder(Encoder):
    """The shipped encoder, remembering what it has seen: sub-catalogues repeat their texts."""

    def __init__(self) -> None:
        self.inner, self.seen = shared_encoder(), dict[str, NDArray[np.float32]]()

    def is_word(self, word: str) -> bool:
        return self.inner.is_word(word)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = [t for t in dict.fromkeys(texts) if t not in self.seen]
        self.seen |= dict(zip(new, self.inner.encode(new), strict=True)) if new else {}
        return np.stack([self.seen[t] for t in texts]) if texts else np.zeros((0, 384), np.float32)


@dataclass(frozen=True)
class Example:
    """One request over one catalogue: its evidence, which candidates are right, and what should be decided."""

    request: int
    evidence: Evidence
    ids: list[str]
    right: NDArray[np.float64]
    wanted: str
    is_whole: bool


def read_data() -> tuple[list[Card], list[dict[str, Any]]]:
    """Read the dev catalogue and its requests."""
    cards = [parse_card(line, where="catalog")[0] for line in (DATA / "catalog_real.jsonl").read_text().splitlines()]
    requests = [json.loads(line) for line in (DATA / "requests_dev.jsonl").read_text().splitlines()]
    return cards, requests


def make_examples(n_subs: int, *, seed: int = 0) -> list[Example]:
    """Gather evidence for every request over the whole catalogue and over random sub-catalogues."""
    cards, requests = read_data()
    encoder, rng = CachingEncoder(), np.random.default_rng(seed)
    index = build_index(cards, encoder, digest="")
    gather_ = lambda i, some, ix, whole: _example(i, requests[i], some, ix, encoder, is_whole=whole)  # noqa: E731
    found = [gather_(i, cards, index, True) for i in range(len(requests))]
    place = {card.id: i for i, card in enumerate(cards)}
    for _ in range(n_subs):
        chosen = rng.choice(len(requests), 10, replace=False)
        keep = set(rng.choice(len(cards), int(rng.choice([12, 25, 60, 150])), replace=False).tolist())
        for i in chosen:
            keep = _keep_some(keep, [place[g] for g in requests[i]["gold"]], rng)
        some = [cards[i] for i in sorted(keep)]
        index = build_index(some, encoder, digest="")
        found += [gather_(int(i), some, index, False) for i in chosen]
    return found


def _keep_some(keep: set[int], right: list[int], rng: np.random.Generator) -> set[int]:
    """Leave out all right cards (1 in 4), all but one (1 in 3), or all but a few."""
    if not right:
        return keep
    draw = rng.random()
    n = 0 if draw < 0.25 else 1 if draw < 0.6 else int(rng.integers(1, min(len(right), 6) + 1))
    return (keep - set(right)) | set(rng.choice(right, n, replace=False).tolist())


def _example(
    i: int, request: dict[str, Any], cards: list[Card], index: Any, encoder: Encoder, *, is_whole: bool
) -> Example:
    evidence = gather(request["request"], cards, index, encoder)
    ids = [cards[p].id for p in evidence.places]
    gold = set(request["gold"]) & {card.id for card in cards}
    right = np.array([c in gold for c in ids], float)
    wanted = "abstain" if not gold else "clarify" if request["must_clarify"] and len(gold) > 1 else "select"
    return Example(i, evidence, ids, right, wanted, is_whole)


def fit(examples: list[Example]) -> dict[str, Any]:
    """Fit the three parts; return model.json data."""
    usable = [e for e in examples if e.wanted == "abstain" or e.right.any()]
    card = _fit_card(usable)
    scored = [(e, *posterior(card(e.evidence.features) + TRIGGER_SCORE * e.evidence.trigger)) for e in usable]
    none = _fit_logit(
        np.stack([none_features(e.evidence, p, n) for e, p, n in scored]),
        np.array([e.wanted == "abstain" for e, _, _ in scored]),
        _weights(usable),
    )
    ask = _fit_ask([(e, p) for e, p, _ in scored if e.wanted != "abstain"])
    parts = (("card", NAMES, card), ("none", NONE_NAMES, none))
    return {part: {"features": list(names), **_numbers(linear)} for part, names, linear in parts} | {
        "ask": ask.__dict__
    }


def _fit_ask(scored: list[tuple[Example, NDArray[np.float32]]]) -> AskRule:
    """Search the two numbers of the ask rule for the best weighted F1 of asking plus accuracy of selecting."""
    wanted = np.array([e.wanted == "clarify" for e, _ in scored])
    hit = np.array([e.right[int(p.argmax())] > 0 for e, p in scored])
    weights = _weights([e for e, _ in scored])
    best = (-1.0, AskRule(0.0, 0.0))
    for lead_weight in (0.0, 1.0, 2.0, 4.0, 6.0, 9.0):
        rule = AskRule(lead_weight, 0.0)
        nearest = np.array(
            [np.partition(distances(rule, e.evidence, p), 1)[1] if len(p) > 1 else 99.0 for e, p in scored]
        )
        for limit in np.arange(0.2, 8.0, 0.2):
            asked = nearest < limit
            f1 = 2 * weights[asked & wanted].sum() / (weights[asked].sum() + weights[wanted].sum() + 1e-9)
            selected = weights[~asked & ~wanted & hit].sum() / weights[~wanted].sum()
            best = max(best, (float(f1 + selected), AskRule(lead_weight, round(float(limit), 2))), key=lambda b: b[0])
    return best[1]


def _weights(examples: list[Example]) -> NDArray[np.float64]:
    return np.array([1.0 if e.is_whole else SUB_WEIGHT for e in examples])


def _numbers(linear: Linear) -> dict[str, Any]:
    arrays = {key: [round(float(v), 5) for v in getattr(linear, key)] for key in ("mean", "std", "weights")}
    return {**arrays, "bias": round(linear.bias, 5)}


def _fit_logit(x: NDArray[np.float32], y: NDArray[np.bool_], weights: NDArray[np.float64]) -> Linear:
    mean, std = x.mean(0), x.std(0) + 1e-3
    model = LogisticRegression(C=1.0, max_iter=500).fit((x - mean) / std, y, sample_weight=weights)
    return Linear(mean, std, model.coef_[0].astype(np.float32), float(model.intercept_[0]))


def _fit_card(examples: list[Example]) -> Linear:
    """Minimise the cross-entropy between the posterior and a target uniform over the right cards (or on none)."""
    lengths = np.array([len(e.right) for e in examples])
    owner = np.repeat(np.arange(len(examples)), lengths)
    starts = np.cumsum(lengths) - lengths
    x = np.concatenate([e.evidence.features for e in examples]).astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-3
    x = (x - mean) / std
    y = np.concatenate([e.right / max(e.right.sum(), 1) for e in examples])
    weight = _weights(examples)
    weight = weight / weight.sum()

    def loss(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        s = x @ w[:-1] + w[-1]
        top = np.maximum(np.maximum.reduceat(s, starts), 0)
        e = np.exp(s - top[owner])
        total = np.add.reduceat(e, starts) + np.exp(-top)
        slope = weight[owner] * (e / total[owner] - y)
        value = (weight * (np.log(total) + top - np.add.reduceat(y * s, starts))).sum() + L2 * (w[:-1] ** 2).sum()
        return float(value), np.append(x.T @ slope + 2 * L2 * w[:-1], slope.sum())

    w = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 150}).x
    return Linear(mean.astype(np.float32), std.astype(np.float32), w[:-1].astype(np.float32), float(w[-1]))


def decide(model: Model, evidence: Evidence) -> tuple[str, NDArray[np.float32]]:
    """Return the decision and the posterior: the rule that check-in applies."""
    p, none = posterior(scores(model, evidence))
    if float(model.none(none_features(evidence, p, none))) > 0:
        return "abstain", p
    is_open = len(p) > 1 and np.partition(distances(model.ask, evidence, p), 1)[1] < model.ask.limit
    return ("clarify" if is_open else "select"), p


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("personalq/checkin/model.json"))
@click.option("--subs", default=64, help="random sub-catalogues, ten requests each")
def main(out: Path, subs: int) -> None:
    """Fit on all of the dev set and write the numbers; bench.ask reports the cross-validated ones."""
    data = fit(make_examples(subs))
    out.write_text(json.dumps(data, indent=1) + "\n")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
