"""Training in several single-thread workers that average their weights by the clock (local SGD over gloo).

One process per core beats one process with many threads on small models. Adam state stays with its worker; a slowed
worker only counts for less, because weights are averaged by the steps each one did.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


@dataclass
class Clock:
    """Wall-time schedule shared by the workers: `seconds` in all, one averaging every `period` seconds."""

    seconds: float
    period: float
    done: float = 0.0  # seconds spent before a resume
    start: float = field(default_factory=time.monotonic)
    syncs: int = 0

    def spent(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.done + time.monotonic() - self.start

    def progress(self) -> float:
        """Share of this run's schedule done, 0..1 (a resumed run anneals what was left)."""
        return min(1.0, (self.spent() - self.done) / max(1e-9, self.seconds - self.done))

    def due(self) -> bool:
        """True when the next averaging is due; every worker sees the same number of these."""
        return time.monotonic() - self.start >= (self.syncs + 1) * self.period

    def finished(self) -> bool:
        """True after the last averaging of the schedule."""
        return self.done + self.syncs * self.period >= self.seconds


def average_(parameters: Iterable[nn.Parameter], steps: int) -> int:
    """Replace the parameters by their mean over workers, weighted by steps; return the steps of all workers."""
    params = list(parameters)
    flat = torch.cat([p.detach().float().reshape(-1) for p in params] + [torch.ones(1)]) * float(steps)
    if dist.is_initialized():
        dist.all_reduce(flat)
    total = float(flat[-1])
    if total > 0:
        flat = flat / total
        with torch.no_grad():
            torch._foreach_copy_(
                params,
                [
                    v.view_as(p).to(p.device)
                    for v, p in zip(flat[:-1].split([p.numel() for p in params]), params, strict=True)
                ],
            )
    return round(total)


def _enter(rank: int, world: int, port_file: str, body: Callable[..., None], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world)
    body(rank, world, *args)
    dist.destroy_process_group()


def run_workers(body: Callable[..., None], workers: int, work_dir: Path, *args: object) -> None:
    """Run `body(rank, workers, *args)` in so many processes, or here when there is only one."""
    if workers <= 1:
        body(0, 1, *args)
        return
    meeting = work_dir.resolve() / f"meeting-{os.getpid()}"
    mp.spawn(_enter, args=(workers, str(meeting), body, args), nprocs=workers)
    meeting.unlink(missing_ok=True)
