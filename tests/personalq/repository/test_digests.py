"""Hashes of large files are recorded beside them and hold only while the file is exactly as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from personalq.bundle import file_sha256
from personalq.repository import Repository, digests
from personalq.repository.digests import RECORD, digests_of
from personalq.repository.identity import delta_sha256, weights_sha256


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files whose bytes were read, in a process that begins anew, where every file is large and still."""
    read: list[str] = []

    def counted(file: Path) -> str:
        read.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr(digests, "file_sha256", counted)
    monkeypatch.setattr(digests, "SMALLEST", 1)
    monkeypatch.setattr(digests, "_STILL_S", -1.0)
    monkeypatch.setattr(digests, "_SEEN", {})
    return read


def forget() -> None:
    """Begin as a new process."""
    digests._SEEN.clear()


def write(file: Path, value: float) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.full((2, 6), value, np.float32)}, file)
    return file


def test_a_file_that_lies_untouched_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "base" / "unet" / "model.safetensors", 1)
    first = weights_sha256(tmp_path / "base", None)
    forget()
    assert weights_sha256(tmp_path / "base", None) == first and hashed == [file.name]
    assert json.loads((tmp_path / "base" / RECORD).read_text()).keys() == {"unet/model.safetensors"}


def test_bytes_changed_with_their_size_and_time_as_before_are_read_again(tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "base" / "model.safetensors", 1)
    first, before = weights_sha256(tmp_path / "base", None), file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    forget()
    assert weights_sha256(tmp_path / "base", None) != first


def test_a_record_that_was_copied_along_says_nothing(tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "base" / "model.safetensors", 1)
    weights_sha256(tmp_path / "base", None)
    forget()
    copy = shutil.copytree(tmp_path / "base", tmp_path / "copy")
    assert (copy / RECORD).is_file()
    weights_sha256(copy, None)
    assert hashed == [file.name, file.name]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model.safetensors": 3}', '{"model.safetensors": [[1, 2, 3, 4], "no"]}']
)
def test_a_broken_record_is_no_record(tmp_path: Path, hashed: list[str], text: str) -> None:
    write(tmp_path / "base" / "model.safetensors", 1)
    wanted = weights_sha256(tmp_path / "base", None)
    forget()
    (tmp_path / "base" / RECORD).write_text(text)
    assert weights_sha256(tmp_path / "base", None) == wanted and len(hashed) == 2


def test_a_file_that_was_just_written_is_not_recorded(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change within one tick of the clock would not show."""
    monkeypatch.setattr(digests, "_STILL_S", 1000.0)
    write(tmp_path / "base" / "model.safetensors", 1)
    weights_sha256(tmp_path / "base", None)
    assert not (tmp_path / "base" / RECORD).exists()


def test_small_files_leave_no_record(tmp_path: Path) -> None:
    write(tmp_path / "base" / "model.safetensors", 1)
    weights_sha256(tmp_path / "base", None)
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["model.safetensors"]


def test_a_folder_that_is_only_read_is_hashed_each_time(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path / "base" / "model.safetensors", 1)
    monkeypatch.setattr(os, "replace", denied)
    first = digests_of(tmp_path / "base", [file])
    forget()
    assert digests_of(tmp_path / "base", [file]) == first == [file_sha256(file)] and len(hashed) == 2
    assert [one.name for one in (tmp_path / "base").iterdir()] == [file.name]


def test_a_record_is_no_checkpoint_file_and_no_problem(tmp_path: Path, hashed: list[str]) -> None:
    from tests.personalq import toy_checkpoints as make

    repository = Repository.open(tmp_path / "repo", create=True)
    repository.add_base(make.base(tmp_path / "toy"))
    weights_sha256(repository.root / "bases" / "toy", None)
    assert (repository.root / "bases" / "toy" / RECORD).is_file()
    assert repository.bases() == ["toy"] and repository.check() == []
    assert repository.add_base(repository.root / "bases" / "toy", base_id="again").id == "again"
    assert not (repository.root / "bases" / "again" / RECORD).exists()


def test_a_deltas_hash_is_of_its_own_files_alone(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2)):
        write(tmp_path / name / "unet" / "model.safetensors", value)
    delta = tmp_path / "delta"
    write(delta / "lora.safetensors", 3)
    first = delta_sha256(delta)
    assert first not in {weights_sha256(tmp_path / name, delta) for name in ("one", "two")}
    (delta / "README.md").write_text("words")
    assert delta_sha256(delta) == first
    (delta / "lora.safetensors").rename(delta / "other.safetensors")
    assert delta_sha256(delta) != first
