"""Does the server hold up? Clients that ask by Zipf for 12 checkpoints; overload; a client that leaves.

    python -m bench.serve [--repo DIR] [--seconds 600] [--clients 8] [--budget-mb X] [--target NAME] [--steps N]

The baseline is the same server with room for one checkpoint and no batching. Prints a table, then one JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from personalq.repository import Repository
from runtime.store import Store

ROOT = Path(__file__).parent.parent
CHECKPOINTS = 12


@dataclass
class Load:
    """What clients saw. seconds: of every picture that was answered."""

    seconds: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)
    elapsed: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, code: str, seconds: float) -> None:
        with self.lock:
            self.codes[code] += 1
            if code == "200":
                self.seconds.append(seconds)


class Server:
    """`personalq serve` in a process of its own; ends with the block."""

    def __init__(self, repository: Path, target: str, budget_mb: float, max_batch: int, queue: int = 32) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.port = listening.getsockname()[1]
        options = ["--port", self.port, "--target", target, "--budget-mb", budget_mb, "--max-batch", max_batch]
        options += ["--queue", queue]
        command = [sys.executable, "-c", "import cli; cli.main()", "--repo", repository, "serve", *options]
        self._process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Server:
        for _ in range(600):
            if self._process.poll() is not None:
                raise click.ClickException("the server ended before it was ready; run 'personalq serve' to see why")
            try:
                self.get("/readyz")
                return self
            except OSError:
                time.sleep(0.2)
        raise click.ClickException("the server was not ready after two minutes")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=120)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return bytes(answer.read())

    def draw(self, checkpoint: str, seed: int, steps: int, timeout: float = 600) -> str:
        """Ask for one picture; the status, or what went wrong."""
        body = {"prompt": "on the beach", "model": checkpoint, "seed": seed, "steps": steps}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/images/generations",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                answer.read()
                return str(answer.status)
        except urllib.error.HTTPError as error:
            error.read()
            return str(error.code)
        except OSError as error:
            return type(error).__name__

    def residency(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/v1/residency"))
        return found


def drive(server: Server, checkpoints: list[str], clients: int, seconds: float, steps: int) -> Load:
    """`clients` ask one picture after the other until the time is over."""
    load, begun = Load(), time.monotonic()
    until = begun + seconds
    share = 1 / np.arange(1, len(checkpoints) + 1)

    def client(number: int) -> None:
        random = np.random.default_rng(number)
        while time.monotonic() < until:
            checkpoint = checkpoints[int(random.choice(len(checkpoints), p=share / share.sum()))]
            started = time.monotonic()
            code = server.draw(checkpoint, int(random.integers(1 << 30)), steps)
            load.note(code, time.monotonic() - started)
            if code == "429":
                time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        load.memory.append((time.monotonic(), int(server.residency().get("process_bytes", 0))))
        time.sleep(min(2.0, seconds / 10))
    load.elapsed = time.monotonic() - begun
    return load


def growth_mb(memory: list[tuple[float, int]]) -> float:
    """Median memory of the last quarter less that of the second, in MB: warm-up is the first."""
    values = [size for _, size in memory]
    quarter = max(len(values) // 4, 1)
    return float(np.median(values[-quarter:]) - np.median(values[quarter : 2 * quarter] or values)) / 1e6


def leaves(server: Server, checkpoint: str) -> bool:
    """A client that gives up on a long picture: is its slot free within five seconds?"""
    server.draw(checkpoint, 0, 150, timeout=0.5)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if server.residency()["queue"] == 0:
            return True
        time.sleep(0.05)
    return False


@click.command()
@click.option("--repo", type=click.Path(path_type=Path), help="Repository with bundles. Default: the gallery.")
@click.option("--seconds", type=float, default=600, show_default=True)
@click.option("--clients", type=int, default=8, show_default=True)
@click.option("--steps", type=int, default=10, show_default=True)
@click.option("--budget-mb", type=float, default=300, show_default=True)
@click.option("--baseline-mb", type=float, default=70, show_default=True, help="Room for one checkpoint.")
@click.option("--target", default="onnxruntime", show_default=True)
def main(
    repo: Path | None, seconds: float, clients: int, steps: int, budget_mb: float, baseline_mb: float, target: str
) -> None:
    """Serve, overload, leave; then the baseline."""
    root = Repository.open(repo).root
    checkpoints = sorted(Store(root).drawable())[:CHECKPOINTS]
    with Server(root, target, budget_mb, 4, queue=4 * clients) as server:
        load = drive(server, checkpoints, clients, seconds, steps)
        counts = server.residency()["counts"]
        over = drive(server, checkpoints, 10 * clients, min(seconds / 20, 60), steps)
        freed, is_alive = leaves(server, checkpoints[0]), server.is_alive
    with Server(root, target, baseline_mb, 1) as server:
        alone = drive(server, checkpoints, clients, min(seconds / 10, 120), steps)
    rate, alone_rate = (len(one.seconds) / one.elapsed for one in (load, alone))
    wrong = sum(count for code, count in load.codes.items() if code not in ("200", "429"))
    over_wrong = sum(count for code, count in over.codes.items() if code not in ("200", "429"))
    found = {
        "requests": sum(load.codes.values()),
        "errors": wrong,
        "p50_s": round(float(np.percentile(load.seconds, 50)), 3),
        "p99_s": round(float(np.percentile(load.seconds, 99)), 3),
        "pictures_per_s": round(rate, 3),
        "hit_rate": round(counts["hits"] / max(counts["hits"] + counts["misses"], 1), 4),
        "memory_growth_mb": round(growth_mb(load.memory), 1),
        "over_baseline": round(rate / max(alone_rate, 1e-9), 3),
        "overload_refused": over.codes["429"],
        "overload_errors": over_wrong,
        "alive_after_overload": is_alive,
        "slot_freed": freed,
    }
    for name, value in found.items():
        click.echo(f"{name:22} {value}")
    rows = [
        {"phase": name, "codes": dict(one.codes)}
        for name, one in (("load", load), ("overload", over), ("baseline", alone))
    ]
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    options = {"seconds": seconds, "clients": clients, "steps": steps, "budget_mb": budget_mb, "target": target}
    click.echo(json.dumps({**found, **options, "checkpoints": len(checkpoints), "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
