"""Looking up the bundle and engine for a checkpoint: best first, with the reason for every fall-back."""

import os
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from personalq.bundle import SpecEntry, read_manifest
from personalq.errors import EngineError
from runtime import targets
from runtime.store import Store, find


@pytest.fixture
def repository(tmp_path: Path, make_bundle: Any) -> Path:
    """Three bundles of moss-mug: an older W8A8, a newer W8A8, and the newest, unquantised."""
    for age, (name, policy) in enumerate([("ref", "fp32"), ("new", "taq"), ("old", "minmax")]):
        folder = make_bundle(f"repo/bundles/{name}")
        spec = SpecEntry(name=policy, policy=policy, bits="w8a8", sha256="0", storage="float16")
        manifest = read_manifest(folder).model_copy(update={"spec": spec})
        (folder / "manifest.json").write_text(manifest.model_dump_json())
        os.utime(folder / "manifest.json", (1e9 - age, 1e9 - age))
    return tmp_path / "repo"


def test_the_latest_quantised_bundle_comes_first_and_the_reference_last(repository: Path) -> None:
    assert [bundle.name for bundle in Store(repository).bundles("moss-mug")] == ["new", "old", "ref"]
    found = find(repository, "moss-mug")
    assert (found.bundle.name, found.engine_name, found.fallback_reason) == ("new", "onnxruntime", "")


@pytest.mark.parametrize(
    ("target", "how"),
    [("tensorrt", "run: pip install 'personalq[tensorrt]'"), ("tensorrt-rtx", "install NVIDIA's tensorrt_rtx package")],
)
def test_gpu_targets_fall_back_without_their_package_and_say_why(
    repository: Path, target: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    found = find(repository, "moss-mug", target)
    assert found.engine_name == "onnxruntime"
    module = target.replace("-", "_")
    assert found.fallback_reason == f"{module} is not installed; {how}; running ONNX Runtime on the CPU"


def test_openvino_is_taken_where_it_is_installed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: ModuleSpec(name, None))
    found = find(repository, "moss-mug", "openvino")
    assert (found.engine_name, found.fallback_reason) == ("openvino", "")


def test_a_missing_package_is_the_reason_of_a_fall_back(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    found = find(repository, "moss-mug", "openvino")
    assert (found.engine_name, found.fallback_reason) == (
        "onnxruntime",
        "openvino is not installed; run: pip install 'personalq[openvino]'; running ONNX Runtime on the CPU",
    )


def test_an_unknown_target_is_refused(repository: Path) -> None:
    with pytest.raises(EngineError) as error:
        find(repository, "moss-mug", "vulkan")
    assert str(error.value) == (
        "target: must be one of onnxruntime, openvino, tensorrt, tensorrt-rtx, got 'vulkan'; choose one of them"
    )


def test_a_checkpoint_without_bundle_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        find(tmp_path, "red-dog")
    assert str(error.value) == "red-dog: must have a bundle, got none: run 'personalq export red-dog'"


def test_unreadable_bundles_are_passed_over_and_named_when_nothing_is_left(repository: Path) -> None:
    (repository / "bundles" / "new" / "manifest.json").write_text("{")
    assert find(repository, "moss-mug").bundle.name == "old"
    with pytest.raises(EngineError) as error:
        find(repository, "red-dog")
    assert str(error.value) == (
        "red-dog: must have a bundle, got none (bundle new cannot be read: JSONDecodeError): "
        "run 'personalq export red-dog'"
    )


def test_half_written_bundles_are_not_seen(repository: Path) -> None:
    (repository / "bundles" / "new").rename(repository / "bundles" / ".tmp-1-ab")
    assert find(repository, "moss-mug").bundle.name == "old"


def test_a_store_sees_bundles_come_and_go(repository: Path) -> None:
    store = Store(repository)
    assert store.find("moss-mug").bundle.name == "new"
    (repository / "bundles" / "new").rename(repository / "away")
    assert store.find("moss-mug").bundle.name == "old"
    (repository / "away").rename(repository / "bundles" / "back")
    assert store.find("moss-mug").bundle.name == "back"
