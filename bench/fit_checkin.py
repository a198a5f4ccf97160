"""Fit the numbers of personalq/checkin/ranking/model.json on the dev set. Needs torch and scikit-learn; run by a builder.

    python -m bench.fit_checkin [--out personalq/checkin/ranking/model.json]

Fitted on the dev set and on the hand-written requests of bench/requests, over whole catalogues and random parts of
them (bench/_requests.py). bench/ask.py reports what a model fitted without a request decides about it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from personalq.checkin.ranking.features import NAMES, Evidence
from personalq.checkin.ranking.posterior import (
    RIVAL_NAMES,
    TRIGGER_SCORE,
    AskRule,
    Linear,
    Model,
    Scorer,
    fits_nothing,
    posterior,
    rival_features,
    rivals,
    scores,
)

from ._requests import Example, make_examples

SUB_WEIGHT = 0.5
_PAIRS = 12  # candidates of one example that are compared with the leader
_BAGS, _HIDDEN = 5, 6
_REFUSED = 0.12  # share of people's requests that nothing fits
L2 = 8e-3


def fit(examples: list[Example]) -> dict[str, Any]:
    """Fit the three parts; return model.json data.

    The card scorer is the mean of _BAGS scorers, each fitted without one part of the requests. What is fitted on top
    of its posterior (none, rival) sees every request with the scorer that had not seen it: else it would trust it.
    """
    usable = [e for e in examples if e.wanted == "abstain" or e.right.any()]
    texts = sorted({e.request.text for e in usable})
    bag_of = dict(zip(texts, np.random.default_rng(7).permutation(len(texts)) % _BAGS, strict=True))
    spread = _spread(usable)
    bags = [_fit_card([e for e in usable if bag_of[e.request.text] != bag], spread, seed=bag) for bag in range(_BAGS)]
    card = _mean_scorer(bags)
    unseen = [bags[bag_of[e.request.text]] for e in usable]
    scored = [
        (e, *posterior(one(e.evidence.features) + TRIGGER_SCORE * e.evidence.trigger))
        for e, one in zip(usable, unseen, strict=True)
    ]
    rival, limit = _fit_ask([(e, p) for e, p, _ in scored if e.wanted != "abstain"])
    parts = (("card", NAMES, card), ("rival", RIVAL_NAMES, rival))
    return {part: {"features": list(names), **_numbers(linear)} for part, names, linear in parts} | {
        "none_limit": _fit_none(scored),
        "ask_limit": limit,
    }


def _spread(examples: list[Example]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    features = np.concatenate([e.evidence.features for e in examples])
    return features.mean(0), features.std(0) + 1e-2


def _mean_scorer(bags: list[Scorer]) -> Scorer:
    """Return one scorer that scores as the mean of several: their hidden units side by side."""
    return Scorer(
        bags[0].mean,
        bags[0].std,
        np.mean([b.weights for b in bags], 0),
        float(np.mean([b.bias for b in bags])),
        np.concatenate([b.hidden_weights for b in bags]),
        np.concatenate([b.hidden_bias for b in bags]),
        np.concatenate([b.out_weights for b in bags]) / len(bags),
    )


def _fit_none(scored: list[tuple[Example, NDArray[np.float32], float]]) -> float:
    """Return how probable "none" must be to refuse: the best F1 of refusing plus share of right leaders kept.

    The fit has many refusals, people have few: here they weigh as much as people's, and whole catalogues more.
    """
    none = np.array([n for _, _, n in scored])
    weights = np.array([1.0 if e.is_whole else 0.2 for e, _, _ in scored])
    wanted = np.array([e.wanted == "abstain" for e, _, _ in scored])
    weights[wanted] *= _REFUSED / (1 - _REFUSED) * weights[~wanted].sum() / weights[wanted].sum()
    right = np.array([len(p) > 0 and e.right[int(p.argmax())] > 0 for e, p, _ in scored])
    gains = []
    for limit in (limits := np.arange(0.2, 0.81, 0.025)):
        said = none > limit
        f1 = 2 * weights[said & wanted].sum() / (weights[said].sum() + weights[wanted].sum())
        gains.append(f1 + weights[~said & right].sum() / weights[right].sum())
    return _best(limits, gains)


def _best(values: NDArray[np.float64], gains: list[float]) -> float:
    """Return the value with the best gain, its neighbours' gains counted too: one request must not decide."""
    smooth = np.convolve(np.pad(gains, 3, mode="edge"), np.ones(7) / 7, mode="valid")
    return round(float(values[int(smooth.argmax())]), 3)


def _fit_ask(scored: list[tuple[Example, NDArray[np.float32]]]) -> tuple[Linear, float]:
    """Fit who is a rival on pairs with a right leader, then the limit with the best F1 of asking plus selecting."""
    right = [(e, p) for e, p in scored if len(p) > 1 and e.right[int(p.argmax())] > 0]
    x, y, w = [], [], []
    for e, p in right:
        near = [c for c in np.argsort(-p, kind="stable")[1:_PAIRS] if c != int(p.argmax())]
        x.append(rival_features(e.evidence, p)[near])
        y.append(e.right[near] > 0)
        w.append(np.full(len(near), (1.0 if e.is_whole else SUB_WEIGHT)))
    rival = _fit_logit(np.concatenate(x), np.concatenate(y), np.concatenate(w))
    rule = AskRule(rival, 0.5)
    second = np.array([np.partition(rivals(rule, e.evidence, p), -2)[-2] if len(p) > 1 else 0.0 for e, p in scored])
    wanted = np.array([e.wanted == "clarify" for e, _ in scored])
    hit = np.array([e.right[int(p.argmax())] > 0 for e, p in scored])
    weights = _weights([e for e, _ in scored])
    gains = []
    for limit in (limits := np.arange(0.2, 0.81, 0.025)):
        asked = second >= limit
        f1 = 2 * weights[asked & wanted].sum() / (weights[asked].sum() + weights[wanted].sum() + 1e-9)
        selected = weights[~asked & ~wanted & hit].sum() / weights[~wanted].sum()
        gains.append(f1 + selected)
    return rival, _best(limits, gains)


def _weights(examples: list[Example]) -> NDArray[np.float64]:
    return np.array([1.0 if e.is_whole else SUB_WEIGHT for e in examples])


def _numbers(part: Linear | Scorer) -> dict[str, Any]:
    return {key: np.round(value, 4).tolist() for key, value in part.__dict__.items()}


def _fit_logit(x: NDArray[np.float32], y: NDArray[np.bool_], weights: NDArray[np.float64]) -> Linear:
    mean, std = x.mean(0), x.std(0) + 1e-3
    model = LogisticRegression(C=0.3, max_iter=500).fit((x - mean) / std, y, sample_weight=weights)
    return Linear(mean, std, model.coef_[0].astype(np.float32), float(model.intercept_[0]))


def _fit_card(
    examples: list[Example], spread: tuple[NDArray[np.float32], NDArray[np.float32]], *, seed: int, steps: int = 200
) -> Scorer:
    """Minimise the cross-entropy between the posterior and a target uniform over the right cards (or on none)."""
    torch.manual_seed(seed)
    lengths = np.array([len(e.right) for e in examples])
    owner = torch.from_numpy(np.repeat(np.arange(len(examples)), lengths))
    features = np.concatenate([e.evidence.features for e in examples])
    mean, std = spread
    z = torch.from_numpy((features - mean) / std).clamp(-6, 6)
    target = torch.from_numpy(np.concatenate([e.right / max(e.right.sum(), 1) for e in examples]).astype(np.float32))
    trigger = TRIGGER_SCORE * torch.from_numpy(np.concatenate([e.evidence.trigger for e in examples]))
    weight = torch.from_numpy(_weights(examples).astype(np.float32))
    weight = weight / weight.sum()
    hidden, out, linear = (torch.nn.Linear(*size) for size in ((z.shape[1], _HIDDEN), (_HIDDEN, 1), (z.shape[1], 1)))
    for parameter, value in ((out.weight, 0.0), (out.bias, 0.0), (linear.weight, 0.0), (linear.bias, -5.0)):
        torch.nn.init.constant_(parameter, value)
    optimizer = torch.optim.Adam([p for m in (hidden, out, linear) for p in m.parameters()], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    none = torch.zeros(len(examples))
    for _ in range(steps):
        score = (linear(z) + out(torch.tanh(hidden(z)))).squeeze(1) + trigger
        top = none.scatter_reduce(0, owner, score.detach(), "amax")  # none's own score is 0
        total = torch.log(none.index_add(0, owner, torch.exp(score - top[owner])) + torch.exp(-top)) + top
        loss = (weight * (total - none.index_add(0, owner, target * score))).sum()
        loss = loss + L2 * (0.3 * (hidden.weight**2).sum() + (out.weight**2).sum() + (linear.weight**2).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    array = lambda t: t.detach().numpy().copy()  # noqa: E731
    bias = float(array(linear.bias)[0] + array(out.bias)[0])
    return Scorer(
        mean, std, array(linear.weight[0]), bias, array(hidden.weight), array(hidden.bias), array(out.weight[0])
    )


def decide(model: Model, evidence: Evidence) -> tuple[str, NDArray[np.float32]]:
    """Return the decision and the posterior: the rule that check-in applies."""
    p, none = posterior(scores(model, evidence))
    if fits_nothing(model, evidence, p, none):
        return "abstain", p
    is_open = len(p) > 1 and np.partition(rivals(model.ask, evidence, p), -2)[-2] >= model.ask.limit
    return ("clarify" if is_open else "select"), p


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("personalq/checkin/ranking/model.json"))
@click.option("--subs", default=40, help="random parts of the catalogues")
@click.option("--made", default=200, help="requests made from cards")
def main(out: Path, subs: int, made: int) -> None:
    """Fit on all of the dev set and write the numbers; bench.ask reports the cross-validated ones."""
    data = fit(examples := make_examples(subs, made))
    out.write_text(json.dumps(data, indent=1) + "\n")
    click.echo(f"wrote {out}")
    click.echo(json.dumps({"bench": "fit_checkin", "examples": len(examples), "out": str(out)}))


if __name__ == "__main__":
    main()
