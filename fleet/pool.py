"""Workers on this machine: separate processes, given one task at a time. A process that dies loses only its own task."""

import json
import os
import queue
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from .work import Outcome, Task, Work


class WorkerLost(Exception):
    """The process or machine that had the task is gone; the task can be given to another."""


def fitting_workers(threads: int, memory_bytes: int) -> int:
    """How many workers fit this machine: its cores and free memory divided by what one needs, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // threads, free_memory() // memory_bytes))


def free_memory() -> int:
    """Bytes available without swapping; without /proc this is unknown, and cores alone decide."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)


class Pool:
    """A number of worker processes; each is started when it is first needed, and anew when it died."""

    def __init__(self, work: Work, n_workers: int) -> None:
        self._work, self.n_workers = work, n_workers
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._all: list[_Process] = []
        self._threads = ThreadPoolExecutor(n_workers, thread_name_prefix="fleet")
        for _ in range(n_workers):
            self._idle.put(None)

    def submit(self, task: Task) -> "Future[Outcome]":
        """The task's outcome in the future; its exception is WorkerLost."""
        return self._threads.submit(self._run, task)

    def close(self) -> None:
        """End every process now; tasks that have not ended are lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._threads.shutdown(wait=True)

    def _run(self, task: Task) -> Outcome:
        process = self._idle.get()
        try:
            if process is None:
                process = _Process(self._work)
                self._all.append(process)
            return process.ask(task)
        except BaseException:
            process = None
            raise
        finally:
            self._idle.put(process)


class _Process:
    """One worker process."""

    def __init__(self, work: Work) -> None:
        # Threads must be set before numpy and torch are imported; our packages may be importable from anywhere.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "PYTHONPATH": paths}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fleet.worker", work.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, task: Task) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(task)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            answer = ""
        if not answer.endswith("\n"):
            status = self._process.wait()
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self.kill()
            raise WorkerLost(f"its process {how}" + (": out of memory?" if status == -9 else ""))
        return Outcome(**json.loads(answer))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
