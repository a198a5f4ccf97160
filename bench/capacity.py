"""How many replicas, how much memory, how much disk for 1 000 or 100 000 checkpoints? Measured here, then replayed.

    python -m bench.capacity [--repo DIR] [--target NAME] [--budget-mb 2000] [--rate R]... [--zipf S]... [--wait 2.0]
    python -m bench.capacity --engine-mb 1100 --load-s 0.9 --draw-s 20   # another machine's or model's figures instead

Measured on a repository that has bundles: bytes of a bundle, alone and shared; memory, loading time and drawing time of
an engine. Then a replayed trace: Poisson arrivals, checkpoints by Zipf's law, replicas that draw one picture at a time
under a byte budget (the server's own eviction rule); a request goes to the idlest replica or, routed, to the one that ends
first. Beside it the formula

    R = rate * (draw + (1 - h) * load) / 0.8        h = H(min(R * K, N)) / H(N) routed, H(K) / H(N) if not

(K engines in a replica's budget, H(n) = sum over i <= n of i^-s). It is a first guess at 80 % busy, with the most
hits that any eviction reaches; the replay says what hits and waits.
"""

from __future__ import annotations

import heapq
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from bench.switch import loader, median, pinned, timed
from personalq.bundle import read_manifest
from personalq.errors import RepositoryError
from personalq.repository import Repository, audit
from runtime.drawing.pipeline import Picture, Settings
from runtime.engines.memory import allocated_bytes
from runtime.residency import GreedyDual
from runtime.serving.drawing_process.worker import graph_bytes
from runtime.store import Store

BUSY = 0.8  # of a replica's time: what is left keeps queues short
MOST_REPLICAS = 100_000
MOST_TIMES = 8  # the formula's number of replicas: when even that does not keep the wait, more of them will not


@dataclass(frozen=True)
class Costs:
    """Of one engine. bytes of memory; seconds to load it, and to draw one picture with it."""

    bytes: float
    load_s: float
    draw_s: float


@dataclass(frozen=True)
class Demand:
    """What is asked: n checkpoints, popular by Zipf's law with exponent s, so many pictures a second."""

    n: int
    zipf: float
    rate: float


@cache
def harmonics(n: int, s: float) -> npt.NDArray[np.float64]:
    """H(1), ..., H(n), where H(k) = sum over i = 1..k of i^-s."""
    return np.cumsum(np.arange(1, n + 1, dtype=np.float64) ** -s)


def hit_rate(demand: Demand, engines: int) -> float:
    """The share of requests that the `engines` most popular checkpoints get."""
    sums = harmonics(demand.n, demand.zipf)
    return float(sums[min(engines, demand.n) - 1] / sums[-1])


def formula(demand: Demand, costs: Costs, held: int, *, routed: bool) -> int:
    """The smallest R that satisfies the formula above. held: engines in one replica's budget."""
    for replicas in range(1, MOST_REPLICAS):
        hits = hit_rate(demand, replicas * held if routed else held)
        need = demand.rate * (costs.draw_s + (1 - hits) * costs.load_s) / BUSY
        if replicas >= need:
            return replicas
        if not routed:
            return int(np.ceil(need))
    raise AssertionError(f"no fleet of {MOST_REPLICAS} replicas answers {demand}")


class Fleet:
    """Replicas with a queue each; every engine has the same size, so a budget is a number of engines."""

    def __init__(self, replicas: int, held: int, costs: Costs) -> None:
        self.free_at = [0.0] * replicas
        self._held: list[set[int]] = [set() for _ in range(replicas)]
        self._ranking = [GreedyDual() for _ in range(replicas)]
        self._holders: dict[int, set[int]] = {}
        self._queue = [(0.0, replica) for replica in range(replicas)]
        self._limit, self._costs = max(1, held), costs

    def idlest(self, _: int = 0, __: float = 0.0) -> int:
        """The replica that is free first, whatever it holds: what a plain load balancer does."""
        while self._queue[0][0] != self.free_at[self._queue[0][1]]:
            heapq.heappop(self._queue)  # an older entry of a replica that got work since
        return self._queue[0][1]

    def first_to_end(self, key: int, now: float) -> int:
        """The replica that ends first: a holder without a queue, or an idle one that loads, whichever is sooner."""
        idle = self.idlest()
        best = -1
        for replica in self._holders.get(key, ()):
            if self.free_at[replica] <= now:
                return replica
            best = replica if best < 0 or self.free_at[replica] < self.free_at[best] else best
        if best < 0:
            return idle
        return best if max(now, self.free_at[best]) <= max(now, self.free_at[idle]) + self._costs.load_s else idle

    def serve(self, replica: int, key: int, now: float) -> tuple[bool, float]:
        """Queue a picture; returns whether the engine was there, and the seconds from asking to having it."""
        held = self._held[replica]
        is_hit = key in held
        if not is_hit:
            self._load(replica, key)
        self._ranking[replica].touch(str(key), 1.0, self._costs.load_s)
        begun = max(now, self.free_at[replica])
        self.free_at[replica] = begun + self._costs.draw_s + (0.0 if is_hit else self._costs.load_s)
        heapq.heappush(self._queue, (self.free_at[replica], replica))
        return is_hit, self.free_at[replica] - now

    def _load(self, replica: int, key: int) -> None:
        held = self._held[replica]
        if len(held) >= self._limit:
            gone = int(self._ranking[replica].victim([str(one) for one in held]))
            held.discard(gone)
            self._holders[gone].discard(replica)
        held.add(key)
        self._holders.setdefault(key, set()).add(replica)


def replay(
    demand: Demand, costs: Costs, replicas: int, held: int, *, routed: bool, requests: int = 20_000
) -> dict[str, float]:
    """Hit rate and waiting beyond the drawing itself; the first half warms up and is not counted."""
    random = np.random.default_rng(0)
    share = np.arange(1, demand.n + 1, dtype=np.float64) ** -demand.zipf
    keys = random.choice(demand.n, requests, p=share / share.sum())
    times = np.cumsum(random.exponential(1 / demand.rate, requests))
    fleet = Fleet(replicas, held, costs)
    choose = fleet.first_to_end if routed else fleet.idlest
    hits, waits = [], []
    for key, now in zip(keys.tolist(), times.tolist(), strict=True):
        is_hit, seconds = fleet.serve(choose(key, now), key, now)
        hits.append(is_hit)
        waits.append(seconds - costs.draw_s)
    late = slice(requests // 2, None)
    p50, p95 = np.percentile(waits[late], (50, 95))
    return {"hit_rate": round(float(np.mean(hits[late])), 4), "p50_wait_s": float(p50), "p95_wait_s": float(p95)}


def smallest(demand: Demand, costs: Costs, held: int, wait_s: float, *, routed: bool) -> dict[str, Any]:
    """The fewest replicas whose p95 of waiting and loading stays below `wait_s`, and the formula's number beside it.

    is_kept False: not even eight times the formula's number keeps it, because too many requests must load an engine.
    """
    first = formula(demand, costs, held, routed=routed)
    low, high = 0, first
    found = replay(demand, costs, high, held, routed=routed)
    while found["p95_wait_s"] > wait_s and high < MOST_TIMES * first:
        low, high = high, 2 * high
        found = replay(demand, costs, high, held, routed=routed)
    is_kept = found["p95_wait_s"] <= wait_s
    while is_kept and high - low > max(1, high // 20):  # within 5 %
        middle = (low + high) // 2
        tried = replay(demand, costs, middle, held, routed=routed)
        low, high, found = (low, middle, tried) if tried["p95_wait_s"] <= wait_s else (middle, high, found)
    return {
        **{"checkpoints": demand.n, "zipf": demand.zipf, "rate": demand.rate, "routed": routed},
        **{
            "is_kept": is_kept,
            "replicas": high,
            "formula": first,
            "memory_gb": round(high * held * costs.bytes / 1e9, 2),
        },
        **{name: round(value, 4) for name, value in found.items()},
    }


def storage(bundles: Sequence[Path]) -> dict[str, Any]:
    """Bytes of bundles on disk: all files, and what a bundle adds when equal files are there once."""
    sizes: dict[str, int] = {}
    owners: dict[str, int] = {}
    for bundle in bundles:
        for entry in audit.manifest(bundle)["files"].values():
            sizes[entry["sha256"]] = entry["bytes"]
            owners[entry["sha256"]] = owners.get(entry["sha256"], 0) + 1
    whole = sum(sizes[digest] * count for digest, count in owners.items())
    on_disk = {
        (f.stat().st_dev, f.stat().st_ino): f.stat().st_size for b in bundles for f in b.iterdir() if f.is_file()
    }
    common = sum(size for digest, size in sizes.items() if owners[digest] == len(bundles))
    return {
        "bundles": len(bundles),
        "bytes_each": round(whole / len(bundles)),
        "bytes_each_equal_files_once": round(sum(sizes.values()) / len(bundles)),
        "bytes_on_disk": sum(on_disk.values()),
        "bytes_in_every_bundle": common if len(bundles) > 1 else 0,
    }


def measure(bundles: Sequence[Path], target: str, rounds: int = 3) -> tuple[Costs, dict[str, Any]]:
    """Memory, loading and drawing of engines, in this process; files are in the page cache after the first round."""
    loads, draws, took = [], [], []
    for turn in range(rounds + 1):
        kept = loader(target)
        for bundle in bundles:
            before = allocated_bytes()
            seconds = timed(pinned, kept, bundle).wall
            if turn:
                loads.append(seconds)
                took.append(max(allocated_bytes() - before, graph_bytes(read_manifest(bundle))))
        pipeline = pinned(kept, bundles[0])
        started = time.perf_counter()
        for step in pipeline.denoise([Picture("a photo", "", turn)], Settings()):
            latents = step.latents
        pipeline.decode(latents[0])
        draws += [time.perf_counter() - started] if turn else []
        kept.close()
    costs = Costs(median(took), median(loads), median(draws))
    return costs, {"load_s": loads, "draw_s": draws, "engine_bytes": took, "steps": read_manifest(bundles[0]).steps}


def best_bundles(repository: Repository, most: int) -> list[Path]:
    """The bundle that serves each checkpoint. Raises RepositoryError when there is none."""
    store = Store(repository.root)
    found = [store.find(name).bundle for name in sorted(store.drawable())][:most]
    if not found:
        raise RepositoryError(f"{repository.root}: must hold bundles, got none; run 'personalq export --all'")
    return found


@click.command()
@click.option("--repo", type=click.Path(path_type=Path), help="Repository with bundles. Default: the gallery.")
@click.option("--target", default="onnxruntime", show_default=True)
@click.option("--engine-mb", type=float, help="With --load-s and --draw-s: these in place of measuring.")
@click.option("--load-s", type=float, help="Seconds to load an engine.")
@click.option("--draw-s", type=float, help="Seconds to draw a picture.")
@click.option("--budget-mb", type=float, default=2000.0, show_default=True, help="For engines, in each replica.")
@click.option("--checkpoints", "ns", type=int, multiple=True, default=[1000, 100_000], show_default=True)
@click.option("--rate", "rates", type=float, multiple=True, default=[1.0, 10.0, 100.0], show_default=True)
@click.option("--zipf", "exponents", type=float, multiple=True, default=[1.0], show_default=True)
@click.option(
    "--wait", "wait_s", type=float, default=2.0, show_default=True, help="p95 of waiting and loading, seconds."
)
@click.option("--bundles", "most", type=int, default=12, show_default=True, help="Bundles that are measured.")
def main(**options: Any) -> None:
    """Measure one machine, then replay what a fleet of them would do."""
    given = [options["engine_mb"], options["load_s"], options["draw_s"]]
    if None in given and any(value is not None for value in given):
        raise click.UsageError("--engine-mb, --load-s and --draw-s go together")
    if None in given:
        bundles = best_bundles(Repository.open(options["repo"]), options["most"])
        costs, seen = measure(bundles, options["target"])
        told: dict[str, Any] = {"storage": storage(bundles), "measured": seen}
    else:
        costs, told = Costs(options["engine_mb"] * 1e6, options["load_s"], options["draw_s"]), {"measured": None}
    held = max(1, int(options["budget_mb"] * 1e6 // costs.bytes))
    demands = [Demand(n, s, rate) for n in options["ns"] for s in options["exponents"] for rate in options["rates"]]
    rows = [smallest(one, costs, held, options["wait_s"], routed=routed) for one in demands for routed in (False, True)]
    for row in rows:
        wait = f"p95 wait {row['p95_wait_s']:.2f} s" + ("" if row["is_kept"] else ", NOT KEPT")
        click.echo(
            f"{row['checkpoints']:>7} checkpoints  zipf {row['zipf']}  {row['rate']:>6} /s  "
            f"{'routed' if row['routed'] else 'idlest':6}  replicas {row['replicas']:>5} (formula {row['formula']})  "
            f"hits {row['hit_rate']:.3f}  {wait}  memory {row['memory_gb']} GB"
        )
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "onnxruntime": version("onnxruntime")}
    engine = {"engine_bytes": costs.bytes, "load_s": costs.load_s, "draw_s": costs.draw_s, "engines_per_replica": held}
    click.echo(json.dumps({"bench": "capacity", **engine, **told, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
