"""Does the TensorRT graph compile, and does every layer run in what its spec says? On a machine without a GPU.

    python -m bench.trt [BUNDLE...] [--sm sm86,sm89,sm120] [--set batch=1] [--lib DIR] [--out FILE.json]

Each bundle's unet.trt.onnx goes through the real TensorRT-for-RTX builder (tools/trt_aot.py; the wheel
onnxruntime-ep-nv-tensorrt-rtx-cu13 holds its libraries), and its engine is held against the spec's census. Without
BUNDLE: every bundle of the gallery. Types are what is measured; no engine is run, so neither speed nor numbers are.
"""

from __future__ import annotations

import json
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


def measure(bundle: Path, architectures: str, lib: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """One bundle: its spec's census, what the engine runs, what differs, what the lint says, and sizes."""
    manifest, graph = read_manifest(bundle), bundle / GRAPH
    shapes = {name: three[1] for name, three in graph_shapes(bundle, read_settings(settings)).items()}
    report = compile_graph(graph, shapes, architectures, lib)
    layers, wanted = from_aot(report), layer_kinds(ir.load(graph))
    keys = ("tensorrt_rtx", "parse_s", "build_s", "peak_rss_mb", "engine_bytes", "engine_precision", "totals")
    return {
        "checkpoint": manifest.checkpoint.id,
        "spec": manifest.spec.name,
        "census": manifest.census,
        "engine": table(layers, wanted),
        "mismatches": mismatches(layers, wanted),
        "lint": [one.line() for one in lint_trt(graph, tuple(architectures.split(",")))],
        **{key: report[key] for key in keys},
    }


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--sm", "architectures", default="sm86,sm89,sm120", show_default=True, help="One engine for all of these."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Shapes, as in 'personalq export --set'.")
@click.option("--lib", default="", help="Folder of the builder's libraries. Default: $TRT_RTX_DIR or the wheel.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON here.")
def main(bundles: tuple[Path, ...], architectures: str, settings: tuple[str, ...], lib: str, out: Path | None) -> None:
    """Compile bundles and hold their engines against their specs; exit 1 when a layer runs in another type."""
    places = bundles or tuple(sorted(file.parent for file in (SHIPPED / "bundles").glob(f"*/{GRAPH}")))
    if not places:
        raise click.ClickException(f"bundles: must be at least one with {GRAPH}, got none; run 'personalq export ID'")
    rows = []
    for bundle in places:
        rows.append(row := measure(bundle, architectures, lib, settings))
        click.echo(f"{row['checkpoint']} {row['spec']}: {row['engine_bytes'] / 1e6:.1f} MB, {row['build_s']} s")
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
