"""The repository: what goes in comes out, nothing is half-written, every refusal says why."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from personalq.errors import RepositoryError
from personalq.repository import Repository
from personalq.repository.atomic import atomic_directory, write_atomic
from tests.personalq import toy_checkpoints as make

CATALOG = Path(__file__).parents[2] / "data" / "catalog_real.jsonl"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    opened = Repository.open(tmp_path / "repo", create=True)
    opened.add_base(make.base(tmp_path / "toy"))
    return opened


def test_open_takes_the_argument_then_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PERSONALQ_REPO", str(tmp_path / "b"))
    assert Repository.open(tmp_path / "a").root.name == "a"
    assert Repository.open().root.name == "b"


def test_a_repository_that_is_not_there_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        RepositoryError, match=r"must be a repository folder, got nothing there; make one with 'personalq --repo"
    ):
        Repository.open(tmp_path / "none")


@pytest.mark.parametrize("kind", [make.lora, make.embedding, make.custom_diffusion])
def test_each_kind_is_added_listed_and_removed(repository: Repository, tmp_path: Path, kind: object) -> None:
    result = repository.add(kind(tmp_path / "thing"))  # type: ignore[operator]
    assert [a.id for a in result.added] == ["thing"] and not result.refused
    assert repository.has_weights("thing") and repository.check() == []
    assert repository.base_dir(repository.card("thing")).name == "toy"
    assert repository.checkpoint_dir("thing").name == "thing"
    repository.remove("thing")
    assert repository.cards() == [] and not repository.has_weights("thing")


def test_a_lora_for_another_base_is_refused(repository: Repository, tmp_path: Path) -> None:
    (refused,) = repository.add(make.lora(tmp_path / "wide", width=16)).refused
    assert "attn2.to_k: must fit the base's [4, 8], got up [4, 2] @ down [2, 16]" in refused.reason
    assert refused.reason.endswith("add it with --base of the model it was trained on")
    assert repository.cards() == []


def test_embeddings_and_custom_diffusion_for_another_base_are_refused(repository: Repository, tmp_path: Path) -> None:
    embedding = repository.add(make.embedding(tmp_path / "e", width=7)).refused[0].reason
    assert "<cat-toy>: must be vectors of the base's width 6, got [2, 7]" in embedding
    projection = repository.add(make.custom_diffusion(tmp_path / "c", width=9)).refused[0].reason
    assert "attn2.to_k.weight: must fit the base's [4, 8], got [4, 9]" in projection


def test_a_fine_tuned_unet_of_another_shape_is_refused(repository: Repository, tmp_path: Path) -> None:
    folder = make.base(tmp_path / "other", width=12)
    (folder / "model_index.json").unlink()
    reason = repository.add(folder, base="toy").refused[0].reason
    assert "attn2.to_k.weight: must be [4, 8] as in the base, got [4, 12]" in reason


def test_an_unknown_base_and_a_shared_trigger_are_warnings(repository: Repository, tmp_path: Path) -> None:
    repository.add(make.lora(tmp_path / "one"))
    result = repository.add(make.lora(tmp_path / "two"), base="elsewhere/base")
    assert result.added[0].warnings == (
        "base 'elsewhere/base' is not in this repository: listed, not exportable until it is added",
        "trigger shared with one: Check-in will tell them apart by their cards",
    )
    with pytest.raises(RepositoryError, match=r"base must be one in this repository \(toy\), got 'elsewhere/base'"):
        repository.base_dir(repository.card("two"))


def test_an_id_that_is_taken_is_refused_unless_replaced(repository: Repository, tmp_path: Path) -> None:
    source = make.lora(tmp_path / "x")
    repository.add(source)
    assert "must be new, got an id that is here; remove it first" in repository.add(source).refused[0].reason
    assert repository.add(source, replace=True).added


def test_an_unknown_id_names_the_nearest(repository: Repository) -> None:
    repository.add_cards(CATALOG)
    with pytest.raises(RepositoryError, match=r"checkpoint 'db-bakpack': must be an id in .* nearest: db-backpack"):
        repository.card("db-bakpack")
    with pytest.raises(RepositoryError, match="400 known, list them with 'personalq ls'"):
        repository.card("zzzzzzzzzz")


def test_cards_without_weights_share_one_file_and_bad_lines_are_refused_one_by_one(
    repository: Repository, tmp_path: Path
) -> None:
    file = tmp_path / "cards.jsonl"
    file.write_text('{"id": "a/b", "kind": "lora"}\nnot json\n{"id": "../up", "kind": "lora"}\n')
    result = repository.add_cards(file)
    assert [a.id for a in result.added] == ["a/b"] and len(result.refused) == 2
    assert result.refused[0].source.endswith("cards.jsonl:2") and "must be JSON" in result.refused[0].reason
    assert not repository.has_weights("a/b") and repository.check() == []
    with pytest.raises(RepositoryError, match="checkpoint 'a/b': must have weights, got a card only"):
        repository.checkpoint_dir("a/b")
    repository.remove("a/b")
    assert repository.cards() == []


def test_weights_for_a_listed_card_take_its_place(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "x", "kind": "lora", "name": "old"}\n')
    repository.add_cards(tmp_path / "c.jsonl")
    repository.add(make.lora(tmp_path / "x"))
    assert len(repository.cards()) == 1 and repository.has_weights("x")
    assert "got a checkpoint with weights" in repository.add_cards(tmp_path / "c.jsonl").refused[0].reason


def test_check_finds_a_flipped_byte_a_missing_file_and_a_broken_card(repository: Repository, tmp_path: Path) -> None:
    repository.add(make.lora(tmp_path / "x"))
    weights = repository.checkpoint_dir("x") / "pytorch_lora_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert [p.kind for p in repository.check()] == ["changed"]
    weights.unlink()
    assert [p.kind for p in repository.check()] == ["missing"]
    (repository.root / "checkpoints" / "x" / "card.json").write_text("{")
    assert {p.kind for p in repository.check()} == {"missing", "card"}


def test_bundles_are_found_by_their_checkpoint_and_checked(repository: Repository) -> None:
    for key, content in (("k2", b"two"), ("k1", b"one")):
        bundle = repository.root / "bundles" / key
        bundle.mkdir(parents=True)
        (bundle / "w").write_bytes(content)
        files = {"w": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
        (bundle / "manifest.json").write_text(json.dumps({"checkpoint": {"id": "x"}, "files": files}))
        os.utime(bundle / "manifest.json", (1000 if key == "k2" else 2000,) * 2)
    assert [b.name for b in repository.bundles("x")] == ["k2", "k1"] and repository.check() == []
    (repository.root / "bundles" / "k1" / "w").write_bytes(b"0ne")
    (problem,) = repository.check()
    assert (
        problem.kind == "changed"
        and "must have the bytes that were recorded, got others; export it again" in problem.message
    )


def test_orphans_of_dead_writers_are_reported_and_removed_only_when_asked(repository: Repository) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    orphan = repository.root / "bundles" / f".tmp-{dead.pid}-abc"
    orphan.mkdir(parents=True)
    mine = repository.root / "bundles" / f".tmp-{os.getpid()}-abc"
    mine.mkdir()
    assert [(p.kind, p.fixed) for p in repository.check()] == [("orphan", False)] and orphan.exists()
    assert [(p.kind, p.fixed) for p in repository.check(fix=True)] == [("orphan", True)]
    assert not orphan.exists() and mine.exists()


def test_an_unwritable_repository_refuses_with_one_line(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    source = make.lora(tmp_path / "x")
    monkeypatch.setattr(Path, "mkdir", denied)
    (refused,) = repository.add(source).refused
    assert "must be writable, got 'Permission denied'; check permissions and free space" in refused.reason


def test_a_failure_inside_an_atomic_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as place:
        (place / "half").write_text("h")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_published_folder_is_not_overwritten_but_can_be_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "out", replace=True) as place:
            (place / "f").write_text(text)
    assert (tmp_path / "out" / "f").read_text() == "two"
    with (
        pytest.raises(RepositoryError, match="must not exist yet, got a published folder"),
        atomic_directory(tmp_path / "out"),
    ):
        pass


def test_write_atomic_replaces_the_whole_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "f", b"one")
    write_atomic(tmp_path / "a" / "f", b"two")
    assert (tmp_path / "a" / "f").read_bytes() == b"two" and len(list((tmp_path / "a").iterdir())) == 1


def test_a_base_needs_a_model_index(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"must be a diffusers pipeline folder, got no model_index.json"):
        repository.add_base(make.lora(tmp_path / "x"))
    assert repository.bases() == ["toy"]
