"""`personalq bench NAME --json`: one JSON object on stdout, whatever the benchmark prints and however it does."""

import json
import sys

import pytest
from click.testing import CliRunner
from click.testing import Result as Ran

import bench
from cli import cli

CHEAP = ["capacity", "--engine-mb", "100", "--load-s", "1", "--draw-s", "2", "--checkpoints", "10", "--rate", "1"]
# Prints through a child and after its process was replaced, an object before the last one, and more after that.
NOISY = """
import os, subprocess, sys
if sys.argv[1:] == ["again"]:
    print('{"row": 1}', "table", '{"row": 2}', "goodbye", sep=chr(10), flush=True)
    sys.exit(1)
print("starting", flush=True)
subprocess.run(["echo", "from a child"])
os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[2], "again"])
"""


def run(*arguments: str) -> Ran:
    return CliRunner().invoke(cli, arguments)


def apart(monkeypatch: pytest.MonkeyPatch, code: str) -> Ran:
    """A benchmark that is `code`."""
    monkeypatch.setattr(bench, "APART", (sys.executable, "-c", code, "bench"))
    return run("bench", CHEAP[0], "--json")


@pytest.mark.parametrize(
    "arguments", [["bench", *CHEAP, "--json"], ["--json", "bench", *CHEAP]], ids=["after", "before"]
)
def test_a_benchmark_prints_exactly_one_json_object(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    ran = run(*arguments)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.count("\n") == 1 and json.loads(ran.stdout)["bench"] == "capacity"
    assert "checkpoints  zipf" in ran.stderr
    assert capfd.readouterr() == ("", "")


def test_what_programs_and_a_replaced_process_print_goes_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = apart(monkeypatch, NOISY)
    assert (ran.exit_code, ran.stdout) == (1, '{"row": 2}\n')
    assert ran.stderr.splitlines() == ["starting", "from a child", "table", '{"row": 1}', "goodbye"]


def test_wrong_options_and_failures_are_told_as_without_it(capfd: pytest.CaptureFixture[str]) -> None:
    ran = run("bench", *CHEAP[:3], "--json")
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "--engine-mb, --load-s and --draw-s go together" in capfd.readouterr().err


def test_a_benchmark_without_an_object_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = apart(monkeypatch, "print('done')")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert (
        ran.stderr
        == "done\npersonalq: bench capacity: must print one JSON object, got none; it is a bug of the benchmark\n"
    )


def test_a_killed_benchmark_has_the_status_a_shell_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert apart(monkeypatch, "import os; os.kill(os.getpid(), 9)").exit_code == 137


@pytest.mark.parametrize("name", bench.names())
def test_every_benchmark_ends_by_printing_json(name: str) -> None:
    text = (bench.HERE / f"{name}.py").read_text()
    assert "click.echo(json.dumps(" in text.replace("\n        ", "")
