"""Which TensorRT plan of a bundle fits this machine and an adapter's rank; why others do not. Reads manifests, opens nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from personalq.errors import EngineError
from personalq.repository.engines import KeptEngine, engines_of

Shape = tuple[int, ...]


def find_plan(bundle: Path, target: str, device: str, version: str, rank: int = 0) -> KeptEngine:
    """The newest plan of `target` that runs on `device` ('sm89') with this version of TensorRT. Raises EngineError.

    rank: of the adapters. A plan of a larger one takes them too, padded with zeros; the smallest that does is meant.
    """
    refused = []
    fitting = []
    for kept in engines_of(bundle, target):
        why = misfit(kept.manifest.parts, device, version)
        refused += [why] if why else []
        fitting += [] if why else [kept]
    enough = [kept for kept in fitting if rank_of(kept.manifest.parts) >= rank]
    if enough:
        return min(enough, key=lambda kept: (rank_of(kept.manifest.parts), -kept.path.stat().st_mtime_ns))
    if fitting:
        ranks = ", ".join(map(str, sorted({rank_of(kept.manifest.parts) for kept in fitting})))
        raise EngineError(f"no {target} plan for adapters of rank {rank} (got plans of rank {ranks})")
    found = "; ".join(dict.fromkeys(refused)) or "none"
    raise EngineError(f"no {target} plan for {device}, TensorRT {version} (got {found})")


def rank_of(parts: Mapping[str, str]) -> int:
    """The largest rank of the adapters that a plan takes; 0: it takes none."""
    return int(parts.get("set.rank", "0"))


def misfit(parts: Mapping[str, str], device: str, version: str) -> str:
    """Why a plan with these key parts does not run here; '' when it does."""
    built_for, built_with = parts["device"].split(","), parts["version"]
    level = parts.get("set.hardware", "none")
    is_newer_ampere = level == "ampere_plus" and min(map(_number, built_for)) >= 80 and _number(device) >= 80
    if device not in built_for and not is_newer_ampere:
        return f"one for {parts['device']}"
    is_portable = parts.get("set.version_compatible") == "yes" and _major(built_with) <= _major(version)
    if built_with != version and not is_portable:
        return f"one of version {built_with}"
    if parts.get("set.strip") == "yes":
        return "one without weights"
    return ""


def check_shapes(parts: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
    """Raise EngineError when an input is outside the plan's profile."""
    for name, shape in shapes.items():
        profile = parts.get(f"shape.{name}")
        if profile is None:
            continue
        low, high = (_shape(text) for text in (profile.split("/")[0], profile.split("/")[-1]))
        if len(low) != len(shape) or not all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True)):
            raise EngineError(
                f"{name}: must be within {_text(low)} and {_text(high)}, the shapes that the plan was built for, got "
                f"{_text(shape)}; build a plan with a wider range, or take --target onnxruntime"
            )


def _shape(text: str) -> Shape:
    return tuple(int(side) for side in text.split("x"))


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _number(device: str) -> int:
    return int(device.removeprefix("sm"))


def _major(version: str) -> int:
    return int(version.split(".")[0])
