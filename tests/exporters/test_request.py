"""Which spec and which targets an export means."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from exporters.request import export_request, is_current, last_spec, reference_spec
from exporters.targets.tensorrt import require
from personalq.errors import EngineError, PersonalQError, SpecError
from personalq.repository import Repository
from personalq.spec import SpecFile, read_spec


def write_specs(root: Path, *names: str) -> Repository:
    """Specs of the checkpoint `me/dog`, each a minute newer than the one before."""
    folder = root / "specs" / "me%2Fdog"
    folder.mkdir(parents=True)
    for age, name in enumerate(names):
        (folder / f"{name}.json").write_text("{}")
        os.utime(folder / f"{name}.json", (1e9 + 60 * age, 1e9 + 60 * age))
    return Repository(root)


def test_the_newest_spec_is_meant(tmp_path: Path) -> None:
    assert last_spec(write_specs(tmp_path, "taq-w4a8", "taq-w8a8"), "me/dog").stem == "taq-w8a8"


def test_a_reference_is_meant_only_when_there_is_nothing_else(tmp_path: Path) -> None:
    assert last_spec(write_specs(tmp_path / "a", "taq-w8a8", "fp32"), "me/dog").stem == "taq-w8a8"
    assert last_spec(write_specs(tmp_path / "b", "fp32", "fp16"), "me/dog").stem == "fp16"


def test_no_spec_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^me/dog: must have a spec .* got none; run 'personalq calibrate me/dog'$"):
        last_spec(write_specs(tmp_path), "me/dog")


def test_a_spec_for_other_weights_or_another_architecture_is_not_current(exported: Any, tmp_path: Path) -> None:
    """A reference is then made again; a calibrated one is refused by the export, or calibrated again by a run over many."""
    repository = Repository.open(Path(shutil.copytree(exported[0].root, tmp_path / "repository")))
    path = repository.root / "specs" / "rex" / "fp32.json"
    assert is_current(path, repository, "rex")
    assert not is_current(path.with_name("missing.json"), repository, "rex")
    file, content = read_spec(path), path.read_bytes()
    assert reference_spec(repository, "rex", "fp32") == path and path.read_bytes() == content
    provenance = file.spec.provenance.model_copy(update={"checkpoint_sha256": "0"})
    for changed in ({"family": "0"}, {"provenance": provenance}):
        SpecFile(file.spec.model_copy(update=changed), file.tensors).write(path)
        assert not is_current(path, repository, "rex")
        assert is_current(reference_spec(repository, "rex", "fp32"), repository, "rex")


def test_a_target_that_this_version_cannot_make_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"makes \(onnxruntime, tensorrt, tensorrt-rtx\), got 'coreml'; leave it out"):
        export_request(Repository(tmp_path), "me/dog", None, ["onnxruntime", "coreml"])


@pytest.mark.parametrize(
    ("target", "package", "message"),
    [
        ("tensorrt", "tensorrt", r"^tensorrt is not installed; run: pip install 'personalq\[tensorrt\]'$"),
        ("tensorrt-rtx", "tensorrt_rtx", r"^tensorrt_rtx is not installed; install NVIDIA's package 'tensorrt_rtx'"),
    ],
)
def test_a_builder_that_is_not_installed_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, package: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PersonalQError, match=message):
        export_request(Repository(tmp_path), "me/dog", None, [target])
    assert list(tmp_path.iterdir()) == []


def test_a_builder_without_its_libraries_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "polygraphy.py").write_text("")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
    with pytest.raises(EngineError, match=r"^tensorrt cannot be imported: libnvinfer.so.11: .*; install it again"):
        require("tensorrt")
