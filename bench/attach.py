"""What does an attached checkpoint cost? Its export, its bytes, the time until it can draw, and what it adds to a step.

    python -m bench.attach [--arch tiny|sd15] [--bits w8a8] [--rounds N] [--work DIR] [--out FILE.json]

Random weights of real dimensions: a base's engine, LoRAs over every attention at ranks 16 and 64, and the merged engine of a
checkpoint with the base's own weights, in one run. Steps of all engines are interleaved; a ratio is of medians of processor
time. An attach is everything from files in the page cache to a UNet that is bound and waits for latents.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench._large import BASE, CHECKPOINTS, Large, build, write_lora
from bench._step import conditioning, latents
from bench.export import measured
from personalq.bundle import own_bytes
from runtime.drawing.attaching import Chosen, open_adapter
from runtime.drawing.pipeline import Pipeline
from runtime.engines.attached import PLAIN
from runtime.engines.engine import Engine
from runtime.engines.memory import memory_bytes
from runtime.engines.ort import OrtEngine

RANK16 = tuple(f"lora16-{i}" for i in range(8))
RANK64 = "lora64"
THOUSAND = 1000
COMMAND = "import sys\nfrom cli import cli\ncli.main(sys.argv[1:], standalone_mode=False)\n"


def made(work: Path, arch: str, bits: str) -> tuple[Large, Path, Path]:
    """The repository, the base's bundle and the bundle of a checkpoint with the base's own weights, merged."""
    from exporters.export import export_base, export_checkpoint

    large = build(work / arch, arch, lambda text: click.echo(text, err=True))
    for seed, name in enumerate(RANK16):
        write_lora(large, name, 16, seed)
    write_lora(large, RANK64, 64, 99)
    base = export_base(large.repository, BASE, large.spec(BASE, bits))
    merged = export_checkpoint(large.repository, CHECKPOINTS[0], large.spec(CHECKPOINTS[0], bits))
    return large, base.bundle, merged.bundle


def exported(root: Path, checkpoint: str) -> dict[str, Any]:
    """`personalq export ID --json` in a process of its own: what it says, its seconds and its largest memory."""
    return measured(COMMAND, "--repo", root, "export", checkpoint, "--json")


def attach_times(engine: Engine, bundles: list[Path], rounds: int) -> dict[str, Any]:
    """Milliseconds until each adapter can draw: its first time in this process (its bytes are hashed then), and later ones."""
    first, again = [], []
    told, latent = conditioning(engine.manifest, 2), engine.manifest.latent
    for turn in range(rounds + 1):
        for bundle in bundles:
            started = time.perf_counter()
            pipeline = Pipeline(engine, [Chosen(open_adapter(bundle))])
            engine.denoiser(told, latent.height, latent.width, pipeline.wearing.attached)
            (again if turn else first).append(1e3 * (time.perf_counter() - started))
    return {
        "attach_p50_ms": float(np.median(again)),
        "attach_p95_ms": float(np.percentile(again, 95)),
        "attach_first_p50_ms": float(np.median(first)),
    }


def steps(engine: Engine, merged: Engine, adapters: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """A guided pair's step of each: the merged engine, the base's plain, and with an adapter. Interleaved."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, one, bundle in (
        ("merged", merged, None),
        ("base, nothing attached", engine, None),
        *((name, engine, bundle) for name, bundle in adapters.items()),
    ):
        manifest, attached = one.manifest, PLAIN
        if bundle is not None:
            attached = Pipeline(one, [Chosen(open_adapter(bundle))]).wearing.attached
        told = conditioning(manifest, 2)
        denoise = one.denoiser(told, manifest.latent.height, manifest.latent.width, attached)
        sample = latents(manifest, 2)
        runs[name] = lambda denoise=denoise, sample=sample: denoise(sample, 500.0)  # type: ignore[misc]
    for run in runs.values():
        run()
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            took[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = [
        {
            "engine": name,
            "seconds": float(np.median([w for w, _ in all_])),
            "cpu_seconds": float(np.median([c for _, c in all_])),
        }
        for name, all_ in took.items()
    ]
    plain = next(row for row in rows if row["engine"] == "base, nothing attached")
    return [
        {
            **row,
            "over_base": row["cpu_seconds"] / plain["cpu_seconds"],
            "wall_over_base": row["seconds"] / plain["seconds"],
        }
        for row in rows
    ]


def thousand(engine: Engine, bundle: Path, folder: Path) -> dict[str, Any]:
    """Memory of this process with the base's engine, a thousand attached checkpoints that can be drawn at once, and two drawn.

    Their files are one file under a thousand names, so that the disk is not measured; what a pipeline holds beside the
    mapped file is its own.
    """
    before = memory_bytes()
    pipelines = []
    for i in range(THOUSAND):
        place = folder / f"{i:04d}"
        place.mkdir()
        for file in bundle.iterdir():
            if file.is_file():
                os.link(file, place / file.name)
        pipelines.append(Pipeline(engine, [Chosen(open_adapter(place))]))
    latent, told = engine.manifest.latent, conditioning(engine.manifest, 2)
    for pipeline in (pipelines[0], pipelines[-1]):
        engine.denoiser(told, latent.height, latent.width, pipeline.wearing.attached)(
            latents(engine.manifest, 2), 500.0
        )
    return {"resident_1000_bytes": memory_bytes(), "bytes_each": (memory_bytes() - before) / len(pipelines)}


@click.command()
@click.option("--arch", type=click.Choice(["tiny", "sd15"]), default="tiny", show_default=True)
@click.option("--bits", type=click.Choice(["w8a8", "w7a8"]), default="w8a8", show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="keep the repository here for the next run")
@click.option("--out", type=click.Path(path_type=Path), help="also write the JSON here")
def main(arch: str, bits: str, rounds: int, work: Path | None, out: Path | None) -> None:
    """Measure; one JSON object as the last line."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="personalq-attach-") as scratch:
        large, base, merged = made(work or Path(scratch), arch, bits)
        each = [exported(large.repository.root, name) for name in (*RANK16, RANK64)]
        bundles = [Path(one["bundle"]) for one in each]
        engine = OrtEngine(base)
        times = attach_times(engine, bundles[:-1], rounds)
        with tempfile.TemporaryDirectory(prefix="attach-", dir=large.repository.root) as links:
            held = thousand(engine, bundles[0], Path(links))
        rows = steps(engine, OrtEngine(merged), {"rank 16": bundles[0], "rank 64": bundles[-1]}, rounds)
        by = {row["engine"]: row for row in rows}
        lora = next((large.repository.root / "checkpoints" / RANK16[0]).glob("*.safetensors")).stat().st_size
        summary = {
            "bench": "attach",
            "arch": arch,
            "bits": bits,
            **times,
            "overhead_rank16": by["rank 16"]["over_base"],
            "overhead_rank64": by["rank 64"]["over_base"],
            "base_over_merged": by["base, nothing attached"]["cpu_seconds"] / by["merged"]["cpu_seconds"],
            "export_seconds": float(np.median([one["seconds"] for one in each[:-1]])),
            "export_peak_rss_bytes": max(one["peak_rss_bytes"] for one in each),
            "adapter_bytes": own_bytes(bundles[0]),
            "adapter_over_lora": own_bytes(bundles[0]) / lora,
            "merged_bytes": own_bytes(merged),
            "base_bytes": own_bytes(base),
            "on_disk_1000_bytes": own_bytes(base) + THOUSAND * own_bytes(bundles[0]),
            **held,
            "rows": rows,
            "exports": [
                {k: one[k] for k in ("form", "seconds", "cpu_seconds", "peak_rss_bytes", "bytes")} for one in each
            ],
            "seconds": round(time.perf_counter() - started, 1),
            "machine": f"{platform.machine()} {platform.system()}",
            "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        }
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
