"""Is the store ever inconsistent? Exports killed with SIGKILL at random moments, then looked at, then run again.

    python -m bench.kills [--exports 50] [--seed 0] [--source REPOSITORY --checkpoint ID]

Each export happens in a fork of this process, so that the kill falls into the work and not into imports. After every
kill: no bundle is visible that is not whole, `check --fix` finds leftovers only, and a rerun gives the same bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from exporters.export import export_checkpoint
from exporters.request import last_spec
from personalq.bundle import check_files, manifest_bytes, read_manifest
from personalq.repository import SHIPPED, Repository
from personalq.repository.sharing import NOTES, dangling


def killed_export(repository: Repository, checkpoint: str, spec: Path, after_s: float) -> bool:
    """Export in a fork and kill it after a while; True when the kill came before the end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            export_checkpoint(repository, checkpoint, spec)
            status = 0
        finally:
            os._exit(status)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def problems_of(repository: Repository) -> list[str]:
    """What a reader of the store would trip over now: bundles that are visible and not whole."""
    found = []
    for folder in sorted((repository.root / "bundles").glob("[!.]*")):
        found += check_files(folder, read_manifest(folder))
    return found


def leftovers(root: Path) -> list[str]:
    """What `check --fix` should have removed."""
    rooms = [root / "bundles", root / NOTES, root / "families"]
    return [str(p) for room in rooms if room.is_dir() for p in room.glob(".tmp-*")] + [
        str(note) for note in dangling(root)
    ]


def run(repository: Repository, checkpoint: str, n_exports: int, seed: int) -> dict[str, Any]:
    """Kill `n_exports` exports of one checkpoint; count what was wrong after each."""
    spec, chance = last_spec(repository, checkpoint), random.Random(seed)
    started = time.perf_counter()
    whole = export_checkpoint(repository, checkpoint, spec)
    shutil.rmtree(whole.bundle)
    export_checkpoint(repository, checkpoint, spec)  # the family is there now: this is what one export takes
    seconds, manifest = time.perf_counter() - started, manifest_bytes(read_manifest(whole.bundle))
    counts = {"killed": 0, "inconsistent": 0, "left_over": 0, "reruns_that_differ": 0}
    for _ in range(n_exports):
        shutil.rmtree(whole.bundle)
        counts["killed"] += killed_export(repository, checkpoint, spec, chance.uniform(0, 0.6 * seconds))
        counts["inconsistent"] += bool(problems_of(repository))
        others = [problem for problem in repository.check(fix=True) if problem.kind != "orphan"]
        counts["inconsistent"] += bool(others)
        counts["left_over"] += len(leftovers(repository.root))
        export_checkpoint(repository, checkpoint, spec)
        counts["reruns_that_differ"] += manifest_bytes(read_manifest(whole.bundle)) != manifest
    return {"bench": "kills", "exports": n_exports, **counts}


@click.command()
@click.option("--exports", type=int, default=50, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--source", type=click.Path(path_type=Path), default=SHIPPED, help="Repository to copy; it is not touched."
)
@click.option("--checkpoint", default="", help="Default: the first one that has a spec.")
def main(exports: int, seed: int, source: Path, checkpoint: str) -> None:
    """Kill exports at random moments and look at the store."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "repository"
        shutil.copytree(source, root, ignore=shutil.ignore_patterns("bundles", "shared", "index"))
        repository = Repository.open(root)
        named = checkpoint or next(c.id for c in repository.cards() if list((root / "specs").glob(f"{c.id}/*.json")))
        summary = run(repository, named, exports, seed)
    click.echo("  ".join(f"{key} {value}" for key, value in summary.items()))
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
