"""The TAQ spec: every precision decision about one checkpoint, with its reason and where it came from.

A spec is `<name>.json` (readable, diffable) beside `<name>.safetensors` (scales and, where a rounding was learnt, its integers).
Backend-neutral: it names layers by their torch module path and knows nothing of ONNX.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import load, save

from .errors import SpecError
from .repository.atomic import write_atomic
from .rows import KeptTokens, RowLayer

SCHEMA_VERSION: Literal[1] = 1
FORMAT: Literal["personalq-taq-spec"] = "personalq-taq-spec"

REFERENCE = "reference.safetensors"  # beside the specs of a checkpoint: what torch computes in FP32


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerSpec(Frozen):
    """One Conv2d or Linear of the UNet. Scales are tensors `<name>.weight_scale`, `.input_scale`, `.output_scale`.

    balanced: the input is divided by `<name>.input_balance` (C_in,) before it is quantised; the stored integers belong to
    the weight multiplied by it (SmoothQuant, arXiv 2211.10438, eq. 3). low_rank: r > 0 adds (x @ `<name>.low_rank_down`)
    @ `<name>.low_rank_up`, (K, r) and (r, N) float16, computed beside the integers (SVDQuant, arXiv 2411.05007, eq. 5).
    """

    op: Literal["conv", "linear"]
    weight: Literal["int8", "int7", "int6", "int4", "float"]
    group: int | None = Field(
        None,
        ge=1,
        description="block length along a Linear's input axis, scales (N, K / group); None = one scale per output channel",
    )
    activation: Literal["int8", "float"]
    rounding: Literal["nearest", "stored"] = "nearest"
    balanced: bool = False
    low_rank: int = Field(0, ge=0)
    found_by: str = Field("", description="how the scales were found, e.g. 'mse' or 'absmax'")
    reason: str = Field("", description="why the layer stays float, or is wider than the budget's default")


class RowsSpec(Frozen):
    """Cross-attention text rows: which tokens stay FP16, at how many bits the rest is stored, and why."""

    kept: KeptTokens
    layers: tuple[RowLayer, ...]
    reasons: dict[str, str] = {}


_NOT_DECIDED: Any = {"name": True, "provenance": {"date", "notes", "versions", "reference"}}


class Provenance(Frozen):
    """What produced the spec; enough to produce it again.

    reference: about the FP32 weights themselves; `checked_against` says which independent loader arrived at the same.
    """

    checkpoint_sha256: str = ""
    prompts_sha256: str = ""
    prompts: int = 0
    timesteps: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    versions: dict[str, str] = {}
    date: str = ""
    notes: dict[str, Any] = {}
    reference: dict[str, str] = {}


class Spec(Frozen):
    """`storage` is the float type of everything not quantised: float32 for the reference policy, float16 otherwise.

    tuned: vectors (biases, norms) whose values are the tensors `<parameter>.tuned`, not the checkpoint's. corrected: the
    prediction leaves as (y - `correction.mean`[bin]) / (1 + `correction.gain`[bin]), bins of equal time (PTQD, arXiv 2305.10657).
    """

    format: Literal["personalq-taq-spec"] = FORMAT
    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    policy: str
    bits: str
    checkpoint: str
    family: str
    storage: Literal["float16", "float32"] = "float16"
    layers: dict[str, LayerSpec]
    rows: RowsSpec
    tuned: tuple[str, ...] = ()
    corrected: bool = False
    budget_bytes: int | None = None
    provenance: Provenance = Provenance()
    tensors_sha256: str = ""

    @property
    def is_float(self) -> bool:
        """True for a reference spec that quantises nothing."""
        return all(layer.weight == "float" and layer.activation == "float" for layer in self.layers.values())


class SpecFile:
    """A spec together with its tensors (name -> float32 scale or int8 integers)."""

    def __init__(self, spec: Spec, tensors: dict[str, npt.NDArray[Any]]):
        # safetensors writes an array's memory as it lies: columns first would come back as other numbers.
        tensors = {name: np.asarray(value, order="C") for name, value in sorted(tensors.items())}
        blob = save(tensors) if tensors else b""
        self.spec = spec.model_copy(update={"tensors_sha256": hashlib.sha256(blob).hexdigest() if blob else ""})
        self.tensors = tensors
        self._blob = blob
        check_tensors(self.spec, tensors)

    def content_sha256(self) -> str:
        """Hash of every decision: the JSON (date and name left out) and the tensors. Part of a bundle's key."""
        content = self.spec.model_dump(mode="json", exclude=_NOT_DECIDED)
        if (
            not self.spec.rows.kept.of_adapter
        ):  # a field that checkpoints' specs do not need: their hashes are as before
            del content["rows"]["kept"]["of_adapter"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> Path:
        """Write `path` (.json) and its .safetensors beside it, each atomically, tensors first."""
        if self._blob:
            write_atomic(path.with_suffix(".safetensors"), self._blob)
        content = self.spec.model_dump(mode="json")
        if not self.spec.provenance.reference:  # as versions wrote it that did not know the field: the same bytes
            del content["provenance"]["reference"]
        text = json.dumps(content, indent=1, sort_keys=True)
        write_atomic(path, (text + "\n").encode())
        return path


def read_spec(path: Path) -> SpecFile:
    """Read and validate a spec. Raises SpecError naming the file and the field."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such spec; run 'personalq calibrate ID' first") from None
    except (ValueError, OSError) as error:
        raise SpecError(f"{path}: must be JSON, got {error}; write it again with 'personalq calibrate'") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise SpecError(f"{path}: format: must be {FORMAT!r}, got {found!r}; this is not a TAQ spec")
    try:
        spec = Spec.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SpecError(f"{path}: {field}: {first['msg']}, got {first.get('input')!r:.80}") from error
    return SpecFile(spec, _read_tensors(path, spec))


def _read_tensors(path: Path, spec: Spec) -> dict[str, npt.NDArray[Any]]:
    if not spec.tensors_sha256:
        return {}
    file = path.with_suffix(".safetensors")
    blob = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(blob).hexdigest() != spec.tensors_sha256:
        state = "another file" if blob else "no file"
        raise SpecError(f"{file}: must hold the tensors {path.name} was written with, got {state}; calibrate again")
    return dict(load(blob))


def check_tensors(spec: Spec, tensors: dict[str, npt.NDArray[Any]]) -> None:
    """Raise SpecError when a quantised layer lacks a scale, or a scale is not a positive finite number."""
    for name, layer in spec.layers.items():
        needed = [f"{name}.weight_scale"] if layer.weight != "float" else []
        needed += [f"{name}.input_scale"] if layer.activation != "float" else []
        needed += [f"{name}.weight_q"] if layer.rounding == "stored" else []
        needed += [f"{name}.input_balance"] if layer.balanced else []
        needed += [f"{name}.low_rank_down", f"{name}.low_rank_up"] if layer.low_rank else []
        if (layer.balanced or layer.low_rank or layer.group) and layer.rounding != "stored":
            raise SpecError(
                f"{name}: rounding must be 'stored' in a balanced, low-rank or blockwise layer, got 'nearest'; calibrate again"
            )
        _check_present(tensors, needed)
        if layer.group:
            _check_blocks(name, layer, tensors)
    _check_present(tensors, [f"{name}.tuned" for name in spec.tuned])
    _check_present(tensors, ["correction.gain", "correction.mean"] if spec.corrected else [])


def _check_blocks(name: str, layer: LayerSpec, tensors: dict[str, npt.NDArray[Any]]) -> None:
    """Blocks are for weight-only Linear layers, and every block of every output channel has its scale."""
    if layer.op != "linear" or layer.activation != "float":
        raise SpecError(
            f"{name}: group must be none unless the layer is a Linear with float activations, got {layer.group}; leave it out"
        )
    (n, k), found = tensors[f"{name}.weight_q"].shape, tensors[f"{name}.weight_scale"].shape
    if k % layer.group or found != (n, k // layer.group):
        raise SpecError(
            f"{name}.weight_scale: must be ({n}, {k} / {layer.group}), one scale per block, got {found}; calibrate again"
        )


def _check_present(tensors: dict[str, npt.NDArray[Any]], needed: list[str]) -> None:
    for key in needed:
        if key not in tensors:
            raise SpecError(f"{key}: must be in the spec's tensors, got nothing; calibrate again")
        if key.endswith(("_scale", "_balance")) and not (np.isfinite(tensors[key]).all() and (tensors[key] > 0).all()):
            worst = float(np.min(tensors[key]))
            raise SpecError(f"{key}: scale must be > 0 and finite, got {worst}; add prompts or exclude the layer")
        if not np.isfinite(tensors[key]).all():
            raise SpecError(f"{key}: must be finite, got NaN or Inf; calibrate again")


def diff_specs(a: Spec, b: Spec) -> list[str]:
    """Lines `field: a -> b` for every decision that differs."""
    left = _flat(a.model_dump(mode="json", exclude={"provenance"}))
    right = _flat(b.model_dump(mode="json", exclude={"provenance"}))
    keys = sorted(left.keys() | right.keys())
    return [f"{key}: {left.get(key)!r} -> {right.get(key)!r}" for key in keys if left.get(key) != right.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [_flat(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in value.items()]
        return {key: leaf for item in items for key, leaf in item.items()}
    return {prefix: value}
