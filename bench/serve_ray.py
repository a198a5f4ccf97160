"""Do replicas on Ray hit more engines when requests go to who holds them? Zipf requests over a repository with bundles.

    python -m bench.serve_ray --repo DIR [--checkpoints 12] [--budget-mb X] [--seconds 60] [--rounds 3] [--clients 4]

Two replicas of one core, each on a node of its own (ray.cluster_utils), behind the real HTTP interface; a budget that holds
about half of the engines. Deployed anew for every round, in turn with the router of `personalq serve --on ray` and with
one that picks a replica at random; the first part of each round fills the memories and is not counted.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.fleet import two_nodes
from bench.serve import Load, Server, drive
from fleet.cluster import Replicas, connect, ray_module
from fleet.serve import NAME
from fleet.work import Work
from personalq.repository import Repository
from runtime.serving.options import DrawOptions, Limits, ServeOptions
from runtime.store import Store

SETTLE_S = 4.0  # what replicas hold reaches the server about two seconds later
WARM_UP = 0.3  # of a round's seconds


class Deployed(Server):
    """The application on a cluster that is connected already; its methods are those of a server of one machine."""

    def __init__(self, options: ServeOptions, router: type) -> None:
        self.port, self._options, self._router = options.port, options, router

    def __enter__(self) -> Deployed:
        from ray import serve

        from fleet.deployments import application

        serve.run(application(self._options, Replicas(2, 2, 1, 0.0), self._router), name=NAME)
        return self

    def __exit__(self, *_: object) -> None:
        from ray import serve

        serve.delete(NAME)

    def counts(self) -> dict[str, int]:
        time.sleep(SETTLE_S)
        found: dict[str, int] = self.residency()["counts"]
        return found


@contextmanager
def cluster(port: int) -> Iterator[None]:
    """Two nodes of one core, connected, with Ray Serve's HTTP server."""
    ray = ray_module()
    from ray import serve

    with two_nodes(Work("", threads=1), 4 << 30) as made:
        connect(ray, made.address)
        serve.start(proxy_location="HeadOnly", http_options={"port": port})
        try:
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def measure(server: Deployed, checkpoints: list[str], clients: int, seconds: float, steps: int) -> dict[str, Any]:
    """One round: what was hit and drawn after the warm-up."""
    drive(server, checkpoints, clients, WARM_UP * seconds, steps)
    before = server.counts()
    load = drive(server, checkpoints, clients, seconds, steps)
    after = server.counts()
    held = [(row["replica"], row["checkpoint"]) for row in server.residency()["engines"]]
    hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": round(hits / max(hits + misses, 1), 4),
        **speed(load),
        "codes": dict(load.codes),
        "held": len(held),
        "held_twice": len(held) - len({checkpoint for _, checkpoint in held}),
    }


def speed(load: Load) -> dict[str, float]:
    return {
        "pictures_per_s": round(len(load.seconds) / load.elapsed, 3),
        "p50_s": round(float(np.percentile(load.seconds, 50)), 3),
        "p95_s": round(float(np.percentile(load.seconds, 95)), 3),
    }


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), as if requests were independent."""
    share, a = hits / n, z * z / n
    middle, half = share + a / 2, z * np.sqrt(share * (1 - share) / n + a / (4 * n))
    return round(float((middle - half) / (1 + a)), 4), round(float((middle + half) / (1 + a)), 4)


def summary(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    hits, misses = (sum(one[key] for one in rounds) for key in ("hits", "misses"))
    low, high = wilson(hits, hits + misses)
    means = {
        key: round(float(np.mean([one[key] for one in rounds])), 3) for key in ("pictures_per_s", "p50_s", "p95_s")
    }
    rates = {"hit_rate": round(hits / (hits + misses), 4), "hit_rate_low": low, "hit_rate_high": high}
    return {"routing": name, "lookups": hits + misses, **rates, **means}


@click.command()
@click.option("--repo", type=click.Path(path_type=Path), help="Repository with bundles. Default: the gallery.")
@click.option("--checkpoints", "most", type=int, default=12, show_default=True)
@click.option("--budget-mb", type=float, default=150.0, show_default=True, help="Of each replica, for engines.")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Of one round, after its warm-up.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--clients", type=int, default=4, show_default=True)
@click.option("--steps", type=int, default=4, show_default=True)
def main(repo: Path | None, most: int, budget_mb: float, seconds: float, rounds: int, clients: int, steps: int) -> None:
    """Routed and random in turn, then the table."""
    root = Repository.open(repo).root
    checkpoints = sorted(Store(root).drawable())[:most]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    draw = DrawOptions(root, budget_mb=budget_mb, threads=1)
    options = ServeOptions(draw, port=port, limits=Limits(queue=8 * clients))
    with cluster(port):
        from bench._random_router import RandomRouter
        from fleet.routing import HolderRouter

        made: dict[str, list[dict[str, Any]]] = {"routed": [], "random": []}
        for turn in range(rounds):
            for name, router in (("routed", HolderRouter), ("random", RandomRouter))[:: 1 if turn % 2 == 0 else -1]:
                with Deployed(options, router) as server:
                    made[name].append(measure(server, checkpoints, clients, seconds, steps))
                click.echo(f"{name}: {made[name][-1]}", err=True)
    rows = [summary(name, each) for name, each in made.items()]
    for one in rows:
        interval = f"{one['hit_rate_low']:.3f}-{one['hit_rate_high']:.3f}"
        click.echo(
            f"{one['routing']:8} hits {one['hit_rate']:.3f} ({interval}) of {one['lookups']}  {one['pictures_per_s']:.2f}/s"
        )
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "ray": version("ray")}
    told = {"checkpoints": len(checkpoints), "replicas": 2, "budget_mb": budget_mb, "clients": clients, "steps": steps}
    click.echo(json.dumps({"bench": "serve_ray", **told, "seconds": seconds, "machine": machine, "rows": rows, **made}))


if __name__ == "__main__":
    main()
