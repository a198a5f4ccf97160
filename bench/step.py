"""How long is one step of the UNet? Every engine on this CPU at real dimensions, in one run, each in its own process.

    python -m bench.step [--arch sd15|sdxl|tiny] [--batch 1 --batch 2] [--steps N] [--threads 1] [--work DIR] [--only NAME]...

ONNX Runtime and OpenVINO in FP32 and bf16 run our own unquantised graph, whose text K and V are computed outside: a
little less work than peers do. `bench export --work DIR` leaves quantize_static's graph where this finds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from bench._large import ARCHES, build
from bench._step import ENGINES

ROOT = Path(__file__).parent.parent
OURS = ("ours on onnxruntime", "ours on openvino", "ours on onnxruntime, w7a8")


def apart(*arguments: Any) -> dict[str, Any]:
    """Run bench._step in a process of its own. On failure: {'error': last line of what it said}."""
    command = [sys.executable, "-m", "bench._step", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"error": said[-1][:300]}
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return made


def summary_of(rows: list[dict[str, Any]], batch: int, clock: str) -> dict[str, Any]:
    """The ratios of one batch size by one clock ('median_s' or 'median_cpu_s'); what is missing is left out."""
    medians = {row["engine"]: row[clock] for row in rows if row["batch"] == batch and clock in row}
    ours = [medians[name] for name in OURS if name in medians]
    ratios: dict[str, Any] = {}
    if ours and "onnxruntime fp32" in medians:
        ratios["best_over_ort_fp32"] = round(min(ours) / medians["onnxruntime fp32"], 4)
    if ours and "openvino bf16" in medians:
        ratios["best_over_openvino_bf16"] = round(min(ours) / medians["openvino bf16"], 4)
    if OURS[0] in medians and "onnxruntime fp32" in medians:
        ratios["ort_over_ort_fp32"] = round(medians[OURS[0]] / medians["onnxruntime fp32"], 4)
    return ratios


def roofline(bundle: Path, threads: int) -> dict[str, Any]:
    """The profile of one step of ours on ONNX Runtime, and how long its integer products would take at the peak."""
    profile, peak = apart("profile", bundle, 1, 0, threads), apart("peak", bundle, 1, 0, threads)
    if "error" in profile or "error" in peak:
        return {"roofline_error": profile.get("error") or peak.get("error")}
    integer = sum(n["multiply_adds"] for n in profile["nodes"] if n["op"] in ("QLinearConv", "MatMulIntegerToFloat"))
    limit = integer / peak["int8_peak"]
    return {
        "profile": profile["nodes"],
        "int8_multiply_adds": integer,
        "int8_peak_per_s": round(peak["int8_peak"]),
        "limit_s": round(limit, 4),
    }


@click.command()
@click.option("--arch", type=click.Choice(list(ARCHES)), default="sd15", show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=[1, 2], show_default=True)
@click.option("--steps", type=int, default=5, show_default=True)
@click.option("--threads", type=int, default=0, show_default=True, help="0: every core. 1: ratios of processor time.")
@click.option("--only", type=click.Choice(list(ENGINES)), multiple=True, help="Only these engines.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep everything here and use it again.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON here.")
def main(
    arch: str,
    batches: tuple[int, ...],
    steps: int,
    threads: int,
    only: tuple[str, ...],
    work: Path | None,
    out: Path | None,
) -> None:
    """Time one UNet step on every engine."""
    from exporters.export import export_checkpoint
    from runtime.engines.openvino import device_name

    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)) / arch
        large = build(folder, arch, lambda text: click.echo(text, err=True))
        bundles = {
            name: export_checkpoint(large.repository, "next", large.spec("next", name)).bundle
            for name in ("fp32", "w8a8", "w7a8")
        }
        rows = []
        for batch in batches:
            for name in only or ENGINES:
                row = {"engine": name, "batch": batch, **apart(name, bundles[ENGINES[name][0]], batch, steps, threads)}
                rows.append(row)
                told = row.get("error") or f"{row['median_s']:.3f} s, processor {row['median_cpu_s']:.3f} s"
                click.echo(f"{name:32} batch {batch}  {told}")
        clock = "median_cpu_s" if threads == 1 else "median_s"
        summary = {"bench": "step", "arch": arch, "clock": clock, "rows": rows, **summary_of(rows, batches[0], clock)}
        summary |= {f"batch_{batch}": summary_of(rows, batch, clock) for batch in batches}
        summary |= roofline(bundles["w8a8"], threads) if not only or OURS[0] in only else {}
    summary["machine"] = f"{device_name()}, {os.cpu_count()} cores"
    summary["versions"] = {name: version(name) for name in ("onnxruntime", "openvino", "torch", "diffusers")}
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
