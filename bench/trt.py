"""Does the TensorRT graph compile, and does every layer run in what its spec says? On a machine without a GPU.

    python -m bench.trt [BUNDLE...] [--sm sm86,sm89,sm120] [--each] [--set batch=1] [--lib DIR] [--out FILE.json]

Each bundle's unet.trt.onnx, and those of a base that take adapters, go through the real TensorRT-for-RTX builder
(tools/trt_aot.py; the wheel onnxruntime-ep-nv-tensorrt-rtx-cu13 holds its libraries); each engine is held against the spec's
census. Without BUNDLE: every bundle of the gallery. A row for each graph, and with --each for each architecture. Types and
memory are what is measured; no engine is run, so neither speed nor numbers are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir

from exporters.graphs.census import layer_kinds
from exporters.lint import lint_trt
from exporters.targets.engine_layers import from_aot, mismatches, table
from exporters.targets.settings import read_settings
from exporters.targets.tensorrt import GRAPH, graph_shapes
from personalq.bundle import read_manifest
from personalq.repository import SHIPPED

TOOL = Path(__file__).parent.parent / "tools" / "trt_aot.py"


def compile_graph(graph: Path, shapes: dict[str, tuple[int, ...]], architectures: str, lib: str) -> dict[str, Any]:
    """What tools/trt_aot.py reports about one graph, at static shapes. Raises ClickException when it does not build."""
    options = [f"--shape={name}={'x'.join(map(str, sides))}" for name, sides in shapes.items()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(TOOL), str(graph), f"--sm={architectures}", f"--json={report}", *options]
        done = subprocess.run(
            [*command, *([f"--lib={lib}"] if lib else [])], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr + done.stdout).strip().splitlines()
            raise click.ClickException(f"{graph}: {said[0] if said else 'no message'}")
        return dict(json.loads(report.read_text()))


def measure(bundle: Path, file: str, architectures: str, lib: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """One graph: its spec's census, what the engine runs, what differs, what the lint says, and sizes."""
    manifest, graph = read_manifest(bundle), bundle / file
    shapes = {name: three[1] for name, three in graph_shapes(bundle, read_settings(settings), file).items()}
    report = compile_graph(graph, shapes, architectures, lib)
    layers, wanted = from_aot(report), layer_kinds(ir.load(graph))
    keys = ("tensorrt_rtx", "parse_s", "build_s", "peak_rss_mb", "engine_bytes", "engine_precision", "totals")
    return {
        "checkpoint": manifest.checkpoint.id,
        "spec": manifest.spec.name,
        "graph": file,
        "architectures": architectures,
        "rank": rank_of(file),
        "census": manifest.census,
        "engine": table(layers, wanted),
        "kernels": len(layers),
        "activation_bytes": activation_bytes(report["totals"]),
        "mismatches": mismatches(layers, wanted),
        "lint": [one.line() for one in lint_trt(graph, tuple(architectures.split(",")))],
        **{key: report[key] for key in keys},
    }


def rank_of(file: str) -> int:
    """Of the adapters that a graph takes: unet.trt_rank16.onnx."""
    found = re.search(r"rank(\d+)", file)
    return int(found.group(1)) if found else 0


def activation_bytes(totals: list[str]) -> int | None:
    """What an engine needs at run time besides weights, by the builder's own account; the largest of its architectures."""
    found = [re.search(r"Activation Memory: (\d+)", line) for line in totals]
    return max((int(one.group(1)) for one in found if one), default=None)


def graphs_of(bundle: Path) -> list[str]:
    """A bundle's graphs for TensorRT, the one without adapters first."""
    files = [file for lowering, file in read_manifest(bundle).graphs.unet.items() if lowering.startswith("trt")]
    return sorted(files, key=rank_of)


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--sm", "architectures", default="sm86,sm89,sm120", show_default=True, help="One engine for all of these."
)
@click.option("--each", is_flag=True, help="An engine for each architecture instead.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Shapes, as in 'personalq export --set'.")
@click.option("--lib", default="", help="Folder of the builder's libraries. Default: $TRT_RTX_DIR or the wheel.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON here.")
def main(
    bundles: tuple[Path, ...],
    architectures: str,
    each: bool,
    settings: tuple[str, ...],
    lib: str,
    out: Path | None,
) -> None:
    """Compile bundles and hold their engines against their specs; exit 1 when a layer runs in another type."""
    places = bundles or tuple(sorted(file.parent for file in (SHIPPED / "bundles").glob(f"*/{GRAPH}")))
    if not places:
        raise click.ClickException(f"bundles: must be at least one with {GRAPH}, got none; run 'personalq export ID'")
    rows: list[dict[str, Any]] = []
    engines = architectures.split(",") if each else [architectures]
    for bundle, engine, file in ((b, e, f) for b in places for e in engines for f in graphs_of(b)):
        rows.append(row := measure(bundle, file, engine, lib, settings))
        told = f"{row['engine_bytes'] / 1e6:.1f} MB, {row['kernels']} kernels, {row['build_s']} s"
        memory = f"activations {(row['activation_bytes'] or 0) / 1e6:.1f} MB"
        click.echo(f"{row['checkpoint']} {row['spec']} {file} {engine}: {told}, {memory}")
        for kind, number in row["engine"].items():
            click.echo(f"  {number:5d}  {kind}")
        for line in [*row["mismatches"], *row["lint"]]:
            click.echo(f"  {line}")
    summary = {"bench": "trt", "architectures": architectures, "rows": rows}
    summary["mismatches"] = sum(len(row["mismatches"]) for row in rows)
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))
    sys.exit(1 if summary["mismatches"] else 0)


if __name__ == "__main__":
    main()
