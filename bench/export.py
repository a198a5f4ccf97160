"""What does one more checkpoint cost? Export of a known family beside ONNX Runtime's own quantiser, at real dimensions.

    python -m bench.export [--arch sd15|sdxl|tiny] [--work DIR] [--no-peer]

Every figure is a process of its own: wall time and peak resident memory. `trace` is what a family costs that PersonalQ does
not ship (torch), `next` another checkpoint of a known one (no torch), `quantize_static` is the peer: the FP32 UNet with
attention left out, one sample. What is read lies in the page cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from bench._large import ARCHES, Large, build
from personalq.bundle import MANIFEST, file_sha256, read_manifest

ROOT = Path(__file__).parent.parent
EXPORT = """
import json, sys
from pathlib import Path
from exporters.export import export_checkpoint
from personalq.repository import Repository
made = export_checkpoint(Repository.open(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
heavy = sorted({"torch", "diffusers", "transformers"} & set(sys.modules))
print(json.dumps({"bytes": made.bytes, "bytes_fp16": made.bytes_fp16, "bundle": str(made.bundle), "imported": heavy}))
"""
TRACE = """
import json, sys
from pathlib import Path
from exporters.graphs.family import write_family
from personalq.architecture import family_key, read_configs
configs = read_configs(Path(sys.argv[1]))
write_family(Path(sys.argv[2]), family_key(configs), configs)
print("{}")
"""
PEER = """
import json, sys
from pathlib import Path
import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
source, target, feeds = Path(sys.argv[1]), Path(sys.argv[2]), dict(np.load(sys.argv[3]))
class One(CalibrationDataReader):
    left = [feeds]
    def get_next(self):
        return self.left.pop() if self.left else None
graph = onnx.load(source, load_external_data=False).graph
weights = {tensor.name for tensor in graph.initializer}
turned = {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights}
attention = [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] not in weights | turned]
quantize_static(source, target, One(), quant_format=QuantFormat.QDQ, per_channel=True, use_external_data_format=True,
    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "MatMul", "Gemm"],
    nodes_to_exclude=attention)
print("{}")
"""
# The most this process held, by the kernel's count that begins at exec (wait4's ru_maxrss starts at the parent's peak), and
# the processor time of all its threads, which says something on a machine that others use too.
COST = """
import time
from pathlib import Path
lines = Path("/proc/self/status").read_text().splitlines()
print(time.process_time(), next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def measured(code: str, *arguments: Any) -> dict[str, Any]:
    """Run Python code in a process of its own; its JSON line, wall and processor seconds, peak resident bytes."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + COST, *map(str, arguments)], stdout=subprocess.PIPE, cwd=ROOT)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(f"a measured process ended with {done.returncode}; its message is above")
    *_, told, cost = done.stdout.decode().strip().splitlines()
    cpu, kilobytes = cost.split()
    clocks = {"seconds": round(seconds, 2), "cpu_seconds": round(float(cpu), 2)}
    return {**json.loads(told), **clocks, "peak_rss_bytes": int(kilobytes) * 1024}


def measure(folder: Path, arch: str, with_peer: bool, progress: Any) -> list[dict[str, Any]]:
    """Rows {step, seconds, peak_rss_bytes, ...} of one architecture."""
    from bench._large import BASE, write_configs

    rows = []
    write_configs(folder / "bases" / BASE, arch)
    if not (folder / "families").is_dir():
        progress("tracing")
        with tempfile.TemporaryDirectory() as traced:
            rows.append({"step": "trace", **measured(TRACE, folder / "bases" / BASE, traced)})
    large = build(folder, arch, progress)
    for step, checkpoint in (("first checkpoint", "first"), ("next checkpoint", "next")):
        spec = large.spec(checkpoint, "w8a8")
        forget(folder, checkpoint)
        read_once(folder / "bases", folder / "checkpoints" / checkpoint)
        progress(step)
        rows.append({"step": step, **measured(EXPORT, folder, checkpoint, spec)})
    if with_peer:
        rows.append(peer(large, folder, progress))
    return rows


def read_once(*folders: Path) -> None:
    """Bring weights into the page cache, where the peer finds its graph, just written: the disk is not what is compared."""
    for file in (file for folder in folders for file in folder.rglob("*.safetensors")):
        file_sha256(file)


def forget(folder: Path, checkpoint: str) -> None:
    """Remove an earlier run's W8A8 bundle: an export that finds it would write nothing."""
    for file in (folder / "bundles").glob(f"*/{MANIFEST}"):
        manifest = read_manifest(file.parent)
        if (manifest.checkpoint.id, manifest.spec.name) == (checkpoint, "w8a8"):
            shutil.rmtree(file.parent)


def peer(large: Large, folder: Path, progress: Any) -> dict[str, Any]:
    """ONNX Runtime's static quantiser on the FP32 graph of the same checkpoint."""
    from bench._step import feeds
    from exporters.export import export_checkpoint

    progress("writing the FP32 graph")
    bundle = export_checkpoint(large.repository, "next", large.spec("next", "fp32")).bundle
    import numpy as np

    sample = folder / "sample.npz"
    np.savez(sample, **feeds(bundle, batch=1))
    target = folder / "peer" / "unet.onnx"
    target.parent.mkdir(exist_ok=True)
    progress("quantize_static")
    return {"step": "quantize_static", **measured(PEER, bundle / "unet.ort.onnx", target, sample)}


@click.command()
@click.option("--arch", type=click.Choice(list(ARCHES)), default="sd15", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep everything here and use it again.")
@click.option("--peer/--no-peer", default=True, show_default=True, help="Also run quantize_static (SD1.5: 18 GB).")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON here.")
def main(arch: str, work: Path | None, peer: bool, out: Path | None) -> None:
    """Measure the export of one more checkpoint."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)) / arch
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, arch, peer, lambda text: click.echo(text, err=True))
    steps = {row["step"]: row for row in rows}
    summary: dict[str, Any] = {"bench": "export", "arch": arch, "rows": rows}
    if "quantize_static" in steps:
        ours, theirs = steps["next checkpoint"], steps["quantize_static"]
        summary["time_ratio"] = round(ours["seconds"] / theirs["seconds"], 4)
        summary["memory_ratio"] = round(ours["peak_rss_bytes"] / theirs["peak_rss_bytes"], 4)
    summary["memory_over_fp16"] = round(
        steps["next checkpoint"]["peak_rss_bytes"] / steps["next checkpoint"]["bytes_fp16"], 4
    )
    for row in rows:
        clocks = f"{row['seconds']:8.1f} s  processor {row['cpu_seconds']:8.1f} s"
        click.echo(f"{row['step']:18} {clocks}  {row['peak_rss_bytes'] / 1e9:6.2f} GB")
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
