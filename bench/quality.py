"""What does compression cost? Every gallery checkpoint x policy x bits, paired with FP32 over fixed prompts and seeds.

    python -m bench.quality [--quick] [--policies taq-w8a8,...] [--out FILE.json]

Per picture: PSNR and SSIM against the FP32 picture of the same prompt and seed, concept score (mean cosine to real
renders of the concept) and prompt score (probability of what the prompt names), by the gallery's judges. Bytes are
counted from the bundle's files. Differences between policies are paired and carry cluster-bootstrap intervals.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench import _forms
from bench._quality_report import Row, differences, markdown, plot, table
from personalq.numerics import psnr_db
from personalq.repository.atomic import write_atomic

LARGEST_DB = 60.0  # stands for "equal" in means


@dataclass(frozen=True)
class Plan:
    """What is measured: `policies` are '<policy>-<bits>[-rows4][@MB]' or 'fp32'."""

    repository: Path
    policies: tuple[str, ...]
    prompts: int
    seeds: int

    @property
    def key(self) -> dict[str, Any]:
        """What rows must agree in to be compared."""
        return {"prompts": self.prompts, "seeds": self.seeds}


def measured_before(out: Path | None, plan: Plan) -> list[Row]:
    """Rows of an earlier run of the same prompts and seeds: one that was stopped, or saw other checkpoints or policies.

    Raises click.ClickException.
    """
    if out is None or not out.exists():
        return []
    found = json.loads(out.read_text())
    if found.get("plan") != plan.key:
        raise click.ClickException(f"{out}: was measured with {found.get('plan')}, not {plan.key}; name another file")
    return list(found["rows"])


def measure_checkpoint(plan: Plan, checkpoint_id: str) -> list[Row]:
    """Rows of one checkpoint, one per policy of the plan and FP32, each with its per-picture numbers."""
    from calibration.calibrate import CalibrateOptions, gather
    from gallery.concepts import evaluation_prompts, reference_images
    from gallery.judge import Judge
    from personalq.repository import Repository

    repository, judge = Repository.open(plan.repository), Judge.load()
    prompts = evaluation_prompts(checkpoint_id)[: plan.prompts]
    references = reference_images(checkpoint_id, 32, 900)
    reference, rows, shared = None, [], None
    for policy in dict.fromkeys(("fp32", *plan.policies)):
        if policy != "fp32" and shared is None:
            shared = gather(repository, repository.card(checkpoint_id), CalibrateOptions())
        made = export(repository, checkpoint_id, policy, shared)
        pipeline = opened(made["bundle"])
        images = np.concatenate(list(draw(pipeline, prompts, plan.seeds)))
        if policy == "fp32":
            path = trajectory(pipeline, prompts[:4])
        reference = images if reference is None else reference
        scored = Yardstick(reference, judge, references, [p for p in prompts for _ in range(plan.seeds)]).scores(images)
        noise = {"noise_error": noise_error(pipeline, path)}
        rows.append({"checkpoint": checkpoint_id, "policy": policy, **made["facts"], **noise, **scored})
    return rows


@dataclass(frozen=True)
class Yardstick:
    """What one checkpoint's pictures are held against. exact: its FP32 ones (P,H,W,3) uint8; references: of its concept;
    asked: the prompt of each picture."""

    exact: np.ndarray
    judge: Any
    references: np.ndarray
    asked: list[str]

    def scores(self, images: np.ndarray) -> Row:
        """The mean of each of METRICS, and 'pictures': metric -> its value for each of `images` (P,H,W,3) uint8."""
        pairs = list(zip(self.exact, images, strict=True))
        pictures = {
            "psnr_db": [min(psnr_db(r, i, peak=255), LARGEST_DB) for r, i in pairs],
            "ssim": [ssim(r, i) for r, i in pairs],
            "concept": self.judge.concept_score(images, self.references).tolist(),
            "prompt": self.judge.prompt_score(images, self.asked).tolist(),
        }
        return {**{name: float(np.mean(values)) for name, values in pictures.items()}, "pictures": pictures}


def export(repository: Any, checkpoint_id: str, policy: str, evidence: Any = None) -> dict[str, Any]:
    """Calibrate and export one checkpoint under '<policy>-<bits>[-rows4][@MB]' or 'fp32'; policies share the evidence."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint

    rule, _, budget = policy.partition("@")
    name, bits = (policy, "w8a8") if policy == "fp32" else rule.removesuffix("-rows4").rsplit("-", 1)
    options = CalibrateOptions(
        policy=name,
        bits=bits,
        budget_bytes=int(float(budget) * 1e6) if budget else None,
        row_bits=4 if rule.endswith("-rows4") else 8,
    )
    spec = calibrate(repository, checkpoint_id, options, evidence=None if policy == "fp32" else evidence)
    result = export_checkpoint(repository, checkpoint_id, spec.spec_path)
    facts = {
        "bits": "fp32" if policy == "fp32" else bits,
        "bytes": result.bytes,
        "bytes_fp32": result.bytes_fp32,
        "calibration_seconds": round(spec.seconds, 2),
        "peak_rss_bytes": spec.peak_rss_bytes,
    }
    return {"bundle": result.bundle, "facts": facts}


def opened(bundle: Path) -> Any:
    """A pipeline over the bundle, one thread."""
    from runtime.drawing.pipeline import Pipeline
    from runtime.engines.ort import OrtEngine

    return Pipeline(OrtEngine(bundle, threads=1))


def draw(pipeline: Any, prompts: list[str], seeds: int) -> Iterator[np.ndarray]:
    """(seeds,H,W,3) uint8 pictures, prompt by prompt; the seeds of a prompt are one batch."""
    from runtime.drawing.pipeline import Picture

    for prompt in prompts:
        steps = pipeline.denoise([Picture(prompt, seed=seed) for seed in range(seeds)])
        *_, last = steps
        yield np.stack([pipeline.decode(latents) for latents in last.latents])


@dataclass(frozen=True)
class Point:
    """One step of the FP32 picture: prompt, latents (4,h,w), time step, guided prediction."""

    prompt: str
    latents: np.ndarray
    timestep: float
    prediction: np.ndarray


def trajectory(pipeline: Any, prompts: list[str], every: int = 3) -> list[Point]:
    """Points of the FP32 pictures of these prompts (seed 0), every third step."""
    from runtime.drawing.pipeline import Picture, start_noise

    points = []
    for prompt in prompts:
        steps = list(pipeline.denoise([Picture(prompt, seed=0)]))
        starts = [start_noise(0, steps[0].latents.shape[1:]), *(step.latents[0] for step in steps)]
        for start, step in list(zip(starts, steps, strict=False))[::every]:
            said = predict_at(pipeline, prompt, start, step.timestep)
            points.append(Point(prompt, start, step.timestep, said))
    return points


def predict_at(pipeline: Any, prompt: str, latents: np.ndarray, timestep: float) -> np.ndarray:
    """The guided prediction (4,h,w) at these latents."""
    halves = [pipeline.rows("").conditioning, pipeline.rows(prompt).conditioning]
    conditioning = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
    denoiser = pipeline.engine.denoiser(conditioning, *latents.shape[1:])
    uncond, cond = denoiser(np.stack([latents, latents]), float(timestep))
    return np.asarray(uncond + pipeline.manifest.guidance * (cond - uncond))


def noise_error(pipeline: Any, points: list[Point]) -> list[float]:
    """Relative squared error of the guided prediction at these points, one number per time-step bin (late to early)."""
    from calibration.statistics.ranges import N_TIME_BINS, time_bin

    bins: list[list[float]] = [[] for _ in range(N_TIME_BINS)]
    for point in points:
        gap = predict_at(pipeline, point.prompt, point.latents, point.timestep) - point.prediction
        bins[time_bin(point.timestep)].append(float((gap**2).sum() / (point.prediction**2).sum()))
    return [float(np.mean(part)) if part else 0.0 for part in bins]


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures (Wang et al. 2004), by scikit-image's defaults."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(a, b, channel_axis=2, data_range=255))


@click.command()
@click.option(
    "--repo", type=click.Path(path_type=Path, exists=True), default=Path("gallery/repository"), show_default=True
)
@click.option("--policies", default="taq-w8a8", show_default=True, help="comma list of POLICY-BITS")
@click.option("--checkpoints", default="", help="comma list of ids (default: all with weights)")
@click.option("--prompts", default=8, show_default=True)
@click.option("--seeds", default=4, show_default=True)
@click.option("--quick", is_flag=True, help="3 prompts x 1 seed")
@click.option("--jobs", default=2, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="write the JSON here; checkpoints it already holds are kept"
)
@click.option("--forms", is_flag=True, help="attached beside merged, over bases calibrated here: docs/adapters.md")
@click.option("--samples", default=8, show_default=True, help="with --forms: of a base's calibration")
@click.option(
    "--correct", default=0, show_default=True, help="with --forms: rank of a correction below 8 bits, 0: none"
)
@click.option("--work", type=click.Path(path_type=Path), help="with --forms: where bases are kept for the next run")
@click.option(
    "--merged-from", type=click.Path(path_type=Path, exists=True), help="with --forms: merged rows of this file"
)
def main(
    repo: Path,
    policies: str,
    checkpoints: str,
    prompts: int,
    seeds: int,
    quick: bool,
    jobs: int,
    out: Path | None,
    forms: bool,
    work: Path | None,
    merged_from: Path | None,
    samples: int,
    correct: int,
) -> None:
    """Measure quality over the gallery; a table, then one JSON object as the last line."""
    from personalq.repository import Repository

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: more would only wait for each other
    started = time.perf_counter()
    if forms:
        with tempfile.TemporaryDirectory(prefix="personalq-forms-") as scratch:
            size = (3, 1) if quick else (prompts, seeds)
            asked = _forms.Forms(
                repo.resolve(), work or Path(scratch), tuple(policies.split(",")), *size, samples, correct, merged_from
            )
            measured = _forms.run(asked, checkpoints.split(",") if checkpoints else [], jobs, out)
        finish_forms(asked, measured, started, out)
        return
    plan = Plan(repo, tuple(policies.split(",")), 3 if quick else prompts, 1 if quick else seeds)
    repository = Repository.open(repo)
    wanted = (
        checkpoints.split(",") if checkpoints else [c.id for c in repository.cards() if repository.has_weights(c.id)]
    )
    rows = measured_before(out, plan)
    known = {(row["checkpoint"], row["policy"]) for row in rows}
    missing = {c: tuple(p for p in plan.policies if (c, p) not in known) for c in wanted}
    if any(missing.values()):
        export(repository, wanted[0], "fp32")  # the family is traced once, before the workers start
    with ProcessPoolExecutor(jobs) as pool:
        plans = [(replace(plan, policies=left), c) for c, left in missing.items() if left]
        for done in as_completed([pool.submit(measure_checkpoint, *each) for each in plans]):
            part = done.result()
            rows += [row for row in part if (row["checkpoint"], row["policy"]) not in known]
            click.echo(
                f"{part[0]['checkpoint']}: " + "  ".join(f"{r['policy']} {r['psnr_db']:.1f} dB" for r in part[1:]),
                err=True,
            )
            if out:
                write_atomic(out, json.dumps({"bench": "quality", "plan": plan.key, "rows": rows}).encode())
    order = ["fp32", *plan.policies]
    rows.sort(key=lambda row: (row["checkpoint"], order.index(row["policy"]) if row["policy"] in order else len(order)))
    click.echo("\n".join(table(rows)))
    summary = {
        "bench": "quality",
        "plan": plan.key,
        "rows": rows,
        "differences": differences(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "diffusers")},
    }
    for metric in ("psnr_db", "concept") if out else ():
        plot(rows, metric, out.with_name(f"{out.stem}_{metric.removesuffix('_db')}.png"))
    if out:
        write_atomic(out.with_suffix(".md"), markdown(rows, summary["differences"]).encode())
        write_atomic(out, (json.dumps(summary) + "\n").encode())
    click.echo(json.dumps(summary))


def finish_forms(plan: _forms.Forms, rows: list[Row], started: float, out: Path | None) -> None:
    """Print the table and the summary, and write it where it was asked for."""
    click.echo("\n".join(_forms.table(rows)))
    summary = {
        "bench": "quality",
        "forms": True,
        "plan": plan.key,
        "rows": rows,
        "differences": _forms.differences(rows),
        "rounded_away": _forms.rounded_away(plan.repository),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "diffusers")},
    }
    if out:
        write_atomic(out, (json.dumps(summary) + "\n").encode())
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
