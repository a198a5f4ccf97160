"""Does the gate catch what it should, and nothing else? Faults put into real bundles, and clean runs of the same bundles.

    python -m bench.gate [--quick] [--repo DIR] [--checkpoints a,b,...] [--out FILE.json]

Works in a copy of the repository's bases, checkpoints and specs. Faults: every mutation of bench/_faults.py, judged up to
level (c), with all that the gate may look at and by the bundle alone; those of bench/_attached_faults.py, in an adapter, its
goldens and its base's engine, likewise. Clean runs: each checkpoint, in both forms, four times against its own baseline: one
thread, two threads, exported anew, and with inputs moved by one part in a million. False alarms are clean runs that fail.
Worse specs: one layer at 4 bits at a time, and whether the first line names it.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench._attached_gate import attached_clean_runs, attached_faults, known, prepare_attached
from bench._faults import FAULTS, NEEDS_INT4, NEEDS_LORA, Case, export_with, inject, with_int4
from bench._gate_rows import Row, timed, verdict
from personalq.bundle import read_manifest
from personalq.repository import Repository
from personalq.spec import read_spec
from runtime.gate.check import Report
from runtime.gate.gate import NUDGE, Options, Run, run_gate
from runtime.gate.request import sources_of
from runtime.gate.subject import Sources, Subject

CHECKPOINTS = "biscuit-the-dog,grandmas-mug,moss-mug,checker-cab,domino-the-dog"
SPEC = "taq-w8a8"
FORMS = ("both", "merged", "attached")


@dataclass(frozen=True)
class Bench:
    """A repository of our own, and the bundle of each checkpoint in it. level: the last one of clean runs.

    clean: runs of each checkpoint. worse: layers of the first one that are tried at 4 bits, one at a time. pictures: of
    clean runs, beyond the goldens'.
    """

    repository: Repository
    bundles: dict[str, Path]
    level: str
    clean: int = 4
    worse: int = 6
    pictures: int = 0

    def sources(self, bundle: Path) -> Sources:
        return sources_of(bundle, self.repository, weights_reader)


def weights_reader() -> Any:
    from personalq.weights.checkpoint import open_weights

    return open_weights


def prepare(source: Path, root: Path, names: list[str], policies: tuple[str, ...]) -> Repository:
    """Copy what is needed, calibrate what has no spec, and export each checkpoint under each policy."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint

    bases = [f"specs/{folder.name}" for folder in (source / "bases").iterdir()]
    own = [f"{kind}/{name}" for kind in ("checkpoints", "specs") for name in names]
    for part in ("bases", "families", *bases, *own):
        if (source / part).is_dir():
            shutil.copytree(source / part, root / part)
    repository = Repository.open(root)
    for name in names:
        for policy in policies:
            spec = root / "specs" / name / ("fp32.json" if policy == "fp32" else f"{SPEC}.json")
            made = spec if spec.is_file() else calibrate(repository, name, CalibrateOptions(policy=policy)).spec_path
            export_checkpoint(repository, name, made)
    return repository


def bundle_of(repository: Repository, name: str) -> Path:
    folders = [path for path in (repository.root / "bundles").iterdir() if path.is_dir()]
    return next(
        folder
        for folder in folders
        if (read_manifest(folder).checkpoint.id, read_manifest(folder).spec.name) == (name, SPEC)
    )


def faults(bench: Bench, names: list[str]) -> Iterator[Row]:
    """Each fault in a checkpoint it fits, once with everything the gate may look at, once with the bundle alone."""
    kinds = {name: bench.repository.card(name).kind for name in bench.bundles}
    four_bits = four_bit_bundle(bench, next(iter(bench.bundles)))
    for number, fault in enumerate(names):
        fitting = [n for n in bench.bundles if fault not in NEEDS_LORA or kinds[n] == "lora"]
        if not fitting:
            click.echo(f"{fault}: no checkpoint fits", err=True)
            continue
        name = fitting[0] if fault in NEEDS_INT4 else fitting[number % len(fitting)]
        other = next(bundle for n, bundle in bench.bundles.items() if n != name)
        with tempfile.TemporaryDirectory() as scratch:
            source = four_bits if fault in NEEDS_INT4 else bench.bundles[name]
            folder = Path(shutil.copytree(source, Path(scratch) / "bundle"))
            inject(fault, Case(bench.repository, name, folder, other))
            options = Options(threads=1, level="numerics", blame=False)
            full, alone = run_gate(folder, options, bench.sources(source)), run_gate(folder, options)
        yield {"fault": fault, "checkpoint": name, **verdict(full), "bundle_alone": verdict(alone)}


def four_bit_bundle(bench: Bench, name: str) -> Path:
    """The checkpoint with three Linear layers at 4 bits: honest, and the soil for 'int4 nibbles swapped'."""
    spec_file = read_spec(bench.bundles[name] / "spec.json")
    linear = [n for n, layer in spec_file.spec.layers.items() if layer.op == "linear" and layer.weight == "int8"]
    made = with_int4(bench.repository, name, spec_file, linear[10:13])
    made.spec = made.spec.model_copy(update={"name": "gate-int4"})
    return export_with(bench.repository, name, made)


def clean_runs(bench: Bench, baselines: Path) -> Iterator[Row]:
    """Accept each bundle once, then run it again in ways that change nothing but float order and bytes on disk."""
    for name, bundle in bench.bundles.items():
        sources = bench.sources(bundle)
        options = Options(threads=1, level=bench.level, baseline=baselines, extra_pictures=bench.pictures)
        accepted = run_gate(bundle, replace(options, update=True), sources)
        if not accepted.passed:
            yield {"checkpoint": name, "run": "accepting", "passed": False, "first": accepted.headline}
            continue
        for kind in ("one thread", "two threads", "exported anew", "nudged")[: bench.clean]:
            report = clean_run(kind, bundle, options, sources, bench)
            yield {"checkpoint": name, "run": kind, "passed": report.passed, "first": report.headline, **timed(report)}


def clean_run(kind: str, bundle: Path, options: Options, sources: Sources, bench: Bench) -> Report:
    if kind == "exported anew":
        from exporters.export import export_checkpoint

        name = read_manifest(bundle).checkpoint.id
        shutil.rmtree(bundle)
        spec = bench.repository.root / "specs" / name / f"{SPEC}.json"
        bundle = export_checkpoint(bench.repository, name, spec).bundle
    if kind == "nudged":
        subject = Subject(bundle, read_manifest(bundle), sources, options.threads).nudged(NUDGE, 99)
        return Run(subject, options, f"{subject.manifest.checkpoint.id}/{subject.manifest.spec.name}", [], {}).report()
    return run_gate(bundle, replace(options, threads=2 if kind == "two threads" else 1), sources)


def worse_specs(bench: Bench, baselines: Path) -> Iterator[Row]:
    """One layer at 4 bits, rounded to nearest: must fail against the baseline, with that layer in the first line."""
    name, bundle = next(iter(bench.bundles.items()))
    spec_file = read_spec(bundle / "spec.json")
    quantised = [n for n, layer in spec_file.spec.layers.items() if layer.weight == "int8"]
    for place in np.linspace(0, len(quantised) - 1, bench.worse).round().astype(int):
        layer = quantised[place]
        made = export_with(bench.repository, name, with_int4(bench.repository, name, spec_file, [layer]))
        options = Options(threads=1, level="numerics", baseline=baselines)
        report = run_gate(made, options, bench.sources(made))
        named = layer in report.headline
        yield {"checkpoint": name, "layer": layer, "named_first": not report.passed and named, "first": report.headline}


def shown(rows: Iterator[Row]) -> list[Row]:
    """All rows, each on stderr as soon as it is there: the whole takes minutes."""
    found = []
    for row in rows:
        click.echo(", ".join(f"{name}: {value}" for name, value in row.items() if name != "bundle_alone"), err=True)
        found.append(row)
    return found


def table(rows: list[Row]) -> Iterator[str]:
    yield f"{'fault':30} {'checkpoint':18} {'form':8} {'caught by':32} {'s':>6}  bundle alone"
    for row in rows:
        alone = ", ".join(row["bundle_alone"]["levels"]) or "not caught"
        caught = ", ".join(row["levels"]) or "NOT CAUGHT"
        form = row.get("form", "merged")
        yield f"{row['fault']:30} {row['checkpoint']:18} {form:8} {caught:32} {row['seconds']:6.1f}  {alone}"


@click.command()
@click.option(
    "--repo", type=click.Path(path_type=Path, exists=True), default=Path("gallery/repository"), show_default=True
)
@click.option("--checkpoints", default=CHECKPOINTS, show_default=True, help="comma list of ids; one a LoRA")
@click.option("--faults", "wanted", default="", help="comma list of faults, of either form (default: all)")
@click.option("--form", type=click.Choice(FORMS), default="both", show_default=True)
@click.option("--clean", default=4, show_default=True, help="clean runs of each checkpoint, at most 4")
@click.option("--pictures", default=0, show_default=True, help="pictures of a clean run beyond the two goldens")
@click.option("--quick", is_flag=True, help="two checkpoints, no pictures")
@click.option("--out", type=click.Path(path_type=Path), help="also write the JSON here")
def main(
    repo: Path, checkpoints: str, wanted: str, form: str, clean: int, pictures: int, quick: bool, out: Path | None
) -> None:
    """Inject every fault, run clean bundles, count; a table, then one JSON object as the last line."""
    started = time.perf_counter()
    names = checkpoints.split(",")[: 2 if quick else None]
    asked, level = wanted.split(",") if wanted else [], "numerics" if quick else "images"
    policies = () if form == "attached" else ("fp32", "taq") if pictures else ("taq",)
    rows, runs, worse, base_spec = list[Row](), list[Row](), list[Row](), ""
    with tempfile.TemporaryDirectory(prefix="personalq-gate-") as scratch:
        repository = prepare(repo, Path(scratch) / "repository", names, policies)
        baselines = Path(scratch) / "baselines.json"
        if form != "attached":
            bundles = {name: bundle_of(repository, name) for name in names}
            bench = Bench(repository, bundles, level, clean, pictures=pictures)
            rows += shown(faults(bench, [fault for fault in asked if fault in FAULTS] if asked else list(FAULTS)))
            runs += shown(clean_runs(bench, baselines))
            worse += shown(worse_specs(bench, baselines)) if runs else []
        if form != "merged":
            attached = prepare_attached(repository, names, level, clean)
            base_spec = attached.base_spec
            rows += shown(attached_faults(attached, known(asked)))
            runs += shown(attached_clean_runs(attached, baselines, pictures))
    click.echo("\n".join(table(rows)))
    alarms = [run for run in runs if not run["passed"]]
    click.echo(f"clean runs: {len(runs)}, false alarms: {len(alarms)}")
    click.echo("\n".join(row["first"] for row in [*worse, *alarms]))
    slowest = [run["seconds_to_c"] for run in runs if "seconds_to_c" in run]
    summary = {
        "bench": "gate",
        "base_spec": base_spec,
        "faults": len(rows),
        "caught": sum(row["caught"] for row in rows),
        "caught_by_bundle_alone": sum(row["bundle_alone"]["caught"] for row in rows),
        "false_alarms": len(alarms),
        "clean_runs": len(runs),
        "seconds_to_c": {"median": float(np.median(slowest)), "max": max(slowest)} if slowest else {},
        "worse_specs": len(worse),
        "worse_specs_named_first": sum(row["named_first"] for row in worse),
        "rows": rows,
        "runs": runs,
        "worse": worse,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
    }
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
