"""Attached beside merged, at the same bits, over the same prompts and seeds: what `bench quality --forms` measures.

A base is calibrated three times: over all its adapters ('in'), and over each half of them, so that every adapter is also
drawn on integers and ranges that never saw it ('out'). Full fine-tunes are attached at two ranks, by singular values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench._quality_report import METRICS, Row
from bench.intervals import bootstrap
from personalq.repository.atomic import write_atomic

BASE = "toyworld"
RANKS = (16, 64)  # at which fine-tunes are attached
SEEN = ("in", "out")


@dataclass(frozen=True)
class Forms:
    """What is measured. work: where copies of the repository are made; policies: 'taq-w8a8', of the base and of merged ones;
    samples: of a base's calibration; correct: rank of the correction of its rounding below 8 bits, 0 for none."""

    repository: Path
    work: Path
    policies: tuple[str, ...]
    prompts: int
    seeds: int
    samples: int = 8
    correct: int = 0
    merged_from: Path | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What rows must agree in to be compared."""
        return {"prompts": self.prompts, "seeds": self.seeds}


def adapters_of(repository: Any) -> list[str]:
    """Every checkpoint that is an adapter exactly."""
    from personalq.repository.forms import form_of

    cards = [card for card in repository.cards() if repository.has_weights(card.id)]
    return [card.id for card in cards if form_of(repository.whole(card.id)).name == "attached"]


def folds(ids: list[str]) -> dict[str, list[str]]:
    """Fold -> what its base is calibrated over: 'all', and two halves, every second one."""
    return {"all": ids, "a": ids[0::2], "b": ids[1::2]}


def fold_of(checkpoint_id: str, ids: list[str], seen: str) -> str:
    """The fold whose base has seen a checkpoint ('in': all of them), or has not."""
    if seen == "in" or checkpoint_id not in ids:
        return "all"
    return "b" if checkpoint_id in folds(ids)["a"] else "a"


def prepare(plan: Forms, fold: str, over: list[str]) -> dict[str, str]:
    """Calibrate a fold's base under every policy and export it -> policy -> bundle. What is there already is kept."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from calibration.gather import gather
    from exporters.export import export_base
    from personalq.repository import Repository

    root = plan.work / fold
    if not root.is_dir():
        shutil.copytree(plan.repository, root)
    repository, made, shared = Repository.open(root), {}, None
    for policy in plan.policies:
        name, bits = policy.rsplit("-", 1)
        spec = root / "specs" / BASE / f"{policy}.json"
        if not spec.is_file():
            options = CalibrateOptions(policy=name, bits=bits, samples=plan.samples, over=tuple(over))
            shared = shared or gather(repository, repository.whole(BASE).card, options)
            calibrate(repository, BASE, options, evidence=shared)
        made[policy] = str(export_base(repository, BASE, spec).bundle)
    return made


def measure(plan: Forms, checkpoint_id: str, bundles: dict[str, dict[str, str]], ids: list[str]) -> list[Row]:
    """Every row of one checkpoint. bundles: fold -> policy -> the base's bundle."""
    from bench.quality import Yardstick, draw, opened
    from gallery.concepts import evaluation_prompts, reference_images
    from gallery.judge import Judge
    from personalq.repository import Repository

    repository, judge = Repository.open(plan.work / "all"), Judge.load()
    prompts = evaluation_prompts(checkpoint_id)[: plan.prompts]
    asked, references = [p for p in prompts for _ in range(plan.seeds)], reference_images(checkpoint_id, 32, 900)

    def drawn(pipeline: Any) -> np.ndarray:
        return np.concatenate(list(draw(pipeline, prompts, plan.seeds)))

    def row(policy: str, form: str, seen: str, images: np.ndarray) -> Row:
        told = {"checkpoint": checkpoint_id, "policy": policy, "form": form, "seen": seen}
        return {**told, **yardstick.scores(images)}

    exact = drawn(opened(_merged(repository, checkpoint_id, "fp32")))
    yardstick = Yardstick(exact, judge, references, asked)
    rows = [row("fp32", "merged", "own", exact)]
    known = _known(plan, checkpoint_id, rows[0])
    for policy in plan.policies:
        if policy in known:
            rows.append(known[policy])
        else:
            images = drawn(opened(_merged(repository, checkpoint_id, policy)))
            rows.append(row(policy, "merged", "own", images))
        for form, pipeline, seen in _attached(plan, repository, checkpoint_id, policy, bundles, ids):
            rows.append(row(policy, form, seen, drawn(pipeline)))
    return rows


def _attached(
    plan: Forms, repository: Any, checkpoint_id: str, policy: str, bundles: dict[str, dict[str, str]], ids: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """(form, pipeline, whether its base was calibrated over it) for every way that a checkpoint is attached."""
    from exporters.adapters import export_adapter
    from personalq.weights.adapter import Limits
    from runtime.drawing.attaching import Chosen, open_adapter
    from runtime.drawing.pipeline import Pipeline
    from runtime.engines.ort import OrtEngine

    is_exact = checkpoint_id in ids
    for rank in (None,) if is_exact else RANKS:
        made = export_adapter(repository, checkpoint_id, Limits(rank=rank) if rank else None)
        for seen in SEEN if is_exact else SEEN[1:]:
            bundle = bundles[fold_of(checkpoint_id, ids, seen)][policy]
            pipeline = Pipeline(OrtEngine(Path(bundle), threads=1), [Chosen(open_adapter(made.bundle))])
            yield "attached" if is_exact else f"attached at rank {rank}", pipeline, seen
    if plan.correct and is_exact and not policy.endswith("w8a8"):
        yield f"attached, corrected at {plan.correct}", _corrected(plan, checkpoint_id, policy, bundles, ids), SEEN[1]


def _corrected(plan: Forms, checkpoint_id: str, policy: str, bundles: dict[str, dict[str, str]], ids: list[str]) -> Any:
    """The checkpoint on a base that has not seen it, whose rounding its adapter corrects."""
    from calibration.calibrate import CalibrateOptions
    from calibration.correction import correction
    from exporters.adapters import Corrected, export_adapter
    from personalq.adapters import Correction
    from personalq.repository import Repository
    from personalq.spec import read_spec
    from runtime.drawing.attaching import Chosen, open_adapter
    from runtime.drawing.pipeline import Pipeline
    from runtime.engines.ort import OrtEngine

    fold = fold_of(checkpoint_id, ids, SEEN[1])
    repository, spec = Repository.open(plan.work / fold), plan.work / fold / "specs" / BASE / f"{policy}.json"
    branches = correction(repository, spec, checkpoint_id, plan.correct, CalibrateOptions(samples=plan.samples))
    entry = Correction(spec_sha256=read_spec(spec).content_sha256(), rank=plan.correct)
    made = export_adapter(repository, checkpoint_id, correction=Corrected(branches, entry))
    return Pipeline(OrtEngine(Path(bundles[fold][policy]), threads=1), [Chosen(open_adapter(made.bundle))])


def _merged(repository: Any, checkpoint_id: str, policy: str) -> Path:
    from bench.quality import export

    return Path(export(repository, checkpoint_id, policy)["bundle"])


def _known(plan: Forms, checkpoint_id: str, exact: Row) -> dict[str, Row]:
    """Merged rows of an earlier `bench quality` over the same prompts and seeds, taken only where its FP32 pictures have the
    scores of today's: then they are pictures of the same weights."""
    if plan.merged_from is None:
        return {}
    found = json.loads(plan.merged_from.read_text())
    rows = [row for row in found["rows"] if row["checkpoint"] == checkpoint_id]
    before = next((row for row in rows if row["policy"] == "fp32"), None)
    same = before is not None and found["plan"] == plan.key
    if not same or not np.allclose(before["pictures"]["concept"], exact["pictures"]["concept"], atol=2e-3):
        return {}
    more = {"form": "merged", "seen": "own"}
    return {row["policy"]: {**row, **more} for row in rows if row["policy"] in plan.policies}


def differences(rows: list[Row]) -> list[dict[str, Any]]:
    """Attached - merged under the same policy, by policy, whether it was calibrated over the checkpoint, and metric.

    Paired by picture, 95 % intervals over checkpoints; lowest: the checkpoint with the lowest mean.
    """
    merged = {(row["checkpoint"], row["policy"]): row for row in rows if row["form"] == "merged"}
    groups = dict.fromkeys((row["form"], row["policy"], row["seen"]) for row in rows if row["form"] != "merged")
    result = []
    for form, policy, seen in groups:
        chosen = [row for row in rows if (row["form"], row["policy"], row["seen"]) == (form, policy, seen)]
        pairs = [(row, merged[row["checkpoint"], policy]) for row in chosen if (row["checkpoint"], policy) in merged]
        for metric in METRICS if pairs else ():
            gaps = [np.subtract(a["pictures"][metric], b["pictures"][metric]) for a, b in pairs]
            ids = np.repeat([a["checkpoint"] for a, _ in pairs], [len(gap) for gap in gaps])
            means = {a["checkpoint"]: round(float(gap.mean()), 4) for (a, _), gap in zip(pairs, gaps, strict=True)}
            told = {"form": form, "policy": policy, "seen": seen, "metric": metric, "checkpoints": len(pairs)}
            lowest = min(means, key=lambda name: means[name])
            result.append(
                {**told, **asdict(bootstrap(np.concatenate(gaps), ids)), "lowest": {lowest: means[lowest]}, "by": means}
            )
    return result


def rounded_away(path: Path) -> list[dict[str, Any]]:
    """What merging rounds away: each adapter's change of a layer beside the step of the merged layer's quantiser.

    Per checkpoint and width, over the UNet's layers: the median of rms(W' - W) / step (step: the mean of the channels'
    scales), and the share of integers that the change leaves as they were.
    """
    from personalq.numerics import INT4, INT8, mse_scale, quantize
    from personalq.repository import Repository
    from personalq.weights.checkpoint import open_weights

    repository, found = Repository.open(path), []
    for checkpoint_id in adapters_of(repository):
        whole = repository.whole(checkpoint_id)
        base = open_weights(whole.base_dir, None, whole.card.kind).component("unet")
        own = open_weights(whole.base_dir, whole.checkpoint_dir, whole.card.kind).component("unet")
        layers = [name for name in sorted(own.changed) if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
        for qtype in (INT8, INT4) if layers else ():
            ratios, same = [], []
            for name in layers:
                before, after = (np.asarray(one.read(name), np.float32) for one in (base, own))
                scale = mse_scale(after, qtype, 0)
                ratios.append(float(np.sqrt(np.mean((after - before) ** 2)) / scale.mean()))
                same.append(float(np.mean(quantize(after, scale, qtype, 0) == quantize(before, scale, qtype, 0))))
            told = {"checkpoint": checkpoint_id, "weight": qtype.name, "layers": len(layers)}
            found.append({**told, "rms_over_step": float(np.median(ratios)), "same_integers": float(np.mean(same))})
    return found


def table(rows: list[Row]) -> Iterator[str]:
    """One line per form, policy and whether the base had seen the checkpoint: means over checkpoints."""
    yield f"{'form':22} {'policy':10} {'seen':5} {'n':>3} {'PSNR dB':>8} {'SSIM':>6} {'concept':>8} {'prompt':>7}"
    for form, policy, seen in dict.fromkeys((row["form"], row["policy"], row["seen"]) for row in rows):
        chosen = [row for row in rows if (row["form"], row["policy"], row["seen"]) == (form, policy, seen)]
        means = {metric: float(np.mean([row[metric] for row in chosen])) for metric in METRICS}
        yield (
            f"{form:22} {policy:10} {seen:5} {len(chosen):3} {means['psnr_db']:8.2f} {means['ssim']:6.3f} "
            f"{means['concept']:8.3f} {means['prompt']:7.3f}"
        )


def run(plan: Forms, wanted: list[str], jobs: int, out: Path | None) -> list[Row]:
    """Calibrate the folds, then measure checkpoint by checkpoint; rows that `out` holds are kept, and it grows as they come."""
    from personalq.repository import Repository

    repository = Repository.open(plan.repository)
    ids = adapters_of(repository)
    everyone = wanted or [card.id for card in repository.cards() if repository.has_weights(card.id)]
    rows: list[Row] = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    left = [one for one in everyone if one not in {row["checkpoint"] for row in rows}]
    with ProcessPoolExecutor(jobs) as pool:
        made = {fold: pool.submit(prepare, plan, fold, over) for fold, over in folds(ids).items()}
        bundles = {fold: future.result() for fold, future in made.items()}
        for done in as_completed([pool.submit(measure, plan, one, bundles, ids) for one in left]):
            rows += done.result()
            click.echo("\n".join(table(done.result())), err=True)
            if out is not None:
                write_atomic(out, json.dumps({"bench": "quality", "plan": plan.key, "rows": rows}).encode())
    return rows
