"""Fit the numbers of personalq/checkin/model.json on the dev set. Needs torch and scikit-learn; run by a builder.

    python -m bench.fit_checkin [--out personalq/checkin/model.json]

Training requests: the dev set over its whole catalogue, and over random sub-catalogues of 12 to 150 cards. A request
whose right cards were left out of a sub-catalogue is one that nothing fits; one of whose several right cards only one
was kept is no longer ambiguous. So the fit sees far more refusals, and other catalogue sizes, than the dev set has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from personalq.card import Card, parse_card
from personalq.checkin.encoder import Encoder, shared_encoder
from personalq.checkin.features import NAMES, Evidence, gather
from personalq.checkin.index import build_index
from personalq.checkin.intent import parse_request
from personalq.checkin.rank import (
    NONE_NAMES,
    TRIGGER_SCORE,
    AskRule,
    Linear,
    Model,
    Scorer,
    distances,
    fits_nothing,
    none_features,
    posterior,
    scores,
)
from personalq.checkin.words import terms

DATA = Path("tests/data")
SUB_WEIGHT = 0.7
L2 = 6e-3


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


def made_examples(n: int, *, seed: int = 1) -> list[Example]:
    """Make requests from cards: 'my <noun> <scene>', 'the <tag> <noun> <scene>'; the words themselves say who is right.

    One in three has its right cards left out, so that nothing fits it although the scene may resemble something.
    """
    cards, requests = read_data()
    encoder, rng = CachingEncoder(), np.random.default_rng(seed)
    scenes = [intent.scene for request in requests if (intent := parse_request(request["request"])).scene]
    facets = [frozenset(terms(f"{c.name} {c.class_noun} {' '.join(c.tags)}")) for c in cards]
    found = []
    for number in range(n):
        subject = int(rng.integers(len(cards)))
        text, needed = _made_request(cards[subject], str(rng.choice(scenes)), rng)
        right = [i for i, facet in enumerate(facets) if needed <= facet]
        keep = set(rng.choice(len(cards), int(rng.choice([14, 40, 120, 400])), replace=False).tolist())
        keep = keep - set(right) if number % 3 == 0 else keep | set(right[:6]) if len(right) > 6 else keep | set(right)
        some = [cards[i] for i in sorted(keep)]
        gold = {cards[i].id for i in right} & {c.id for c in some}
        request = {"request": text, "gold": sorted(gold), "must_clarify": len(gold) > 1}
        example = _example(-1 - number, request, some, build_index(some, encoder, digest=""), encoder, is_whole=False)
        found.append(example)
    return found


def _made_request(card: Card, scene: str, rng: np.random.Generator) -> tuple[str, frozenset[str]]:
    noun = card.class_noun if card.class_noun not in ("", "style") else card.name.replace("_", " ")
    tags = [tag for tag in card.tags if not set(terms(tag)) & set(terms(noun)) and len(tag) < 20]
    tag = str(rng.choice(tags)) if tags and rng.random() < 0.5 else ""
    needed = frozenset(terms(f"{tag} {noun}"))
    if card.class_noun == "style":
        return str(rng.choice([f"{scene} in {noun} style", f"{noun} style, {scene}", f"{noun} of {scene}"])), frozenset(
            terms(noun)
        )
    start = str(rng.choice(["my", "the", "a photo of my", "a", "put the", "draw my"]))
    return f"{start} {tag} {noun} {scene}".replace("  ", " "), needed


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
    best = (-1.0, AskRule(0.0, 1.0, 0.0))
    for lead_weight, tie_shrink in product((0.0, 1.0, 2.0, 4.0, 6.0), (1.0, 0.6, 0.4, 0.25)):
        rule = AskRule(lead_weight, tie_shrink, 0.0)
        nearest = np.array(
            [np.partition(distances(rule, e.evidence, p), 1)[1] if len(p) > 1 else 99.0 for e, p in scored]
        )
        for limit in np.arange(0.2, 6.0, 0.2):
            asked = nearest < limit
            f1 = 2 * weights[asked & wanted].sum() / (weights[asked].sum() + weights[wanted].sum() + 1e-9)
            selected = weights[~asked & ~wanted & hit].sum() / weights[~wanted].sum()
            best = max(best, (float(f1 + selected), replace(rule, limit=round(float(limit), 2))), key=lambda b: b[0])
    return best[1]


def _weights(examples: list[Example]) -> NDArray[np.float64]:
    return np.array([1.0 if e.is_whole else SUB_WEIGHT for e in examples])


def _numbers(part: Linear | Scorer) -> dict[str, Any]:
    return {key: np.round(value, 4).tolist() for key, value in part.__dict__.items()}


def _fit_logit(x: NDArray[np.float32], y: NDArray[np.bool_], weights: NDArray[np.float64]) -> Linear:
    mean, std = x.mean(0), x.std(0) + 1e-3
    model = LogisticRegression(C=1.0, max_iter=500).fit((x - mean) / std, y, sample_weight=weights)
    return Linear(mean, std, model.coef_[0].astype(np.float32), float(model.intercept_[0]))


def _fit_card(examples: list[Example], *, n_hidden: int = 16, steps: int = 250) -> Scorer:
    """Minimise the cross-entropy between the posterior and a target uniform over the right cards (or on none)."""
    torch.manual_seed(0)
    lengths = np.array([len(e.right) for e in examples])
    owner = torch.from_numpy(np.repeat(np.arange(len(examples)), lengths))
    features = np.concatenate([e.evidence.features for e in examples])
    mean, std = features.mean(0), features.std(0) + 1e-2
    z = torch.from_numpy((features - mean) / std).clamp(-6, 6)
    target = torch.from_numpy(np.concatenate([e.right / max(e.right.sum(), 1) for e in examples]).astype(np.float32))
    trigger = TRIGGER_SCORE * torch.from_numpy(np.concatenate([e.evidence.trigger for e in examples]))
    weight = torch.from_numpy(_weights(examples).astype(np.float32))
    weight = weight / weight.sum()
    hidden, out, linear = (torch.nn.Linear(*size) for size in ((z.shape[1], n_hidden), (n_hidden, 1), (z.shape[1], 1)))
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
    is_open = len(p) > 1 and np.partition(distances(model.ask, evidence, p), 1)[1] < model.ask.limit
    return ("clarify" if is_open else "select"), p


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("personalq/checkin/model.json"))
@click.option("--subs", default=64, help="random sub-catalogues, ten requests each")
@click.option("--made", default=240, help="requests made from cards")
def main(out: Path, subs: int, made: int) -> None:
    """Fit on all of the dev set and write the numbers; bench.ask reports the cross-validated ones."""
    data = fit(make_examples(subs) + made_examples(made))
    out.write_text(json.dumps(data, indent=1) + "\n")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
