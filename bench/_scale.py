"""How long Check-in takes over a large catalogue, and how much memory: made-up cards, one core, fresh processes.

python -m bench._scale N [REQUESTS]   prints one JSON object

Building and asking are processes of their own, each with its own peak. The cpu_ figures are processor time: on a
machine that others use too, the ones to look at.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from personalq.checkin import Checkin, index
from personalq.repository import Repository

from ._requests import read_data


def measure(n_cards: int, n_requests: int = 100) -> dict[str, Any]:
    """Return what fresh processes on one core measure over ``n_cards`` made-up cards."""
    with tempfile.TemporaryDirectory() as folder:
        root, cards = Path(folder) / "r", Path(folder) / "cards.jsonl"
        write_cards(cards, n_cards)
        _alone("add", str(root), str(cards))
        built, asked = _alone("index", str(root)), _alone("ask", str(root), str(n_requests))
    return {"cards": n_cards, **built, **asked}


def _alone(step: str, *arguments: str) -> dict[str, Any]:
    """Run one step in a process of its own, on one thread."""
    command = [sys.executable, "-m", "bench._scale", step, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_cards(file: Path, n_cards: int) -> None:
    """Write cards that mix names, looks and tags of the real catalogue: every text is new, the words are real ones."""
    real, rng = read_data()[0], np.random.default_rng(0)
    with file.open("w") as out:
        for number in range(n_cards):
            a, b, c = (real[int(i)] for i in rng.integers(len(real), size=3))
            card = {
                "id": f"made-{number}",
                "name": f"{a.name} {b.name.split()[-1]} {number}",
                "kind": a.kind,
                "base": b.base,
                "trigger": [f"tok{number}x"],
                "class_noun": a.class_noun,
                "description": f"{a.description} {c.description}"[:160],
                "tags": list(dict.fromkeys((*a.tags, *c.tags)))[:8],
            }
            out.write(json.dumps(card) + "\n")


def _index(root: str) -> dict[str, Any]:
    report = index(Repository.open(root))
    return {
        "index_seconds": report.seconds,
        "index_cpu_seconds": round(time.process_time(), 2),
        "index_bytes": report.bytes,
        "index_peak_mb": _peak_mb(),
    }


def _ask(root: str, n_requests: str) -> dict[str, float]:
    requests = [r["request"] for r in read_data()[1]][: int(n_requests)]
    started = time.perf_counter()
    checkin = Checkin(Repository.open(root))
    checkin.ask("my dog on the beach")
    opened = time.perf_counter() - started
    milliseconds, cpu = [], []
    for request in requests:
        before = time.process_time()
        milliseconds.append(checkin.ask(request).milliseconds)
        cpu.append(1e3 * (time.process_time() - before))
    return {
        "open_seconds": round(opened, 2),
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 2),
        "p95_ms": round(float(np.percentile(milliseconds, 95)), 2),
        "cpu_p50_ms": round(float(np.percentile(cpu, 50)), 2),
        "cpu_p95_ms": round(float(np.percentile(cpu, 95)), 2),
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    """Return this process's peak resident memory, pages of mapped files included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _add(root: str, cards: str) -> dict[str, Any]:
    return {"added": len(Repository.open(root, create=True).add_cards(Path(cards)).added)}


if __name__ == "__main__":
    steps = {"add": _add, "index": _index, "ask": _ask}
    step, *rest = sys.argv[1:]
    print(json.dumps(steps[step](*rest) if step in steps else measure(int(step), *map(int, rest))))
