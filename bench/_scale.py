"""How long Check-in takes over a large catalogue: made-up cards, one process of its own, one core.

python -m bench._scale N [REQUESTS]   prints one JSON object

The cpu_ figures are processor time: on a machine that others use too, the ones to look at.
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
    """Return what a fresh process on one core measures over ``n_cards`` made-up cards."""
    command = [sys.executable, "-m", "bench._scale", str(n_cards), str(n_requests)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
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


def _here(n_cards: int, n_requests: int) -> dict[str, Any]:
    requests = [r["request"] for r in read_data()[1]][:n_requests]
    with tempfile.TemporaryDirectory() as folder:
        cards = Path(folder) / "cards.jsonl"
        write_cards(cards, n_cards)
        Repository.open(Path(folder) / "r", create=True).add_cards(cards)
        child = os.fork()  # the index is built by a process of its own: its memory is not the asking one's
        if not child:
            report = index(Repository.open(Path(folder) / "r")).to_json() | {"cpu": time.process_time()}
            (Path(folder) / "report.json").write_text(json.dumps(report))
            os._exit(0)
        os.waitpid(child, 0)
        built = json.loads((Path(folder) / "report.json").read_text())
        asked = _ask(Path(folder) / "r", requests)
        index_ = {"index_seconds": built["seconds"], "index_cpu_seconds": built["cpu"], "index_bytes": built["bytes"]}
        return {"cards": n_cards, **index_, **asked}


def _ask(root: Path, requests: list[str]) -> dict[str, float]:
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
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p95_ms": float(np.percentile(milliseconds, 95)),
        "cpu_p50_ms": float(np.percentile(cpu, 50)),
        "cpu_p95_ms": float(np.percentile(cpu, 95)),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    print(json.dumps(_here(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100)))
