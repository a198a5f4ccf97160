"""Does a cluster give the bytes that one process gives, also when a worker dies? The gallery's checkpoints on two Ray nodes.

    python -m bench.fleet [--checkpoints 12] [--spec NAME] [--threads 1] [--work DIR]

Three copies of the repository, each exported from nothing but `families/`: one checkpoint after the other in one process;
on a cluster of two nodes of this machine (ray.cluster_utils); there again, with a worker killed (SIGKILL) in the middle.
Every file of every bundle is compared by sha256. The first two calibrate, the third takes the specs of the first; with
--keep-specs all three take those of --source, and nothing is calibrated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from fleet.cluster import Cluster, Needs
from fleet.pool import Pool
from fleet.run import Summary, Workers, run_fleet
from fleet.verified import NOTE
from fleet.work import Work, spec_name
from personalq.bundle import file_sha256
from personalq.repository import SHIPPED, Repository

MADE_HERE = ("bundles", "shared", "specs", "index", "engines")


def fresh(source: Path, root: Path, *more: str) -> Path:
    """A copy of a repository in which nothing was exported yet; more: rooms of `MADE_HERE` to take over."""
    left_out = [room for room in MADE_HERE if room not in more]
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(*left_out))
    return root


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file of every bundle; the gate's notes are not part of a bundle."""
    place = root / "bundles"
    files = [file for file in sorted(place.glob("[!.]*/**/*")) if file.is_file()]  # a killed export leaves .tmp-*
    return {str(file.relative_to(place)): file_sha256(file) for file in files if file.name != NOTE}


@contextlib.contextmanager
def two_nodes(work: Work, memory_bytes: int) -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, each with the cores of one export."""
    from ray.cluster_utils import Cluster as Made

    size = {"num_cpus": work.threads, "memory": memory_bytes, "object_store_memory": 100 << 20}
    made = Made(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    made.add_node(**size)
    try:
        yield made
    finally:
        made.shutdown()


def busy_workers() -> list[int]:
    """Processes of Ray that are doing a task; Ray writes its name into the title."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith((b"ray::personalq", b"ray::_do")):
                found.append(int(folder.name))
    return found


def kill_one(after: Path) -> None:
    """Kill a busy worker once the first bundle is there."""
    while not list(after.glob("bundles/*/manifest.json")) or not (busy := busy_workers()):
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.kill(busy[0], signal.SIGKILL)


def export(work: Work, ids: list[str], workers: Workers) -> Summary:
    with contextlib.redirect_stdout(sys.stderr):
        return run_fleet(work, ids, workers, 2, lambda text, _: click.echo(text, err=True))


def row(name: str, summary: Summary) -> dict[str, Any]:
    """What one of the three runs took."""
    made = summary.of("done")
    return {
        "run": name,
        "seconds": round(summary.seconds, 1),
        "done": len(made),
        "failed": [one.to_json() for one in summary.of("failed")],
        "attempts": sum(one.attempts for one in summary.outcomes),
        "bytes": sum(one.bytes for one in made),
        "bytes_shared": summary.bytes_shared,
        "seconds_each": {one.id: {step: round(value, 2) for step, value in one.seconds.items()} for one in made},
    }


@click.command()
@click.option("--source", type=click.Path(path_type=Path), default=SHIPPED, help="Repository; it is not touched.")
@click.option("--checkpoints", "most", type=int, default=12, show_default=True)
@click.option("--spec", type=click.Path(path_type=Path), help="As of export --all. Default: taq-w8a8, calibrated.")
@click.option("--threads", type=int, default=1, show_default=True, help="Cores of one export, and of one node.")
@click.option("--verify", default="none", show_default=True, help="The gate's last level.")
@click.option("--memory-mb", type=float, default=4000.0, show_default=True, help="Of one node, and of one export.")
@click.option("--keep-specs", is_flag=True, help="Take the specs of --source.")
@click.option("--work", "place", type=click.Path(path_type=Path), help="Keep the three repositories here.")
def main(
    source: Path,
    most: int,
    spec: Path | None,
    threads: int,
    verify: str,
    memory_mb: float,
    keep_specs: bool,
    place: Path | None,
) -> None:
    """Export the same checkpoints three times and compare every byte."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = place or Path(temporary)
        kept = ("specs",) if keep_specs else ()
        first = fresh(source, folder / "sequential", *kept)
        ids = [entry.card.id for entry in Repository.open(first).entries() if entry.has_weights][:most]
        memory = round(memory_mb * 1e6)

        def work_in(root: Path) -> Work:
            return Work(str(root), spec=spec_name(spec), form="merged", verify=verify, threads=threads)

        rows = [row("one process", export(work_in(first), ids, Pool(work_in(first), 1)))]
        wanted = digests(first)
        second, third = fresh(first, folder / "cluster", *kept), fresh(first, folder / "killed", "specs")
        needs = Needs(threads, 0.0, memory)
        with two_nodes(work_in(second), memory) as made:
            rows.append(row("two nodes", export(work_in(second), ids, Cluster(work_in(second), made.address, needs))))
            killer = threading.Thread(target=kill_one, args=(third,), daemon=True)
            killer.start()
            rows.append(
                row("a worker killed", export(work_in(third), ids, Cluster(work_in(third), made.address, needs)))
            )
        found = {
            "identical": digests(second) == wanted and len(wanted) > 0,
            "identical_after_kill": digests(third) == wanted and not killer.is_alive(),
        }
    for one in rows:
        click.echo(f"{one['run']:16} {one['seconds']:8.1f} s  done {one['done']}  attempts {one['attempts']}")
    versions = {name: version(name) for name in ("ray", "numpy", "torch")}
    told = {"bench": "fleet", "checkpoints": len(ids), "files": len(wanted), "cores": os.cpu_count()}
    click.echo(json.dumps({**told, "versions": versions, **found, "rows": rows}))


if __name__ == "__main__":
    main()
