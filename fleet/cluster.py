"""Tasks on a Ray cluster: each asks for its cores, GPUs and memory, and runs where the cluster has them.

The repository must be under the same path on every machine (a shared file system), and PersonalQ installed there.
"""

import logging
import os
import socket
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from personalq.errors import FleetError, MissingExtraError

from .step import run_task
from .work import Outcome, Task, Work

logger = logging.getLogger("personalq.fleet")


@dataclass(frozen=True)
class Needs:
    """What one export, or one drawing replica, needs of a machine. cpus: cores; gpus may be a fraction; memory in bytes."""

    cpus: int
    gpus: float
    memory_bytes: int


@dataclass(frozen=True)
class Replicas:
    """How many replicas draw: `least` to `most`, by demand. threads: cores of each; gpus may be a fraction."""

    least: int
    most: int
    threads: int
    gpus: float


class Cluster:
    """A connection to a Ray cluster; without an address, to the one of this machine, which is started when there is none.

    Raises MissingExtraError without Ray, FleetError when nothing answers at the address.
    """

    def __init__(self, work: Work, address: str, needs: Needs) -> None:
        self._ray, self._work, self._open = ray_module(), work, set[Any]()
        self._is_ours = connect(self._ray, address)
        warn_misfit(self._ray, needs)
        # The run itself retries lost tasks, and counts them. The thread count must be set before numpy is imported.
        self._task = self._ray.remote(_do).options(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            memory=needs.memory_bytes,
            max_retries=0,
            name=f"personalq {Path(work.root).name}",
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(work.threads)}},
        )

    def submit(self, task: Task) -> "Future[Outcome]":
        """The task's outcome in the future; its exception is Ray's, when worker or machine was lost."""
        ref = self._task.remote(self._work.to_json(), asdict(task))
        self._open.add(ref)
        answered: Future[Outcome] = Future()

        def settle(done: "Future[dict[str, Any]]") -> None:
            self._open.discard(ref)
            error = done.exception()
            if error is not None:
                answered.set_exception(error)
            else:
                answered.set_result(Outcome(**done.result()))

        ref.future().add_done_callback(settle)
        return answered

    def close(self) -> None:
        """Leave the cluster; what has not ended is cancelled."""
        if self._is_ours:
            self._ray.shutdown()
            return
        for ref in list(self._open):
            self._ray.cancel(ref, force=True)


def ray_module() -> Any:
    """Ray. Raises MissingExtraError."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "ray") from error
    return ray


def connect(ray: Any, address: str) -> bool:
    """Connect to a cluster, or start one; False when this process was connected already. Raises FleetError."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports from a cluster that we start
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FleetError(
            f"--address {address or 'auto'}: must be a running Ray cluster, got '{line[:200]}'; "
            "start one with 'ray start --head'"
        ) from error
    return True


def warn_misfit(ray: Any, needs: Needs, what: str = "export", memory_option: str = "--memory-mb") -> None:
    """Warn when no machine has what one export (or replica) needs: Ray would silently wait for one."""
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory_bytes}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
        logger.warning(
            "no machine of the cluster has %s cores, %s GPUs and %.0f MB for one %s; waiting for one to join "
            "(or ask for less: --threads, --gpus, %s)",
            needs.cpus,
            needs.gpus,
            needs.memory_bytes / 1e6,
            what,
            memory_option,
        )


def _do(work_json: str, task: dict[str, Any]) -> dict[str, Any]:
    """On a machine of the cluster: one task, as plain values in and out."""
    work = Work.from_json(work_json)
    if not Path(work.root).is_dir():
        where = socket.gethostname()
        raise FileNotFoundError(f"{work.root} is not on {where}: the repository must be under one path everywhere")
    return asdict(run_task(work, Task(**task)))
