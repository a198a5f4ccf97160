"""The doctor says what is here and, for everything else, what to do."""

import subprocess
from importlib.machinery import ModuleSpec

import pytest

from runtime import doctor, targets
from runtime.targets import TARGETS


def test_every_target_is_judged_and_none_is_missing_without_a_reason() -> None:
    targets = doctor.targets()
    assert [target.name for target in targets] == list(TARGETS)
    assert all(target.available or target.reason for target in targets)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    reasons = {target.name: target.reason for target in doctor.targets()}
    assert reasons["onnxruntime"] == "onnxruntime is not installed; run: pip install 'personalq[cpu]'"
    assert reasons["tensorrt"] == "tensorrt is not installed; run: pip install 'personalq[tensorrt]'"
    assert reasons["tensorrt-rtx"] == "tensorrt_rtx is not installed; install NVIDIA's tensorrt_rtx package"


def test_every_target_whose_package_is_installed_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: ModuleSpec(name, None))
    assert all(target.available and not target.reason for target in doctor.targets())


def test_versions_are_text_and_empty_when_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.versions()
    assert found["python"].count(".") == 2 and found.keys() >= {"personalq", *doctor.EXTRAS}

    def missing(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    assert doctor.versions()["onnxruntime"] == ""


def test_the_cpu_is_named_with_the_features_that_choose_kernels() -> None:
    cpu = doctor.devices()[0]
    assert cpu.kind == "cpu" and cpu.name and set(cpu.features) <= set(doctor.CPU_FLAGS)


@pytest.mark.parametrize("has_vnni", [True, False])
def test_a_cpu_without_vnni_is_told_of_seven_bits(monkeypatch: pytest.MonkeyPatch, has_vnni: bool) -> None:
    monkeypatch.setattr(doctor, "has_int8_dot_product", lambda: has_vnni)
    lines = doctor.examine()["advice"]
    assert lines == [] if has_vnni else "--bits w7a8" in lines[0]


def test_gpus_are_what_the_driver_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "NVIDIA GeForce RTX 4090, 8.9, 24564 MiB, 580.1\nbroken line\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=listed))
    (gpu,) = doctor.devices()[1:]
    assert gpu == doctor.Device(
        "cuda", "NVIDIA GeForce RTX 4090", ("compute capability 8.9", "24564 MiB", "driver 580.1")
    )


def test_a_machine_without_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    assert len(doctor.devices()) == 1
