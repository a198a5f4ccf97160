"""What this machine can run: devices, targets with the reason when one is missing, advice, versions. Imports no engine."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .engines.sessions import has_int8_dot_product
from .targets import TARGETS, missing

# Package -> the extra that installs it, for what runs or makes bundles.
EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "torch": "export",
    "diffusers": "export",
    "transformers": "export",
    "onnx": "convert",
}
# Distributions that install the same module.
SAME = {"onnxruntime": ("onnxruntime-gpu",)}
# CPU features that decide which kernels run.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")


@dataclass(frozen=True)
class Device:
    """kind: 'cpu' or 'cuda'. features: CPU flags that matter here; for a GPU its compute capability and memory."""

    kind: str
    name: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """Whether bundles can run on a target here. reason: why not, and what to do."""

    name: str
    available: bool
    reason: str = ""


def examine() -> dict[str, Any]:
    """The keys of `personalq doctor --json`: devices, targets, advice, versions."""
    return {
        "devices": [asdict(device) for device in devices()],
        "targets": [asdict(target) for target in targets()],
        "advice": advice(),
        "versions": versions(),
    }


def devices() -> list[Device]:
    """The CPU, then every GPU that the NVIDIA driver lists."""
    return [_cpu(), *_gpus()]


def targets() -> list[Target]:
    """Every target: whether it is served here, or what is missing."""
    return [_target(name) for name in TARGETS]


def advice() -> list[str]:
    """What would run better here, and how: one line each."""
    if has_int8_dot_product():
        return []
    return [
        "no VNNI: 8-bit weights take exact int8 kernels, which are slower; 'personalq calibrate ID --bits w7a8' makes "
        "weights for which the quick ones are exact"
    ]


def versions() -> Mapping[str, str]:
    """Versions of Python, PersonalQ and the packages that run or make bundles; '' for one that is not installed."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "personalq": _version("personalq")}
    return found | {package: _version(package) for package in EXTRAS}


def _target(name: str) -> Target:
    reason = missing(name)
    return Target(name, available=not reason, reason=reason)


def _version(package: str) -> str:
    for name in (package, *SAME.get(package, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def _cpu() -> Device:
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
            break
    return Device("cpu", name, tuple(flag for flag in CPU_FLAGS if flag in flags))


def _gpus() -> list[Device]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        Device("cuda", row[0], (f"compute capability {row[1]}", row[2], f"driver {row[3]}"))
        for row in rows
        if len(row) == 4
    ]
