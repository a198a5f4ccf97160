"""How long until another checkpoint can draw? In memory, and not in memory with its files in the page cache: beside another
checkpoint of its base (cold), and as the first of it.

    python -m bench.switch [--arch gallery|tiny|sd15] [--repo DIR] [--target NAME]... [--bits NAME]... [--rounds N] [--work DIR]

Beside it, in the same run: loading the same checkpoint with diffusers, and its FP32 graphs with ONNX Runtime. Then the
eviction rules on a replayed Zipf trace, with the sizes and load times just measured.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from onnxruntime import InferenceSession

from personalq.bundle import read_manifest
from personalq.repository import Repository
from runtime.drawing.pipeline import Pipeline
from runtime.engines.engine import open_engine
from runtime.engines.memory import draw_environment
from runtime.residency import GreedyDual, LeastRecent, Loaded, Ranking, Residency
from runtime.serving.drawing_process.worker import graph_bytes, is_unchanged
from runtime.store import Store
from runtime.targets import missing


def gallery(repository: Repository, most: int) -> tuple[Path, list[str]]:
    """A repository as it is: its checkpoints that have bundles."""
    return repository.root, sorted(Store(repository.root).drawable())[:most]


def random_weights(arch: str, work: Path, bits: Sequence[str]) -> tuple[Path, list[str]]:
    """Two checkpoints of real dimensions, exported under every spec of `bits` and in FP32."""
    from bench._large import CHECKPOINTS, build
    from exporters.export import export_checkpoint

    large = build(work / arch, arch, lambda text: click.echo(text, err=True))
    for checkpoint in CHECKPOINTS:
        for name in (*bits, "fp32"):
            export_checkpoint(large.repository, checkpoint, large.spec(checkpoint, name))
    return large.repository.root, list(CHECKPOINTS)


def loader(target: str) -> Residency[Pipeline]:
    """A residency as the server has it, with room for everything."""

    def load(key: str) -> Loaded[Pipeline]:
        pipeline = Pipeline(open_engine(target, Path(key)))
        return Loaded(pipeline, graph_bytes(pipeline.manifest))

    return Residency(load, lambda key: 0, 1 << 50, is_fresh=is_unchanged)


def measure(target: str, bits: str, bundles: Sequence[Path], rounds: int) -> dict[str, Any]:
    """First: a bundle when nothing of its base is in memory. Cold: each further one. Every round starts with nothing, from
    either end by turns; the one before the rounds fills the page cache and keeps what an engine keeps, and is left out."""
    first: list[Took] = []
    cold: list[Took] = []
    resident = []
    for turn in range(rounds + 1):
        kept = loader(target)
        for place, bundle in enumerate(bundles if turn % 2 else bundles[::-1]):
            took = timed(pinned, kept, bundle)
            if turn:
                (cold if place else first).append(took)
            resident.append(timed(pinned, kept, bundle).wall)
        kept.close()
    return {
        "engine": target,
        "bits": bits,
        **quantiles("first", first),
        **quantiles("cold", cold),
        "resident_p50_ms": 1e3 * median(resident),
    }


def pinned(kept: Residency[Pipeline], bundle: Path) -> Pipeline:
    return kept.pin(str(bundle)).result()


def peers(root: Path, checkpoints: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """diffusers' own loading of the same weights, and the FP32 graphs as ONNX Runtime opens them (so does optimum)."""
    rows = []
    references = [found for name in checkpoints[:2] if (found := reference(root, name)) is not None]
    if references:
        times = [timed(load_with_onnxruntime, one) for _ in range(rounds) for one in references]
        rows.append({"engine": "onnxruntime, fp32", **quantiles("cold", times)})
    with_unet = [path for name in checkpoints if (path := root / "checkpoints" / name / "unet").is_dir()]
    base = next((root / "bases").iterdir())
    if with_unet:
        times = [timed(load_with_diffusers, base, with_unet[0]) for _ in range(rounds + 1)][1:]
        rows.append({"engine": "diffusers (torch)", **quantiles("cold", times)})
    return rows


def reference(root: Path, checkpoint: str) -> Path | None:
    """The checkpoint's unquantised bundle, when it has one."""
    return of_bits(root, checkpoint, "fp32") or of_bits(root, checkpoint, "fp16")


def of_bits(root: Path, checkpoint: str, bits: str) -> Path | None:
    """The checkpoint's newest bundle of a kind, when it has one."""
    return next((one for one in Store(root).bundles(checkpoint) if read_manifest(one).spec.bits == bits), None)


def load_with_onnxruntime(bundle: Path) -> list[Any]:
    """Every graph of a bundle with ONNX Runtime's own settings."""
    graphs = read_manifest(bundle).graphs
    files = (graphs.text_encoder, graphs.text_rows, graphs.unet["ort"], graphs.vae_decoder)
    return [InferenceSession(str(bundle / file), providers=["CPUExecutionProvider"]) for file in files]


def load_with_diffusers(base: Path, unet: Path) -> Any:
    """UNet, VAE and text encoder as torch modules: made without memory, weights mapped in."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    made = []
    for kind, folder in ((UNet2DConditionModel, unet), (AutoencoderKL, base / "vae")):
        described = folder if (folder / "config.json").is_file() else base / folder.name
        with torch.device("meta"):
            model = kind.from_config(kind.load_config(described))
        model.load_state_dict(load_file(next(folder.glob("*.safetensors"))), assign=True, strict=False)
        made.append(model)
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(base / "text_encoder"))
    weights = load_file(next((base / "text_encoder").glob("*.safetensors")))
    text.load_state_dict(weights, assign=True, strict=False)
    return [*made, text]


def replay(
    ranking: Ranking, trace: Sequence[int], sizes: Sequence[float], costs: Sequence[float], budget: float
) -> dict[str, float]:
    """Hit rate and seconds of loading of a trace under a byte budget."""
    held: set[int] = set()
    hits, seconds = 0, 0.0
    for key in trace:
        hits += key in held
        if key not in held:
            seconds += costs[key]
            while held and sum(sizes[one] for one in held) + sizes[key] > budget:
                held.discard(int(ranking.victim([str(one) for one in held])))
            held.add(key)
        ranking.touch(str(key), sizes[key], costs[key])
    return {"hit_rate": round(hits / len(trace), 4), "load_seconds": round(seconds, 2)}


def evictions(cold: Sequence[float], n: int = 100, requests: int = 10_000) -> list[dict[str, Any]]:
    """GreedyDual beside LRU: n checkpoints of three sizes (UNet alone, SD1.5, SDXL: 1, 4 and 12), Zipf 1.0, three budgets."""
    random = np.random.default_rng(0)
    sizes = random.choice([1.0, 4.0, 12.0], n, p=[0.3, 0.5, 0.2]).tolist()
    costs = [median(cold) * (0.3 + 0.7 * size / 4) for size in sizes]
    share = 1 / np.arange(1, n + 1)
    trace = random.choice(n, requests, p=share / share.sum()).tolist()
    rows = []
    for part in (0.1, 0.25, 0.5):
        for ranking in (GreedyDual(), LeastRecent()):
            found = replay(ranking, trace, sizes, costs, part * sum(sizes))
            rows.append({"budget": part, "rule": type(ranking).__name__, **found})
    return rows


def cpu_name() -> str:
    """What the CPU calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, and of processor time: on a machine that others use too, the second says more."""

    wall: float
    cpu: float


def timed(work: Callable[..., Any], *arguments: Any) -> Took:
    started, used = time.perf_counter(), time.process_time()
    work(*arguments)
    return Took(time.perf_counter() - started, time.process_time() - used)


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def quantiles(name: str, took: Sequence[Took]) -> dict[str, Any]:
    """The times themselves and their quantiles: by the clock, and the median of processor time."""
    walls = [one.wall for one in took]
    by_clock = {f"{name}_p{p}_s": round(float(np.percentile(walls, p)), 4) for p in (50, 90, 99)}
    return {f"{name}_s": walls, **by_clock, f"{name}_cpu_p50_s": round(median([one.cpu for one in took]), 4)}


@click.command()
@click.option("--arch", type=click.Choice(["gallery", "tiny", "sd15"]), default="gallery", show_default=True)
@click.option("--repo", type=click.Path(path_type=Path), help="With --arch gallery: another repository with bundles.")
@click.option("--target", "targets", multiple=True, default=["onnxruntime", "openvino"], show_default=True)
@click.option(
    "--bits", multiple=True, default=["w8a8", "w7a8"], show_default=True, help="Not with --arch gallery: w8a8."
)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--checkpoints", "most", type=int, default=12, show_default=True, help="Of the gallery.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the random weights here and use them again.")
def main(
    arch: str,
    repo: Path | None,
    targets: tuple[str, ...],
    bits: tuple[str, ...],
    rounds: int,
    most: int,
    work: Path | None,
) -> None:
    """Time switching between checkpoints."""
    environment = draw_environment()
    if environment != dict(os.environ):  # malloc as in a server's drawing process, which reads it when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "bench.switch", *sys.argv[1:]], environment)
    with tempfile.TemporaryDirectory() as temporary:
        if arch == "gallery":
            bits = ("w8a8",)
            root, checkpoints = gallery(Repository.open(repo), most)
        else:
            root, checkpoints = random_weights(arch, work or Path(temporary), bits)
        rows = []
        for target in (target for target in targets if not missing(target)):
            for kind in bits if target == "onnxruntime" else bits[:1]:  # the others open 7 bits as they open 8
                bundles = [found for name in checkpoints if (found := of_bits(root, name, kind)) is not None]
                if not bundles:
                    raise click.ClickException(f"{root}: must have {kind} bundles, got none; run 'personalq export'")
                rows.append(measure(target, kind, bundles, rounds))
                click.echo(json.dumps(rows[-1]), err=True)
        rows += peers(root, checkpoints, rounds)
    best = min((row for row in rows if "resident_p50_ms" in row), key=lambda row: row["cold_p50_s"])
    traces = evictions(best["cold_s"])
    for row in rows:
        own = ""
        if "resident_p50_ms" in row:
            own = f"   resident {row['resident_p50_ms']:.2f} ms   first of its base {row['first_p50_s']:.3f} s"
        cold = f"cold p50 {row['cold_p50_s']:.3f} s, processor {row['cold_cpu_p50_s']:.3f} s"
        click.echo(f"{row['engine']:20} {row.get('bits', ''):5} {cold}{own}")
    for row in traces:
        click.echo(
            f"budget {row['budget']:.0%} {row['rule']:12} hit rate {row['hit_rate']:.3f} loading {row['load_seconds']} s"
        )
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    versions = {name: version(name) for name in ("onnxruntime", "numpy")}
    told = {"arch": arch, "checkpoints": len(checkpoints), "rounds": rounds, "machine": machine, "versions": versions}
    found = {
        "cold_p50_s": best["cold_p50_s"],
        "first_p50_s": best["first_p50_s"],
        "resident_p50_ms": round(best["resident_p50_ms"], 3),
        "best": best["engine"],
        "best_bits": best["bits"],
    }
    click.echo(json.dumps({**told, **found, "rows": rows, "evictions": traces}))


if __name__ == "__main__":
    main()
