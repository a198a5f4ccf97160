"""What the repository says of bundles of every kind: listed, shown, removed with their checkpoint, checked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import cli
from personalq.repository import Repository
from tests.personalq import toy_checkpoints as make

BASE_SHA = "b" * 64


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    opened = Repository.open(tmp_path / "repo", create=True)
    opened.add_base(make.base(tmp_path / "toy"))
    opened.add(make.lora(tmp_path / "dog"))
    return opened


def put(repository: Repository, key: str, at: int, **told: Any) -> Path:
    """A bundle with one file of four bytes, written at second `at`."""
    place = repository.root / "bundles" / key
    place.mkdir(parents=True)
    (place / "w").write_bytes(b"four")
    files = {"w": {"sha256": hashlib.sha256(b"four").hexdigest(), "bytes": 4}}
    (place / "manifest.json").write_text(json.dumps({"files": files, **told}))
    os.utime(place / "manifest.json", (at, at))
    return place


def put_adapter(repository: Repository, at: int = 2000, key: str = "adapter") -> Path:
    return put(repository, key, at, kind="adapter", checkpoint={"id": "dog", "base": "toy"}, base_sha256=BASE_SHA)


def put_engine(
    repository: Repository, at: int = 1000, key: str = "engine", sha256: str = BASE_SHA, policy: str = "taq"
) -> Path:
    told = {"checkpoint": {"id": "toy"}, "key_parts": {"weights": sha256}, "spec": {"policy": policy}}
    return put(repository, key, at, kind="base", **told)


def put_merged(repository: Repository, at: int = 1500, key: str = "merged", policy: str = "taq") -> Path:
    told = {"checkpoint": {"id": "dog"}, "key_parts": {"weights": "other"}, "spec": {"policy": policy}}
    return put(repository, key, at, **told)


def shown(repository: Repository, *arguments: str) -> Any:
    ran = CliRunner().invoke(cli, ["--repo", str(repository.root), *arguments, "--json"])
    return json.loads(ran.stdout)


def test_show_says_form_bytes_and_whether_the_bases_engine_is_here(repository: Repository) -> None:
    put_merged(repository)
    put_adapter(repository)
    alone = shown(repository, "show", "dog")
    assert alone["bundles"] == ["merged", "adapter"] and alone["form"] == "merged"
    assert alone["exports"] == [
        {"bundle": "merged", "form": "merged", "bytes": 4},
        {"bundle": "adapter", "form": "attached", "bytes": 4, "base_bundle": ""},
    ]
    put_engine(repository)
    put_engine(repository, at=900, key="older")
    put_engine(repository, at=3000, key="another base's", sha256="c" * 64)
    both = shown(repository, "show", "dog")
    assert both["form"] == "attached" and both["exports"][1]["base_bundle"] == "engine"


def test_ls_says_the_form_and_a_bases_engine_is_no_checkpoints_bundle(repository: Repository) -> None:
    put_engine(repository)
    (row,) = shown(repository, "ls")["checkpoints"]
    assert (row["form"], row["bundles"]) == ("", [])
    put_adapter(repository)
    (row,) = shown(repository, "ls")["checkpoints"]
    assert (row["form"], row["bundles"]) == ("attached", ["adapter"])


def test_the_newest_quantised_engine_of_the_bases_weights_serves(repository: Repository) -> None:
    for at, key, sha256 in ((2000, "new", BASE_SHA), (1000, "old", BASE_SHA), (3000, "other", "c" * 64)):
        put_engine(repository, at, key, sha256)
    put_engine(repository, 4000, "float", policy="fp16")
    assert [place.name for place in repository.base_engines(BASE_SHA)] == ["float", "old", "new"]


def test_the_form_is_that_of_what_draws(repository: Repository) -> None:
    """As runtime.store has it: what can be drawn with, quantised before unquantised, then the newest."""
    put_adapter(repository, at=3000)
    assert repository.exports("dog").form == "attached"
    put_merged(repository, at=1000, key="float", policy="fp32")
    assert repository.exports("dog").form == "merged"  # the adapter has no engine
    put_engine(repository, key="float base", policy="fp16")
    assert repository.exports("dog").form == "attached"
    put_merged(repository, at=2000)
    assert repository.exports("dog").form == "merged"  # quantised
    put_engine(repository)
    assert repository.exports("dog").form == "attached"
    put_merged(repository, at=4000, key="newest")
    assert repository.exports("dog").form == "merged"


def test_a_checkpoint_is_removed_with_its_adapters_and_nothing_of_its_base(repository: Repository) -> None:
    engine = put_engine(repository)
    for place in (put_adapter(repository), put_merged(repository)):
        assert place.is_dir()
    repository.remove("dog")
    assert [place.name for place in (repository.root / "bundles").iterdir()] == [engine.name]
    assert repository.bases() == ["toy"] and repository.cards() == []


def test_a_checkpoint_of_its_bases_name_is_removed_without_the_bases_engine(
    repository: Repository, tmp_path: Path
) -> None:
    repository.add(make.lora(tmp_path / "toy2"), card_id="toy")
    engine = put_engine(repository)
    repository.remove("toy")
    assert engine.is_dir()


def test_check_finds_an_adapter_that_no_engine_serves_and_changed_bytes_of_any_kind(repository: Repository) -> None:
    adapter = put_adapter(repository)
    put_engine(repository, sha256="c" * 64)
    (problem,) = repository.check()
    assert (problem.kind, problem.path) == ("missing", str(adapter))
    assert problem.message == (
        f"{adapter}: its base must have an engine here, got none; "
        "run 'personalq calibrate --base toy' and 'personalq export --base toy'"
    )
    engine = put_engine(repository, key="right")
    assert repository.check() == []
    for place in (adapter, engine):
        (place / "w").write_bytes(b"f0ur")
    assert [problem.kind for problem in repository.check()] == ["changed", "changed"]


ODD: list[dict[str, Any]] = [
    {"kind": "adapter"},
    {"kind": ["adapter"], "checkpoint": {"id": "x"}},
    {"kind": 3, "checkpoint": 4},
    {"kind": "base", "key_parts": []},
    {"kind": "base", "checkpoint": {"id": "x"}, "key_parts": {"weights": ["b"]}},
]


@pytest.mark.parametrize("told", ODD, ids=str)
def test_a_manifest_of_odd_types_breaks_no_listing(repository: Repository, told: dict[str, Any]) -> None:
    put(repository, "odd", 1, **told)
    put_adapter(repository)
    assert shown(repository, "show", "dog")["bundles"] == ["adapter"]
    assert all(problem.kind == "missing" for problem in repository.check())
