"""The command line: one JSON object, one line per failure, the right exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from click.testing import Result as Ran
from safetensors.numpy import save_file

import cli as command_line
from personalq.errors import PersonalQError
from runtime.console import Commands, Result, each_line, reports

CARDS = [
    {"id": "brown-dog", "kind": "lora", "base": "b", "trigger": ["sks dog"], "class_noun": "dog", "name": "Brown dog"},
    {"id": "blue-mug", "kind": "lora", "base": "b", "trigger": ["zwx mug"], "class_noun": "mug", "name": "Blue mug"},
]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with two cards and no weights."""
    cards = tmp_path / "cards.jsonl"
    cards.write_text("".join(json.dumps(card) + "\n" for card in CARDS))
    assert run(tmp_path / "repo", "add", "--cards", str(cards)).exit_code == 0
    return tmp_path / "repo"


def run(repo: Path | None, *arguments: str) -> Ran:
    return CliRunner().invoke(command_line.cli, [*(["--repo", str(repo)] if repo else []), *arguments])


def failed(repo: Path | None, *arguments: str) -> str:
    """The one line on stderr of a command that exits with 1."""
    ran = run(repo, *arguments)
    assert ran.exit_code == 1, ran.output
    assert ran.stdout == ""
    assert ran.stderr.startswith("personalq: ") and ran.stderr.count("\n") == 1
    return ran.stderr


def test_ls_prints_exactly_one_json_object(repo: Path) -> None:
    ran = run(repo, "ls", "--json")
    assert ran.exit_code == 0 and ran.stdout.count("\n") == 1
    rows = json.loads(ran.stdout)["checkpoints"]
    assert [row["id"] for row in rows] == ["blue-mug", "brown-dog"]
    assert rows[0].keys() >= {"id", "kind", "base", "trigger", "class_noun", "has_weights", "bundles"}


def test_json_may_stand_before_the_command(repo: Path) -> None:
    assert run(repo, "--json", "show", "brown-dog").stdout == run(repo, "show", "brown-dog", "--json").stdout


@pytest.mark.parametrize("arguments", [["ls"], ["show", "brown-dog"], ["check"], ["doctor"]], ids=" ".join)
def test_people_and_programs_get_the_same_facts(repo: Path, arguments: list[str]) -> None:
    text, data = run(repo, *arguments), run(repo, *arguments, "--json")
    assert text.exit_code == data.exit_code == 0
    assert isinstance(json.loads(data.stdout), dict) and data.stdout.count("\n") == 1
    assert text.stdout.strip() and "{" not in text.stdout


def test_index_counts_the_cards(repo: Path) -> None:
    assert json.loads(run(repo, "index", "--json").stdout)["cards"] == len(CARDS)


def test_show_knows_the_card_and_its_bundles(repo: Path) -> None:
    data = json.loads(run(repo, "show", "brown-dog", "--json").stdout)
    assert data["trigger"] == ["sks dog"] and data["has_weights"] is False and data["bundles"] == []


@pytest.mark.parametrize("command", ["show", "rm", "calibrate", "export", "verify"])
def test_an_unknown_id_suggests_the_nearest(repo: Path, command: str) -> None:
    text = failed(repo, command, "brwon-dog")
    assert "checkpoint 'brwon-dog': must be an id in" in text and "nearest: brown-dog" in text


@pytest.mark.parametrize("command", ["calibrate", "export"])
def test_a_card_without_weights_cannot_be_exported(repo: Path, command: str) -> None:
    assert "checkpoint 'brown-dog': must have weights, got a card only" in failed(repo, command, "brown-dog")


def test_a_checkpoint_without_a_bundle_says_what_to_run(repo: Path) -> None:
    assert "run 'personalq export brown-dog'" in failed(repo, "verify", "brown-dog")
    text = failed(repo, "generate", "a dog", "-o", str(repo / "x.png"), "--checkpoint", "brown-dog")
    assert "brown-dog: must have a bundle, got none: run 'personalq export brown-dog'" in text


def test_a_missing_repository_is_one_line(tmp_path: Path) -> None:
    assert "must be a repository folder, got nothing there" in failed(tmp_path / "nothing", "ls")


def test_the_environment_names_the_repository(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONALQ_REPO", str(repo))
    assert len(json.loads(run(None, "ls", "--json").stdout)["checkpoints"]) == 2


def test_add_takes_what_fits_and_refuses_the_rest(tmp_path: Path) -> None:
    embedding = tmp_path / "moss.safetensors"
    save_file({"<moss>": np.ones((2, 8), np.float32)}, embedding)
    pickle = tmp_path / "old.ckpt"
    pickle.write_bytes(b"\x80\x04.")
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes(embedding.read_bytes()[:-4])
    ran = run(tmp_path / "repo", "add", str(embedding), str(pickle), str(truncated), "--json")
    assert ran.exit_code == 1 and ran.stdout.count("\n") == 1
    data = json.loads(ran.stdout)
    assert [one["id"] for one in data["added"]] == ["moss"]
    assert data["added"][0].keys() >= {"id", "kind", "base", "trigger", "class_noun", "warnings"}
    reasons = {Path(one["source"]).name: one["reason"] for one in data["refused"]}
    assert reasons.keys() == {"old.ckpt", "cut.safetensors"}
    assert "pickle" in reasons["old.ckpt"] and "must be a whole safetensors file" in reasons["cut.safetensors"]
    assert ran.stderr.count("personalq: ") == 2 and ran.stderr.count("\n") == 2


def test_add_without_anything_is_a_usage_error(tmp_path: Path) -> None:
    ran = run(tmp_path / "repo", "add")
    assert ran.exit_code == 2 and "name at least one SOURCE" in ran.stderr
    assert run(tmp_path / "repo", "add", "a", "b", "--id", "c").exit_code == 2
    assert not (tmp_path / "repo").exists()


def test_rm_removes_the_card(repo: Path) -> None:
    assert json.loads(run(repo, "rm", "blue-mug", "--json").stdout) == {"removed": "blue-mug"}
    assert [row["id"] for row in json.loads(run(repo, "ls", "--json").stdout)["checkpoints"]] == ["brown-dog"]


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["ask"], ["ask", "a", "--batch", "b"], ["generate", "a dog"], ["bench", "nothing"], ["calibrate"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(repo: Path, arguments: list[str]) -> None:
    ran = run(repo, *arguments)
    assert ran.exit_code == 2 and ran.stdout == "" and "Usage: " in ran.stderr


def test_a_target_that_cannot_be_made_is_named(repo: Path) -> None:
    assert run(repo, "export", "brown-dog", "--target", "abacus").exit_code == 2


def test_ask_needs_a_request(repo: Path) -> None:
    assert "request: must say what to draw, got nothing" in failed(repo, "ask", " ")


def test_ask_answers_with_the_documented_keys(repo: Path) -> None:
    ran = run(repo, "ask", "my brown dog on the beach", "--json")
    assert ran.exit_code == 0, ran.stderr
    data = json.loads(ran.stdout)
    keys = {"decision", "checkpoint", "prompt", "question", "options", "candidates", "milliseconds"}
    assert data.keys() >= keys and data["decision"] in ("select", "clarify", "abstain")


def test_a_batch_answers_line_by_line_in_order(repo: Path, tmp_path: Path) -> None:
    batch = tmp_path / "requests.jsonl"
    batch.write_text('{"request": "my brown dog"}\nnot json\n{"request": "my mug", "answers": []}\n')
    ran = run(repo, "ask", "--batch", str(batch))
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.exit_code == 1 and len(lines) == 3
    assert lines[1] == {"error": f"{batch}:2: must be a JSON object with 'request'; fix the line"}
    assert all("decision" in lines[i] for i in (0, 2))


def test_spec_diff_of_nothing_says_what_to_run(tmp_path: Path) -> None:
    assert "no such spec; run 'personalq calibrate ID' first" in failed(None, "spec", "diff", str(tmp_path / "a"), "b")


def test_the_version_is_printed() -> None:
    ran = run(None, "--version")
    if "is not installed" in str(ran.exception):
        pytest.skip("personalq is not installed here: pip install -e .")
    assert ran.exit_code == 0 and ran.stdout.startswith("personalq, version ")


# --- how any command fails


def shaped(body: Callable[[], Result]) -> click.Group:
    """A group with one command `go` that does `body`."""
    group = Commands()

    @group.command()
    @reports
    def go() -> Result:
        return body()

    return group


def invoke(body: Callable[[], Result], *arguments: str) -> Ran:
    return CliRunner().invoke(shaped(body), ["go", *arguments])


def raising(error: BaseException) -> Callable[[], Result]:
    def body() -> Result:
        raise error

    return body


FAILURES = {
    "named": (PersonalQError("a: must be b,\n got c"), 1, "personalq: a: must be b, got c\n"),
    "interrupt": (KeyboardInterrupt(), 130, "personalq: interrupted; nothing half-written was kept\n"),
    "missing package": (
        ModuleNotFoundError("no", name="torch.nn"),
        1,
        "personalq: torch is not installed; run: pip install 'personalq[export]'\n",
    ),
    "no such path": (
        FileNotFoundError(2, "No such file or directory", "/a"),
        1,
        "personalq: /a: must exist, got nothing there; check the path\n",
    ),
    "full disk": (
        OSError(28, "No space left on device", "/a"),
        1,
        "personalq: /a: must be usable, got 'No space left on device'; check permissions and free space\n",
    ),
}


@pytest.mark.parametrize(("error", "code", "line"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_is_one_line_and_a_status(error: BaseException, code: int, line: str) -> None:
    for arguments in ([], ["--json"]):
        ran = invoke(raising(error), *arguments)
        assert (ran.exit_code, ran.stdout, ran.stderr) == (code, "", line)


def test_a_bug_keeps_its_traceback() -> None:
    assert isinstance(invoke(raising(ZeroDivisionError())).exception, ZeroDivisionError)
    assert isinstance(invoke(raising(ModuleNotFoundError("no", name="colorsys2"))).exception, ModuleNotFoundError)


def test_a_result_carries_its_exit_status() -> None:
    ran = invoke(lambda: Result({"passed": False}, code=1), "--json")
    assert ran.exit_code == 1 and json.loads(ran.stdout) == {"passed": False}


def test_results_are_laid_out_for_people() -> None:
    data: dict[str, Any] = {
        "name": "x",
        "nothing": "",
        "rows": [{"key": "a" * 64, "value": 0.123456}, {"key": "short", "is": True}],
        "versions": {"numpy": "2"},
    }
    text = invoke(lambda: Result(data)).stdout
    lines = [line.split() for line in text.splitlines()]
    assert lines == [
        ["name", "x"], ["rows:"], ["key", "value", "is"], ["a" * 12, "0.1235"], ["short", "yes"],
        ["versions:"], ["numpy", "2"],
    ]  # fmt: skip


def test_text_is_never_read_as_markup() -> None:
    assert invoke(lambda: Result({"name": "[red]x[/red]"})).stdout.split() == ["name", "[red]x[/red]"]


def test_each_line_stays_in_order(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"request": "a"}\n[1]\n{"request": 3}\n')

    class Echo:
        def __init__(self, line: dict[str, Any]) -> None:
            self.line = line

        def to_json(self) -> dict[str, Any]:
            return self.line

    ran = invoke(lambda: each_line(file, "request", Echo), "--json")
    assert json.loads(ran.stdout.splitlines()[0]) == {"request": "a"}
    assert ran.exit_code == 1 and ran.stdout.count('"error"') == 2
