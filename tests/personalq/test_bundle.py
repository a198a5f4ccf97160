"""Manifests: written and read back equal, refused in one line when something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from personalq.bundle import (
    CheckpointEntry,
    FileEntry,
    Graphs,
    Latent,
    Manifest,
    Rows,
    Sizes,
    SpecEntry,
    Text,
    bundle_key,
    check_files,
    file_sha256,
    inside,
    manifest_bytes,
    read_manifest,
)
from personalq.errors import BundleError
from personalq.rows import KeptTokens


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "key": "0" * 64,
        "key_parts": {"spec": "s"},
        "checkpoint": CheckpointEntry(id="mug", name="Mug", kind="lora", base="toy", sha256="c"),
        "family": "f",
        "exporter_version": "1",
        "spec": SpecEntry(name="taq", policy="taq", bits="w8a8", sha256="s", storage="float16"),
        "graphs": Graphs(unet={"ort": "u.onnx"}, text_rows="r.onnx", text_encoder="t.onnx", vae_decoder="v.onnx"),
        "rows": Rows(form="split", width=8, layers=(), kept=KeptTokens(trigger=((5, 6),))),
        "text": Text(bos_id=1, eos_id=2, pad_id=2),
        "latent": Latent(height=8, width=8, scale=2, scaling_factor=0.5),
        "scheduler": {"_class_name": "DDIMScheduler"},
        "sizes": Sizes(unet=1, unet_fp16=2, unet_fp32=4),
        "census": {"conv int8/int8": 1},
    }
    return Manifest(**{**fields, **changes})


def written(folder: Path, **changes: Any) -> Path:
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest(**changes)))
    return folder


def test_a_manifest_is_read_back_equal(tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path)) == manifest()


def test_writing_twice_gives_the_same_bytes_with_sorted_keys() -> None:
    text = manifest_bytes(manifest()).decode()
    assert text == manifest_bytes(manifest()).decode()
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_the_key_depends_on_every_part_and_not_on_their_order() -> None:
    assert bundle_key({"a": "1", "b": "2"}) == bundle_key({"b": "2", "a": "1"})
    assert bundle_key({"a": "1", "b": "2"}) != bundle_key({"a": "1", "b": "3"})


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as error:
        read_manifest(tmp_path)
    expected = f"{tmp_path}: must be a bundle folder with manifest.json, got none; run 'personalq export'"
    assert str(error.value) == expected


def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match=r"manifest\.json: must be JSON, got .*; export the checkpoint again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema_version", 2, r"manifest\.json: schema_version: Input should be 1; export the checkpoint again"),
        ("sizes", {"unet": "many"}, r"manifest\.json: sizes\.unet: Input should be a valid integer"),
        ("surprise", 1, r"manifest\.json: surprise: Extra inputs are not permitted"),
    ],
    ids=["another version", "wrong type", "unknown field"],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    content = json.loads(manifest_bytes(manifest())) | {field: value}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../u.onnx", "/etc/passwd", "a/../../u.onnx", ""])
def test_file_names_never_leave_the_bundle(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"file names must stay inside the bundle, got .*; export it again"):
        read_manifest(written(tmp_path, files={name: FileEntry(sha256="0", bytes=1)}))


def test_a_link_in_a_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "u.onnx").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match=r"file names must stay inside the bundle, got 'u\.onnx'"):
        inside(tmp_path, "u.onnx")


def test_changed_and_missing_files_are_listed(tmp_path: Path) -> None:
    for name in ("same", "flipped", "longer"):
        (tmp_path / name).write_bytes(b"12345678")
    digest = file_sha256(tmp_path / "same")
    (tmp_path / "flipped").write_bytes(b"12345679")
    (tmp_path / "longer").write_bytes(b"123456789")
    entry = FileEntry(sha256=digest, bytes=8)
    subject = manifest(files={name: entry for name in ("same", "flipped", "longer", "gone")})
    assert check_files(tmp_path, subject) == [
        "flipped: bytes differ from the manifest's sha256; export the checkpoint again",
        "longer: bytes differ from the manifest's sha256; export the checkpoint again",
        f"gone: missing from bundle {tmp_path.name[:12]}; export the checkpoint again",
    ]
