"""The attached half of `bench gate`: faults in an adapter, its goldens and its base's engine, and clean runs of the same."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click

from bench._attached_faults import ATTACHED_FAULTS, AttachedCase, fits, inject_attached
from bench._gate_rows import Row, timed, verdict
from personalq.adapters import read_adapter_manifest
from personalq.bundle import read_manifest
from personalq.repository import Repository
from personalq.spec import REFERENCE
from personalq.weights.checkpoint import open_weights
from runtime.gate import baseline as baselines
from runtime.gate.check import Report
from runtime.gate.gate import NUDGE, Options, Run, run_gate
from runtime.gate.request import sources_of
from runtime.gate.subject import Sources, Subject

SPEC = "taq-w8a8"
FEW = {"samples": 2, "steps": 8}  # of a base that nobody calibrated: 4 prompts of its own, 1 of each checkpoint


@dataclass(frozen=True)
class AttachedBench:
    """A base's engine and the adapters that are judged on it. level: the last one of clean runs; clean: how many of each.

    base_spec: how the engine's spec was made, in words.
    """

    repository: Repository
    engine: Path
    adapters: dict[str, Path]
    base_spec: str
    level: str
    clean: int = 4

    def sources(self, name: str) -> Sources:
        return sources_of(self.engine, self.repository, lambda: open_weights, adapter=self.adapters[name])


def prepare_attached(repository: Repository, names: list[str], level: str, clean: int) -> AttachedBench:
    """The base's engine, and an adapter and goldens of each checkpoint that attaches exactly."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.adapters import export_adapter
    from exporters.export import export_base
    from exporters.request import is_current
    from personalq.repository.forms import form_of

    attached = [name for name in names if form_of(repository.whole(name)).name == "attached"]
    for name in attached:
        if not (repository.root / "specs" / name / REFERENCE).is_file():
            calibrate(repository, name, CalibrateOptions(policy="fp16"))
    base = repository.card(attached[0]).base
    spec, told = repository.root / "specs" / base / f"{SPEC}.json", "as it lies in the repository"
    if not is_current(spec, repository, base):
        spec = calibrate(repository, base, CalibrateOptions(**FEW, over=tuple(attached))).spec_path
        told = f"calibrated here over {', '.join(attached)}: {FEW['samples']} samples, {FEW['steps']} steps"
    engine = export_base(repository, base, spec).bundle
    adapters = {name: export_adapter(repository, name).bundle for name in attached}
    return AttachedBench(repository, engine, adapters, told, level, clean)


def attached_faults(bench: AttachedBench, names: list[str]) -> Iterator[Row]:
    """Each fault in a checkpoint it fits: with the repository beside it, and with bundle, adapter and goldens alone."""
    for number, fault in enumerate(names):
        fitting = [name for name, adapter in bench.adapters.items() if fits(fault, adapter)]
        if not fitting:
            click.echo(f"{fault}: no checkpoint fits", err=True)
            continue
        name = fitting[number % len(fitting)]
        with tempfile.TemporaryDirectory() as scratch:
            case = copy_of(bench, name, Path(scratch))
            inject_attached(fault, case)
            options = Options(threads=1, level="numerics", blame=False)
            sources = replace(bench.sources(name), golden=case.golden)
            full, alone = (
                run_gate(case.engine, options, given, case.adapter) for given in (sources, Sources(golden=case.golden))
            )
        yield {"fault": fault, "checkpoint": name, "form": "attached", **verdict(full), "bundle_alone": verdict(alone)}


def copy_of(bench: AttachedBench, name: str, scratch: Path) -> AttachedCase:
    """Copies of everything that a fault may spoil. Another checkpoint: one with another trigger."""
    triggers = {one: read_adapter_manifest(adapter).checkpoint.trigger for one, adapter in bench.adapters.items()}
    other = next((one for one, trigger in triggers.items() if trigger != triggers[name]), name)
    golden = bench.sources(name).golden
    assert golden is not None
    return AttachedCase(
        repository=bench.repository,
        checkpoint_id=name,
        engine=Path(shutil.copytree(bench.engine, scratch / "engine")),
        adapter=Path(shutil.copytree(bench.adapters[name], scratch / "adapter")),
        golden=Path(shutil.copy(golden, scratch / golden.name)),
        other=bench.adapters[other],
    )


def attached_clean_runs(bench: AttachedBench, file: Path, pictures: int = 0) -> Iterator[Row]:
    """Accept each attached checkpoint once, then run it again in ways that change nothing but float order and bytes on disk."""
    for name in bench.adapters:
        options = Options(threads=1, level=bench.level, baseline=file, extra_pictures=pictures)
        accepted = run_gate(bench.engine, replace(options, update=True), bench.sources(name), bench.adapters[name])
        told = {"checkpoint": name, "form": "attached"}
        if not accepted.passed:
            yield {**told, "run": "accepting", "passed": False, "first": accepted.headline}
            continue
        for kind in ("one thread", "two threads", "exported anew", "nudged")[: bench.clean]:
            report = _clean_run(kind, name, options, bench)
            yield {**told, "run": kind, "passed": report.passed, "first": report.headline, **timed(report)}


def _clean_run(kind: str, name: str, options: Options, bench: AttachedBench) -> Report:
    sources, adapter = bench.sources(name), bench.adapters[name]
    if kind == "exported anew":
        from exporters.adapters import export_adapter
        from exporters.export import export_base

        manifest = read_manifest(bench.engine)
        for bundle in (bench.engine, adapter):
            shutil.rmtree(bundle)
        spec = bench.repository.root / "specs" / manifest.checkpoint.id / f"{manifest.spec.name}.json"
        again = (
            export_base(bench.repository, manifest.checkpoint.id, spec).bundle,
            export_adapter(bench.repository, name).bundle,
        )
        assert again == (bench.engine, adapter), "another key for the same contents"
    if kind == "nudged":
        from runtime.drawing.attaching import open_adapter

        subject = Subject(bench.engine, read_manifest(bench.engine), sources, options.threads, open_adapter(adapter))
        return Run(subject.nudged(NUDGE, 99), options, baselines.entry_name(subject.manifest), [], {}).report()
    return run_gate(bench.engine, replace(options, threads=2 if kind == "two threads" else 1), sources, adapter)


def known(faults: list[str]) -> list[str]:
    """Those of a list that are of the attached form; all for none."""
    return [fault for fault in faults if fault in ATTACHED_FAULTS] if faults else list(ATTACHED_FAULTS)
