"""How long does `add` take for a folder of many mixed files, and is each of them reported?

    python -m bench.add [--files N] [--out FILE.json]

The files are made from the gallery's LoRA: LoRAs in two spellings, embeddings, broken files, pickles, a one-file model of
another architecture. They are added by the real command, as a process, over the gallery's base.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import load_file, save_file

from personalq.repository import SHIPPED

ROOT = Path(__file__).parent.parent
CODE = "from cli import main; main()"
SOURCE = "rusty-the-robot"


def lora(folder: Path, number: int, rng: np.random.Generator) -> None:
    """A LoRA of the gallery's size with values of its own."""
    (file,) = (SHIPPED / "checkpoints" / SOURCE).glob("*.safetensors")
    tensors = {name: (value * rng.normal(1, 0.1)).astype(np.float16) for name, value in load_file(file).items()}
    save_file(tensors, folder / f"lora-{number:03}.safetensors")


def embedding(folder: Path, number: int, rng: np.random.Generator) -> None:
    """An embedding of two vectors, as A1111 writes it."""
    vectors = rng.normal(0, 0.02, (2, 128)).astype(np.float16)
    save_file({"emb_params": vectors}, folder / f"style-{number:03}.safetensors")


def broken(folder: Path, number: int, rng: np.random.Generator) -> None:
    """A download that was cut off."""
    (folder / f"broken-{number:03}.safetensors").write_bytes(rng.bytes(1000))


def pickle(folder: Path, number: int, rng: np.random.Generator) -> None:
    """What begins as a pickle does."""
    (folder / f"old-{number:03}.ckpt").write_bytes(b"\x80\x04" + rng.bytes(100))


def another(folder: Path, number: int, rng: np.random.Generator) -> None:
    """A part of a one-file model that is no Stable Diffusion of the base."""
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": rng.normal(0, 1, (320, 4, 3, 3)).astype(np.float16)}
    save_file(tensors, folder / f"model-{number:03}.safetensors")


MIXTURE: tuple[Callable[[Path, int, np.random.Generator], None], ...] = (
    lora,
    lora,
    embedding,
    lora,
    broken,
    pickle,
    lora,
    another,
)


@click.command()
@click.option("--files", "n_files", type=int, default=200, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON here.")
def main(n_files: int, out: Path | None) -> None:
    """Add a folder of mixed files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, repository = folder / "downloads", folder / "repository"
        source.mkdir()
        shutil.copytree(SHIPPED / "bases", repository / "bases")
        rng = np.random.default_rng(0)
        for number in range(n_files):
            MIXTURE[number % len(MIXTURE)](source, number, rng)
        command = [
            sys.executable,
            "-c",
            CODE,
            "--repo",
            str(repository),
            "add",
            str(source),
            "--base",
            "toyworld",
            "--json",
        ]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = json.loads(done.stdout)
    summary = {
        "bench": "add",
        "files": n_files,
        "added": len(told["added"]),
        "refused": len(told["refused"]),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    click.echo(f"{n_files} files: {summary['added']} added, {summary['refused']} refused, {seconds:.2f} s")
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
