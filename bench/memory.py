"""Is calibration's memory flat in the number of samples? Peak resident memory, doubling the prompts, a fresh process each.

python -m bench.memory [--repo DIR] [--id ID] [--samples 4,8,16] [--out FILE.json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from personalq.repository.atomic import write_atomic


def calibrated(repo: Path, checkpoint_id: str, samples: int) -> dict[str, Any]:
    """Calibrate in this process by a policy that collects everything (histograms, rows, Hessians); nothing saved is reused."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from personalq.repository import Repository

    with tempfile.TemporaryDirectory() as folder:
        for name in ("bases", "checkpoints"):
            (Path(folder) / name).symlink_to(repo.resolve() / name)
        options = CalibrateOptions(policy="gptq", bits="w4a8", samples=samples)
        made = calibrate(Repository.open(Path(folder)), checkpoint_id, options)
    return {"samples": samples, "seconds": round(made.seconds, 1), "peak_rss_bytes": made.peak_rss_bytes}


def in_own_process(repo: Path, checkpoint_id: str, samples: int) -> dict[str, Any]:
    """`calibrated`, so that no earlier peak is counted."""
    command = [sys.executable, "-m", "bench.memory", "--repo", str(repo), "--id", checkpoint_id, "--one", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@click.command()
@click.option("--repo", type=click.Path(path_type=Path, exists=True), default=Path("gallery/repository"))
@click.option("--id", "checkpoint_id", default="domino-the-dog", show_default=True)
@click.option("--samples", default="4,8,16", show_default=True)
@click.option("--one", type=int, hidden=True)
@click.option("--out", type=click.Path(path_type=Path), help="also write the JSON here")
def main(repo: Path, checkpoint_id: str, samples: str, one: int | None, out: Path | None) -> None:
    """Print samples, seconds and peak memory, then one JSON object as the last line."""
    if one is not None:
        click.echo(json.dumps(calibrated(repo, checkpoint_id, one)))
        return
    rows = []
    for count in (int(part) for part in samples.split(",")):
        rows.append(in_own_process(repo, checkpoint_id, count))
        click.echo(f"{count:4} samples  {rows[-1]['seconds']:7.1f} s  {rows[-1]['peak_rss_bytes'] / 1e6:7.0f} MB")
    growth = rows[-1]["peak_rss_bytes"] / rows[0]["peak_rss_bytes"]
    summary = {"bench": "memory", "checkpoint": checkpoint_id, "rows": rows, "largest_over_first": round(growth, 3)}
    if out:
        write_atomic(out, json.dumps(summary).encode())
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
