"""A bundle exported without a reference: verify says in one line how to make one, and that line works."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import cli
from tests.fleet.many import add_lora, fresh_copy


@pytest.fixture
def root(exported: Any, tmp_path: Path) -> Path:
    """rex with specs and a reference; 'my cat', which was never calibrated."""
    repository = fresh_copy(exported[0].root, tmp_path / "repository")
    add_lora(repository.root, "cat", 0.5)
    folder = repository.root / "checkpoints" / "cat"
    card = {**json.loads((folder / "card.json").read_text()), "id": "my cat"}
    (folder / "card.json").write_text(json.dumps(card))
    folder.rename(folder.with_name("my%20cat"))
    return repository.root


def ran(root: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    done = CliRunner().invoke(cli, ["--repo", str(root), *arguments, "--json"])
    assert done.stdout.count("\n") == 1, done.output
    return json.loads(done.stdout), done.exit_code


def reason(root: Path, id_: str = "my cat") -> str:
    """Why verify fails: one check, which the headline repeats."""
    data, code = ran(root, "verify", id_)
    assert code == 1 and data["passed"] is False
    (check,) = [one for one in data["checks"] if not one["passed"]]
    assert check["name"] == "reference" and check["reason"] in data["headline"] and "\n" not in data["headline"]
    return str(check["reason"])


def follow(root: Path, text: str) -> None:
    """Run the commands of a reason, every one of which must succeed."""
    for command in text.partition("run: ")[2].split(" && "):
        program, *arguments = shlex.split(command)
        assert program == "personalq"
        data, code = ran(root, *arguments)
        assert code == 0, data


@pytest.mark.parametrize("policy", ["fp16", "fp32"])
def test_an_unquantised_export_alone_is_told_how_to_get_its_reference(root: Path, policy: str) -> None:
    assert ran(root, "export", "my cat", "--spec", policy)[1] == 0
    text = reason(root)
    assert text == (
        "golden.safetensors: must hold what torch computes in FP32 (a reference), got a bundle exported without; run: "
        f"personalq calibrate 'my cat' --policy {policy} && personalq export 'my cat' --spec {policy} "
        "&& personalq verify 'my cat'"
    )
    follow(root, text)
    data, code = ran(root, "verify", "my cat")
    assert code == 0 and data["headline"].startswith(f"PASSED my cat/{policy}: ")


def test_people_see_the_same_line_first(root: Path) -> None:
    ran(root, "export", "my cat", "--spec", "fp16")
    done = CliRunner().invoke(cli, ["--repo", str(root), "verify", "my cat"])
    first = " ".join(done.stdout.split("\nlevel")[0].split())
    assert done.exit_code == 1 and first.startswith("FAILED my cat/fp16: reference: golden.safetensors: must hold")
    assert "personalq calibrate 'my cat' --policy fp16 && personalq export" in first


def test_a_reference_that_was_made_since_needs_another_export_only(root: Path) -> None:
    ran(root, "export", "my cat", "--spec", "fp16")
    assert ran(root, "calibrate", "my cat", "--policy", "fp32")[1] == 0
    text = reason(root)
    assert text.endswith("; run: personalq export 'my cat' --spec fp16 && personalq verify 'my cat'")
    follow(root, text)


def test_its_files_alone_can_be_verified(root: Path) -> None:
    ran(root, "export", "my cat", "--spec", "fp16")
    assert ran(root, "verify", "my cat", "--level", "integrity")[1] == 0


def test_a_spec_from_elsewhere_is_told_where_its_reference_is(root: Path, tmp_path: Path) -> None:
    for file in (root / "specs" / "rex").glob("taq-w8a8.*"):
        shutil.copy(file, tmp_path)
    assert ran(root, "export", "rex", "--spec", str(tmp_path / "taq-w8a8.json"))[1] == 0
    beside = "with the spec's file in specs/rex/ beside reference.safetensors"
    assert reason(root, "rex").endswith(f"; run: personalq export rex --spec FILE, {beside}")
