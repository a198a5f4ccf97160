"""A Ray cluster of two nodes on this machine: the bytes of the sequential export, whichever worker or node is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.fleet import busy_workers
from cli import cli
from tests.fleet.many import NAMES, content, fresh_copy

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from cli import main; main()"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'personalq[ray]'")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    made.add_node(**small)
    yield made
    made.shutdown()


def start(root: Path, address: str, *more: str) -> "subprocess.Popen[str]":
    """`personalq export` on the cluster, as a process of its own: Ray stays out of this one."""
    ids = root.parent / "ids.txt"
    ids.write_text("\n".join(NAMES))
    options = ["--on", "ray", "--address", address, "--threads", "1", "--memory-mb", "500", "--spec", "fp16", "--json"]
    command = [*COMMAND, "--repo", str(root), "export", "--ids", str(ids), *options, *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(run: "subprocess.Popen[str]") -> dict[str, Any]:
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, (out, err)
    return json.loads(out)


def soon(found: Callable[[], Any]) -> Any:
    """What `found` gives as soon as it is not empty."""
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_two_nodes_give_the_bytes_of_the_sequential_export(
    cluster: Any, many: Path, sequential: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    data = ended(start(root, cluster.address))
    assert [row["id"] for row in data["done"]] == sorted(NAMES) and not data["failed"]
    assert content(root / "bundles") == sequential


def test_a_worker_killed_in_the_middle_changes_no_byte(
    cluster: Any, many: Path, sequential: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    run = start(root, cluster.address)
    os.kill(soon(busy_workers)[0], signal.SIGKILL)
    data = ended(run)
    rows = data["done"] + data["reused"]
    assert sorted(row["id"] for row in rows) == sorted(NAMES) and not data["failed"]
    assert sorted(row["attempts"] for row in rows) == [1, 1, 1, 2]
    assert content(root / "bundles") == sequential


def test_a_node_that_goes_in_the_middle_changes_no_byte(
    cluster: Any, many: Path, sequential: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    gone = cluster.add_node(num_cpus=1, memory=4 << 30, object_store_memory=80 << 20)
    run = start(root, cluster.address)
    soon(lambda: len(busy_workers()) >= 2)
    cluster.remove_node(gone, allow_graceful=False)
    data = ended(run)
    assert sorted(row["id"] for row in data["done"] + data["reused"]) == sorted(NAMES) and not data["failed"]
    assert content(root / "bundles") == sequential


def test_needs_that_no_node_has_are_said_and_what_is_not_there_is_one_line(cluster: Any, many: Path) -> None:
    run = start(many, cluster.address, "--memory-mb", "900000")
    assert run.stderr is not None
    line = run.stderr.readline()
    run.kill()
    run.communicate()
    assert line.startswith("personalq: no machine of the cluster has 1 cores, 0.0 GPUs and 900000 MB for one export")
    ran = CliRunner().invoke(cli, ["--repo", str(many), "export", "--all", "--on", "ray", "--address", "nonsense"])
    assert ran.exit_code == 1 and ran.stderr.count("\n") == 1, ran.output
    assert "--address nonsense: must be a running Ray cluster, got '" in ran.stderr


def test_without_ray_one_line_names_the_extra(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = CliRunner().invoke(cli, ["--repo", str(many), "export", "--all", "--on", "ray"])
    assert ran.exit_code == 1
    assert ran.stderr == "personalq: ray is not installed; run: pip install 'personalq[ray]'\n"
