"""Does Check-in find the right checkpoint, ask when it should, and refuse when nothing fits?

    python -m bench.ask [--folds 5] [--subs 40] [--made 200] [--sizes 400,75000]

Every dev request is decided by a model fitted without it (5 folds over requests). Prints a table, then one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from personalq.checkin import Checkin, Decision
from personalq.checkin.encoder.composed import compose, token_rows
from personalq.checkin.encoder.minilm import WIDTH, shared_encoder
from personalq.checkin.indexing.bm25 import build_bm25
from personalq.checkin.indexing.build import card_text, documents
from personalq.checkin.language.words import terms
from personalq.checkin.ranking.posterior import read_model
from personalq.repository import Repository

from ._requests import DATA, make_examples, read_data
from ._scale import measure
from .fit_checkin import fit


@dataclass(frozen=True)
class Row:
    """One dev request, what was decided, and what was decided after its answer (None when it was not asked)."""

    request: dict[str, Any]
    decision: Decision
    after: Decision | None

    @property
    def wanted(self) -> str:
        """The right decision."""
        return "abstain" if not self.request["gold"] else "clarify" if self.request["must_clarify"] else "select"

    @property
    def is_top1(self) -> bool:
        """Whether the most probable candidate is a right one."""
        found = self.decision.candidates
        return bool(found) and found[0].id in self.request["gold"]


def cross_validate(folds: int, subs: int, made: int) -> tuple[list[Row], list[Row]]:
    """Decide every dev request with a model that has not seen it; and again over composed vectors, as a large catalogue."""
    requests = read_data()[1]
    examples = make_examples(subs, made)
    fold_of = np.random.default_rng(0).permutation(len(requests)) % folds
    rows: dict[int, Row] = {}
    composed_rows: dict[int, Row] = {}
    composed = composed_vectors()
    with tempfile.TemporaryDirectory() as folder:
        repository = Repository.open(Path(folder) / "catalog", create=True)
        repository.add_cards(DATA / "catalog_real.jsonl")
        for fold in range(folds):
            held_out = {requests[i]["request"] for i in np.flatnonzero(fold_of == fold)}
            model = read_model(fit([e for e in examples if e.request.text not in held_out]))
            checkin, large = Checkin(repository, model=model), Checkin(repository, model=model)
            large.index = dataclasses.replace(large.index, vectors=composed)
            for i in np.flatnonzero(fold_of == fold):
                rows[int(i)] = _decide(checkin, requests[i])
                composed_rows[int(i)] = _decide(large, requests[i])
    return tuple([found[i] for i in range(len(requests))] for found in (rows, composed_rows))


def composed_vectors(folds: int = 4) -> NDArray[np.float16]:
    """Return the real catalogue's vectors as a large one would have them; no card is in the sample its map is fitted on.

    The sample has 300 cards here and 2000 in a catalogue large enough, so this loses more than such a one does.
    """
    texts = [card_text(card) for card in sorted(read_data()[0], key=lambda card: card.id)]
    fold_of = np.random.default_rng(1).permutation(len(texts)) % folds
    found = np.zeros((len(texts), WIDTH), np.float16)
    for fold in range(folds):
        known, held_out = (np.flatnonzero(np.equal(fold_of, fold) == is_out) for is_out in (False, True))
        rows = token_rows([texts[i] for i in known], shared_encoder())
        composer = compose(rows, shared_encoder(), out=np.zeros((len(known), WIDTH), np.float16))
        composer.fill(found, held_out, token_rows([texts[i] for i in held_out], shared_encoder()), shared_encoder())
    return found


def composed_recall(shown: int = 60, best: int = 10) -> float:
    """Return how many of the cards whose own vectors are nearest to a dev request are near it when composed."""
    cards, requests = read_data()
    asked = shared_encoder().encode([r["request"] for r in requests])
    whole = shared_encoder().encode([card_text(card) for card in sorted(cards, key=lambda card: card.id)])
    nearest, composed = (
        np.argsort(-(asked @ vectors.T), axis=1, kind="stable")[:, :n]
        for vectors, n in ((whole, best), (composed_vectors().astype(np.float32), shown))
    )
    return _mean([i in near for wanted, near in zip(nearest, composed, strict=True) for i in wanted])


def _decide(checkin: Checkin, request: dict[str, Any]) -> Row:
    checkin.ask(request["request"])  # warm: the milliseconds are of the second time
    decision = checkin.ask(request["request"])
    asked = decision.decision == "clarify" and request["answer"]
    return Row(request, decision, checkin.ask(request["request"], [request["answer"]]) if asked else None)


def f1(rows: Sequence[Row], outcome: str) -> float:
    """Return the F1 of one outcome."""
    hit = sum(r.decision.decision == outcome == r.wanted for r in rows)
    said = sum(r.decision.decision == outcome for r in rows) + sum(r.wanted == outcome for r in rows)
    return 2 * hit / said if said else 0.0


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return the metrics of a set of rows; accuracies over the rows they are defined on."""
    clear = [r for r in rows if r.wanted == "select"]
    open_ = [r for r in rows if r.wanted == "clarify"]
    milliseconds = [r.decision.milliseconds for r in rows]
    after = [r.after or r.decision for r in open_]
    return {
        "n": len(rows),
        "top1": _mean([r.is_top1 for r in clear]),
        "selected_right": _mean([r.decision.checkpoint in r.request["gold"] for r in clear]),
        "ask_f1": f1(rows, "clarify"),
        "abstain_f1": f1(rows, "abstain"),
        "right_after_answer": _mean(
            [d.checkpoint == r.request["gold_after_answer"] for r, d in zip(open_, after, strict=True)]
        ),
        "questions_per_100": 100 * _mean([r.decision.decision == "clarify" for r in rows]),
        "p50_ms": float(np.percentile(milliseconds, 50)) if rows else 0.0,
        "p95_ms": float(np.percentile(milliseconds, 95)) if rows else 0.0,
    }


def _mean(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else 0.0


def baselines() -> dict[str, float]:
    """Return the top-1 of BM25, of dense vectors and of their reciprocal-rank fusion on the unambiguous requests."""
    cards, requests = read_data()
    clear = [r for r in requests if r["gold"] and not r["must_clarify"]]
    texts = documents(cards)
    vocabulary = {t: i for i, t in enumerate(sorted({t for text in texts for t in text}))}
    bm25 = build_bm25([[vocabulary[t] for t in text] for text in texts], len(vocabulary))
    vectors = shared_encoder().encode([f"{c.name}. {c.class_noun}. {c.description}" for c in cards])
    lexical = [bm25.scores([vocabulary[t] for t in terms(r["request"]) if t in vocabulary]) for r in clear]
    dense = list(shared_encoder().encode([r["request"] for r in clear]) @ vectors.T)
    rank: Callable[[Any], Any] = lambda s: np.argsort(np.argsort(-s, kind="stable"))  # noqa: E731
    fused = [1 / (61 + rank(a)) + 1 / (61 + rank(b)) for a, b in zip(lexical, dense, strict=True)]
    return {
        name: _mean([cards[int(s.argmax())].id in r["gold"] for r, s in zip(clear, score, strict=True)])
        for name, score in (("bm25", lexical), ("dense", dense), ("rrf", fused))
    }


def table(rows: Sequence[Row], total: dict[str, float]) -> str:
    """Return the per-kind table as text."""
    keys = list(total)
    lines = ["kind          " + " ".join(f"{k[:11]:>11}" for k in keys)]
    kinds = list(dict.fromkeys(r.request["kind"] for r in rows))
    parts = [(kind, summary([r for r in rows if r.request["kind"] == kind])) for kind in kinds]
    english = summary([r for r in rows if r.request["kind"] != "non_english"])
    for name, values in (*parts, ("English only", english), ("all", total)):
        lines.append(f"{name:<14}" + " ".join(f"{values[k]:>11.3g}" for k in keys))
    return "\n".join(lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """Return one line per request that was decided wrongly."""
    wrong = [r for r in rows if r.decision.decision != r.wanted or (r.wanted == "select" and not r.is_top1)]
    return [f"{r.wanted:>8} -> {r.decision.decision:<8} {r.request['request'][:90]}" for r in wrong]


@click.command()
@click.option("--folds", default=5)
@click.option("--subs", default=40, help="random parts of catalogues to fit on")
@click.option("--made", default=200, help="requests made from cards to fit on")
@click.option("--sizes", default="400", help="catalogue sizes to time, such as 400,75000 (the large one takes minutes)")
@click.option("--show-failures", is_flag=True)
def main(folds: int, subs: int, made: int, sizes: str, show_failures: bool) -> None:
    """Cross-validate Check-in on the dev set, and time it over made-up catalogues."""
    started = time.perf_counter()
    rows, composed_rows = cross_validate(folds, subs, made)
    total, simple, large = summary(rows), baselines(), summary(composed_rows)
    speed = [measure(int(size)) for size in sizes.split(",") if size]
    click.echo(table(rows, total))
    click.echo("top-1 of " + ", ".join(f"{name} {value:.3f}" for name, value in simple.items()))
    keys = ("top1", "selected_right", "ask_f1", "abstain_f1", "right_after_answer")
    recall = composed_recall()
    click.echo(f"composed vectors: {', '.join(f'{k} {large[k]:.3f}' for k in keys)}; 10 nearest among 60: {recall:.3f}")
    for row in speed:
        click.echo(", ".join(f"{key} {value}" for key, value in row.items()))
    for line in failures(rows) if show_failures else ():
        click.echo(line)
    kinds = dict.fromkeys(r.request["kind"] for r in rows)
    result = {
        "bench": "ask",
        **total,
        "english": summary([r for r in rows if r.request["kind"] != "non_english"]),
        "baselines_top1": simple,
        "composed": {**large, "recall": recall},
        "speed": speed,
        "rows": [{"kind": kind, **summary([r for r in rows if r.request["kind"] == kind])} for kind in kinds],
        "folds": folds,
        "seconds": round(time.perf_counter() - started, 1),
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
