"""Many checkpoints through worker processes: the same bytes as one after the other, whatever fails or dies on the way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from cli import cli
from fleet.pool import Pool, WorkerLost, fitting_workers
from fleet.run import outcome_of, progress_line, run_all, run_fleet
from fleet.step import run_task
from fleet.verified import NOTE, verified_level
from fleet.work import Outcome, Task, Work, read_ids, spec_name
from personalq.errors import SpecError
from personalq.repository import Repository
from personalq.repository.remote import Remote
from personalq.repository.sharing import SMALLEST
from tests.fleet.many import NAMES, content, fresh_copy


def quiet(_: str, __: float) -> None:
    """No progress shown."""


def export(root: Path, *arguments: str) -> tuple[dict, int]:
    ran = CliRunner().invoke(cli, ["--repo", str(root), "export", *arguments, "--threads", "1", "--json"])
    assert ran.exit_code in (0, 1) and ran.stdout.count("\n") == 1, ran.output
    return json.loads(ran.stdout), ran.exit_code


def write_ids(folder: Path, *ids: str) -> str:
    file = folder / "ids.txt"
    file.write_text("# to export\n\n" + "".join(f"{one}\n" for one in ids))
    return str(file)


def test_the_bytes_are_those_of_the_sequential_export_and_failures_stop_nobody(
    many: Path, sequential: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    ids = write_ids(tmp_path, "one", "homeless", "two", "wish", "three", "nobody", "four", "one")
    data, code = export(root, "--ids", ids, "--spec", "fp16", "--workers", "4")
    assert code == 1
    assert [row["id"] for row in data["done"]] == sorted(NAMES) and data["reused"] == []
    reasons = {row["id"]: (row["step"], row["reason"]) for row in data["failed"]}
    assert reasons.keys() == {"homeless", "wish", "nobody"}
    assert (
        reasons["homeless"]
        == (
            "export",
            "checkpoint 'homeless': base must be one in this repository (tiny), got 'nowhere'; "
            "add it with 'personalq add --base'",
        )
        or reasons["homeless"][0] == "look up"
    )
    assert "must have weights, got a card only" in reasons["wish"][1]
    assert "must be an id in" in reasons["nobody"][1] and reasons["nobody"][0] == "look up"
    assert content(root / "bundles") == sequential
    for row in data["done"]:
        assert row["verified"] == "integrity" and row["bytes"] > 0 and row["seconds"] > 0 and row["attempts"] == 1

    encoders = [file.stat() for file in (root / "bundles").rglob("text_encoder.data")]
    assert len({one.st_ino for one in encoders}) == 1  # also those that were written at the same moment
    assert data["bytes_shared"] >= 3 * encoders[0].st_size >= SMALLEST

    again, code = export(root, "--ids", write_ids(tmp_path, *NAMES), "--spec", "fp16", "--workers", "1")
    assert code == 0 and [row["id"] for row in again["reused"]] == sorted(NAMES) and again["done"] == []
    assert content(root / "bundles") == sequential


def test_a_family_is_traced_once_and_before_its_checkpoints(many: Path, tmp_path: Path) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    known = sorted(folder.name for folder in (root / "families").iterdir() if not folder.name.startswith("."))
    asked: list[Task] = []

    class Here:
        """Runs tasks in this process, in the order they are given out."""

        def submit(self, task: Task) -> "Future[Outcome]":
            asked.append(task)
            future: Future[Outcome] = Future()
            future.set_result(run_task(work, task))
            return future

        def close(self) -> None:
            asked.append(Task("family", "closed"))

    for folder in (root / "families").glob("*/family.json"):
        folder.rename(folder.with_suffix(".away"))
    work = Work(str(root), spec="fp16", verify="none", threads=1)

    def traced(self_root: Path = root) -> None:
        for file in (self_root / "families").glob("*/family.away"):
            file.rename(file.with_suffix(".json"))

    class Traces(Here):
        def submit(self, task: Task) -> "Future[Outcome]":
            if task.kind == "family":
                traced()  # in place of torch
            return super().submit(task)

    summary = run_fleet(work, ["one", "two"], Traces(), 0, quiet)
    assert [(task.kind, task.id) for task in asked] == [
        ("family", "one"),
        ("checkpoint", "one"),
        ("checkpoint", "two"),
        ("family", "closed"),
    ]
    assert summary.families == known and len(summary.of("done")) == 2


def test_a_killed_worker_costs_an_attempt_and_nothing_else(
    many: Path, sequential: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    work = Work(str(root), spec="fp16", threads=1)
    pool = Pool(work, 2)
    killed = threading.Event()

    def kill_the_first() -> None:
        while not pool._all:
            time.sleep(0.01)
        os.kill(pool._all[0]._process.pid, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_the_first).start()
    summary = run_fleet(work, NAMES, pool, 2, quiet)
    assert killed.is_set()
    assert len(summary.of("done")) + len(summary.of("reused")) == len(NAMES)
    assert sorted(one.attempts for one in summary.outcomes) == [1, 1, 1, 2]
    assert content(root / "bundles") == sequential
    assert [process._process.poll() is not None for process in pool._all] == [True] * len(pool._all)


def test_a_run_that_was_killed_goes_on_where_it_was(many: Path, sequential: dict[str, bytes], tmp_path: Path) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    ids = write_ids(tmp_path, *NAMES)
    start = [sys.executable, "-c", "from cli import main; main()", "--repo", str(root)]
    command = [*start, "export", "--ids", ids, "--spec", "fp16"]
    run = subprocess.Popen([*command, "--workers", "1", "--threads", "1"], cwd=Path(__file__).parents[2])
    while not list(root.glob(f"bundles/*/{NOTE}")) and run.poll() is None:
        time.sleep(0.02)
    run.kill()
    run.wait()
    data, code = export(root, "--ids", ids, "--spec", "fp16", "--workers", "1")
    assert code == 0 and len(data["reused"]) >= 1
    assert len(data["reused"]) + len(data["done"]) == len(NAMES)
    assert content(root / "bundles") == sequential


def test_what_was_verified_is_noted_and_what_fails_the_gate_is_a_failure(many: Path, tmp_path: Path) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    work = Work(str(root), form="merged", threads=1, verify="obedience")
    first = run_task(work, Task("checkpoint", "rex"))
    assert (first.state, first.spec, first.verified) == ("done", "taq-w8a8", "obedience"), first.reason
    assert run_task(work, Task("checkpoint", "rex")).state == "reused"
    further = run_task(replace(work, verify="numerics"), Task("checkpoint", "rex"))
    assert (further.state, further.verified) == ("done", "numerics"), further.reason
    bundle = root / "bundles" / first.bundle
    graph = bundle / "unet.ort.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    repaired = run_task(work, Task("checkpoint", "rex"))
    assert (repaired.state, repaired.verified) == ("done", "obedience")
    (bundle / NOTE).write_text("{")
    assert verified_level(bundle) == ""
    reference = root / "specs" / "rex" / "reference.safetensors"
    spoil(reference)  # other goldens: another bundle, and one that does not compute them
    for _ in range(2):
        wrong = run_task(replace(work, verify="numerics"), Task("checkpoint", "rex"))
        assert (wrong.state, wrong.step, wrong.is_final) == ("failed", "verify", True)
        assert wrong.reason.startswith("FAILED rex") and "unet" in wrong.reason


def test_bundles_are_published_to_a_store_and_a_second_run_finds_them_there(many: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'personalq[store]'")
    root = fresh_copy(many, tmp_path / "repository").root
    work = Work(str(root), spec="fp16", verify="none", threads=1, store=f"file://{tmp_path}/store")
    made = [run_task(work, Task("checkpoint", "one")) for _ in range(2)]
    assert [one.state for one in made] == ["done", "reused"] and "publish" in made[1].seconds
    remote = Remote(work.store)
    assert remote.ids() == ["one"] and remote.has(made[0].bundle) and remote.card("one").class_noun == "dog"
    remote.fetch(made[0].bundle, tmp_path / "fetched")
    assert content(tmp_path / "fetched") == content(root / "bundles" / made[0].bundle)
    nowhere = replace(work, store="nope://bucket")
    failed = run_task(nowhere, Task("checkpoint", "one"))
    assert (failed.state, failed.step) == ("failed", "publish") and failed.reason.startswith("nope://bucket: must be a")


def spoil(goldens: Path) -> None:
    """Turn the noise prediction's sign in a file of goldens, its metadata as it was."""
    with safe_open(goldens, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, "noise_pred": -tensors["noise_pred"]}, goldens, metadata)


@pytest.mark.slow
def test_a_checkpoint_without_a_spec_is_calibrated_first_and_only_once(many: Path, tmp_path: Path) -> None:
    root = fresh_copy(many, tmp_path / "repository").root
    asked = ("--ids", write_ids(tmp_path, "one"), "--form", "merged", "--workers", "1", "--verify", "obedience")
    data, code = export(root, *asked)
    assert code == 0, data["failed"]
    row = data["done"][0]
    assert (row["spec"], row["verified"]) == ("taq-w8a8", "obedience") and row["calibrate_s"] > 0
    assert (root / "specs" / "one" / "reference.safetensors").is_file()
    again, _ = export(root, *asked)
    assert [row["id"] for row in again["reused"]] == ["one"] and "calibrate_s" not in again["reused"][0]


class Scripted:
    """Workers that answer what a test says, one answer a submission."""

    def __init__(self, *answers: Outcome | Exception) -> None:
        self.answers, self.asked = list(answers), 0

    def submit(self, task: Task) -> "Future[Outcome]":
        future: Future[Outcome] = Future()
        answer = self.answers[self.asked]
        self.asked += 1
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def close(self) -> None:
        """Nothing runs."""


def test_only_what_may_go_better_is_tried_again_and_not_for_ever() -> None:
    final, passing = Outcome("a", "failed", "export", "no"), Outcome("a", "failed", "export", "no", is_final=False)
    once = Scripted(final)
    assert [(one.state, one.attempts) for one in run_all([Task("checkpoint", "a")], once, 2)] == [("failed", 1)]
    better = Scripted(passing, WorkerLost("gone"), Outcome("a", "done"))
    assert [(one.state, one.attempts) for one in run_all([Task("checkpoint", "a")], better, 2)] == [("done", 3)]
    never = Scripted(*[WorkerLost("its process was killed by signal 9: out of memory?")] * 3)
    (lost,) = run_all([Task("checkpoint", "a")], never, 2)
    assert (lost.state, lost.step, lost.attempts) == ("failed", "worker", 3)
    assert lost.reason == "WorkerLost: its process was killed by signal 9: out of memory?"


def test_an_unexpected_error_is_one_checkpoints_and_may_be_tried_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    gone = Work(str(tmp_path / "nothing"))
    outcome = run_task(gone, Task("checkpoint", "a"))
    assert (outcome.state, outcome.step) == ("failed", "look up") and "must be a repository folder" in outcome.reason
    cause = Future()
    cause.set_exception(MemoryError("4 GB\nmore"))
    assert outcome_of(cause, Task("checkpoint", "a")).reason == "MemoryError: 4 GB more"


def test_progress_says_how_far_it_is() -> None:
    from fleet.run import Summary

    summary = Summary([Outcome("a", "done"), Outcome("b", "failed"), Outcome("c", "reused")])
    assert progress_line(summary, 9, 180.0) == "3 of 9: 1 done, 1 reused, 1 failed; about 6 min left"


def test_workers_fit_cores_and_memory() -> None:
    assert fitting_workers(1, 1) >= 1
    assert fitting_workers(10_000, 1) == 1
    assert fitting_workers(1, 1 << 60) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "must name at least one id, one a line, got none; list them with 'personalq ls'"),
        (b"# only a comment\n", "must name at least one id"),
        (b"\xff\xfe", "must be UTF-8 text with one id a line, got other bytes; write it again"),
    ],
)
def test_a_file_of_ids_that_names_nothing_is_one_line(tmp_path: Path, text: bytes, reason: str) -> None:
    file = tmp_path / "ids"
    file.write_bytes(text)
    with pytest.raises(SpecError, match=f"^{file}: {reason}"):
        read_ids(file)


@pytest.mark.parametrize("name", ["fp16", "fp32", "taq-w4a8", "bos-only-w8a8"])
def test_a_spec_of_many_is_a_name(name: str) -> None:
    assert spec_name(Path(name)) == name and spec_name(None) == ""


@pytest.mark.parametrize("name", ["specs/rex/taq-w8a8.json", "taq-w3a8", "taq", "../taq-w8a8"])
def test_a_spec_file_belongs_to_one_checkpoint(name: str) -> None:
    with pytest.raises(SpecError, match=r"^--spec: must be fp16, fp32 or POLICY-w8a8, .* belongs to one checkpoint$"):
        spec_name(Path(name))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "name one of ID, --base ID, --all and --ids FILE"),
        (["rex", "--all"], "name one of ID, --base ID, --all and --ids FILE"),
        (["rex", "--workers", "2"], "--workers goes with --all or --ids"),
        (["--all", "--lint", "trt"], "--lint goes with one ID"),
        (["--all", "--address", "10.0.0.1:6379"], "--address goes with --on ray"),
        (["--all", "--on", "ray", "--workers", "2"], "--workers goes with --on local"),
    ],
)
def test_options_that_would_be_ignored_are_usage_errors(tmp_path: Path, arguments: list[str], line: str) -> None:
    ran = CliRunner().invoke(cli, ["--repo", str(tmp_path), "export", *arguments])
    assert ran.exit_code == 2 and line in ran.stderr


def test_all_of_nothing_is_one_line(tmp_path: Path) -> None:
    Repository.open(tmp_path / "empty", create=True)
    ran = CliRunner().invoke(cli, ["--repo", str(tmp_path / "empty"), "export", "--all"])
    assert ran.exit_code == 1
    assert "must hold a checkpoint with weights, got none; add one with 'personalq add SOURCE'" in ran.stderr
    missing = CliRunner().invoke(cli, ["--repo", str(tmp_path / "empty"), "export", "--ids", str(tmp_path / "none")])
    assert missing.exit_code == 1 and missing.stderr.count("\n") == 1
