"""How long until a bundle of a store at a URL can draw, the first time and afterwards?

    python -m bench.store --repo DIR --url s3://bucket/place [--checkpoints 4]      # AWS_ENDPOINT, ... as for export --store

Publishes the bundles of a repository, then opens each as `serve --store` does: into an empty cache (fetched, every file
compared with its sha256, loaded), and again from that cache.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import click

from personalq.repository import Repository
from personalq.repository.remote import Remote
from runtime.cache import take_cards
from runtime.drawing.pipeline import Pipeline
from runtime.engines.engine import open_engine
from runtime.store import open_store


def opened(root: Path, url: str, checkpoint: str, target: str) -> tuple[float, float]:
    """Seconds to have the files here, and to load the engine from them."""
    store = open_store(root, url, 20_000.0)
    started = time.perf_counter()
    found = store.find(checkpoint, target)
    store.ensure(found.bundle)
    fetched = time.perf_counter()
    Pipeline(open_engine(found.engine_name, found.bundle))
    return fetched - started, time.perf_counter() - fetched


@click.command()
@click.option("--repo", type=click.Path(path_type=Path), help="Repository with bundles. Default: the gallery.")
@click.option("--url", required=True, help="Where to publish them.")
@click.option("--checkpoints", "most", type=int, default=4, show_default=True)
@click.option("--target", default="onnxruntime", show_default=True)
def main(repo: Path | None, url: str, most: int, target: str) -> None:
    """Publish, then open cold and warm."""
    full, remote, rows = Repository.open(repo), Remote(url), []
    ids = [entry.card.id for entry in full.entries() if full.bundles(entry.card.id)][:most]
    for one in ids:
        started = time.perf_counter()
        remote.publish(full.bundles(one)[0], full.card(one))
        rows.append({"checkpoint": one, "publish_s": time.perf_counter() - started})
    with tempfile.TemporaryDirectory() as folder:
        here = Repository.open(Path(folder) / "here", create=True)
        take_cards(here, remote)
        for row in rows:
            row["fetch_s"], row["load_s"] = opened(here.root, url, str(row["checkpoint"]), target)
            row["warm_fetch_s"], row["warm_load_s"] = opened(here.root, url, str(row["checkpoint"]), target)
        fetched = sum(file.stat().st_size for file in (here.root / "cache").rglob("*") if file.is_file())
    names = ("publish_s", "fetch_s", "load_s", "warm_fetch_s", "warm_load_s")
    medians = {name: round(statistics.median(float(row[name]) for row in rows), 3) for name in names}
    for name, value in medians.items():
        click.echo(f"{name:14} {value:.3f}")
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    click.echo(
        json.dumps({"bench": "store", "url": url, **medians, "cache_bytes": fetched, "machine": machine, "rows": rows})
    )


if __name__ == "__main__":
    main()
