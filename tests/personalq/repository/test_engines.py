"""Engines are kept beside a bundle under a key of everything they depend on, and refused when their bytes changed."""

from pathlib import Path

import pytest

from personalq.errors import EngineError, RepositoryError
from personalq.repository.engines import check_engine, engine_at, engine_key, engines_of, keep_engine, read_engine

PARTS = {"target": "openvino", "device": "this CPU", "shapes": "sample 2x4x8x8"}


def test_a_kept_engine_is_found_by_its_parts_and_by_no_others(tmp_path: Path) -> None:
    kept = keep_engine(tmp_path, PARTS, "compiled.blob", b"abc")
    found = engine_at(tmp_path, PARTS)
    assert found == kept and kept.path.read_bytes() == b"abc"
    assert kept.path.parent.name == engine_key(PARTS) and engine_key(PARTS).startswith("openvino-")
    assert engine_at(tmp_path, {**PARTS, "device": "another CPU"}) is None
    assert engines_of(tmp_path, "openvino") == [kept] and engines_of(tmp_path, "tensorrt") == []
    check_engine(kept)


def test_keeping_again_replaces(tmp_path: Path) -> None:
    keep_engine(tmp_path, PARTS, "compiled.blob", b"abc")
    assert keep_engine(tmp_path, PARTS, "compiled.blob", b"abcd").path.read_bytes() == b"abcd"
    assert len(list((tmp_path / "engines").iterdir())) == 1


@pytest.mark.parametrize("content", [b"abd", b"ab", None], ids=["changed", "short", "gone"])
def test_changed_bytes_are_refused(tmp_path: Path, content: bytes | None) -> None:
    kept = keep_engine(tmp_path, PARTS, "compiled.blob", b"abc")
    kept.path.unlink() if content is None else kept.path.write_bytes(content)
    with pytest.raises(EngineError) as error:
        check_engine(kept)
    cure = f"remove {kept.path.parent} and it is made again"
    reason = (
        "must be readable, got 'No such file or directory'"
        if content is None
        else "bytes differ from the sha256 in its manifest"
    )
    assert str(error.value) == f"{kept.path}: {reason}; {cure}"


@pytest.mark.parametrize("change", [("this CPU", "that CPU"), ("compiled.blob", "../../x"), ("{", "[")])
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    kept = keep_engine(tmp_path, PARTS, "compiled.blob", b"abc")
    file = kept.path.parent / "manifest.json"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(EngineError, match=r"manifest.json: must .*; remove .* and it is made again$"):
        read_engine(kept.path.parent)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("")
    with pytest.raises(RepositoryError, match="must be writable"):
        keep_engine(tmp_path, PARTS, "compiled.blob", b"abc")
