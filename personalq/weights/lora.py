"""LoRA and DoRA files to edits: the spellings of diffusers 0.42, peft and kohya-ss, UNet and text encoders, Linear and Conv2d.

W' = W + alpha/r * up @ down (Hu et al. 2021); DoRA (Liu et al. 2024) then gives every output the length the file says.
Only headers and the small `.alpha` tensors are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..errors import RepositoryError
from .edits import ANOTHER_BASE, Added, Delta, Edit, LowRank, Scaled, Shapes, unmatched
from .original import UNET, places
from .tensorfile import TensorFile

# LoRA spellings, longest first: (ending of the key, which half it is). `X` is then the module's name.
_HALVES = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
}
# What old attention processors called the projections of a text encoder.
_OLD_TEXT = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}
_KOHYA = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder"}
_LORA = re.compile(r"(?:^|[._])lora[._]")


def is_lora(shapes: Shapes) -> bool:
    """Tell whether a file has a tensor that is spelled as part of a LoRA, known or not."""
    return any(_LORA.search(name) or name.endswith(tuple(_HALVES)) for name in shapes)


def foreign_lengths(shapes: Shapes) -> list[str]:
    """The lengths of a DoRA that peft did not write for a UNet: kohya's and LyCORIS', and those of a text encoder."""
    return [n for n in _lengths(shapes) if not n.endswith(".lora_magnitude_vector") or n.startswith("text_encoder")]


def _lengths(shapes: Shapes) -> list[str]:
    endings = tuple(ending for ending, half in _HALVES.items() if half in ("magnitude", "dora_scale"))
    return [name for name in shapes if name.endswith(endings)]


@dataclass(frozen=True)
class _Module:
    component: str
    name: str


def lora_edits(file: TensorFile, shapes: Mapping[str, Shapes], delta: Delta) -> None:
    """Put one edit per LoRA module into `delta`. shapes: component -> parameter -> shape of the base."""
    metadata = _adapter_metadata(file)
    kohya = _kohya_names(shapes) if any(name.startswith("lora_") for name in file.names()) else {}
    modules: dict[_Module, dict[str, str]] = {}
    unknown = []
    for key in file.names():
        module, half = _lora_module(key, shapes, kohya)
        if module is None:
            unknown.append(key)
        else:
            modules.setdefault(module, {})[half] = key
    if unknown:
        raise unmatched(file, unknown)
    for module, halves in modules.items():
        _put_module(file, module, halves, shapes[module.component], metadata, delta)


def _put_module(
    file: TensorFile, module: _Module, halves: dict[str, str], shapes: Shapes, metadata: dict[str, object], delta: Delta
) -> None:
    where = f"{file.path.name}: {module.component}.{module.name}"
    if not {"down", "up"} <= halves.keys():
        raise RepositoryError(
            f"{where}: must have both LoRA halves, got {', '.join(sorted(halves))}; copy the file again"
        )
    parameter = f"{module.name}.weight"
    down, up, base = file.shape(halves["down"]), file.shape(halves["up"]), shapes[parameter]
    is_matching = len(down) > 1 and len(up) > 1 and up[1] == down[0] and up[0] == base[0] and set(up[2:]) <= {1}
    if not is_matching or down[1] != base[1] or (down[2:] or (1, 1)) != (base[2:] or (1, 1)):
        got = f"up {list(up)} @ down {list(down)}"
        raise RepositoryError(f"{where}: must fit the base's {list(base)}, got {got}; {ANOTHER_BASE}")
    scale = _scale(file, module, halves, down[0], metadata)
    merged = LowRank(file, halves["down"], halves["up"], scale)
    delta.put(module.component, parameter, _scaled(where, file, halves, base, merged))
    if "bias" in halves:
        if shapes.get(f"{module.name}.bias") != file.shape(halves["bias"]):
            raise RepositoryError(
                f"{where}: LoRA bias must fit the base's bias, got {list(file.shape(halves['bias']))}; {ANOTHER_BASE}"
            )
        delta.put(module.component, f"{module.name}.bias", Added(file, halves["bias"], scale))


def _scaled(where: str, file: TensorFile, halves: dict[str, str], base: tuple[int, ...], merged: LowRank) -> Edit:
    """The merged weight with its lengths, for a DoRA; without them as it is.

    peft has one length an output. `dora_scale` (LyCORIS) has (out, 1, ...), or (1, in, ...) when it was trained per input.
    """
    name = halves.get("magnitude") or halves.get("dora_scale")
    if name is None:
        return merged
    shape = file.shape(name)
    per_input = "dora_scale" in halves and shape[:1] == (1,) and shape[1:2] == base[1:2] and base[0] != 1
    axis = 1 if per_input else 0
    if prod(shape) != base[axis]:
        raise RepositoryError(
            f"{where}: DoRA lengths must fit the base's {list(base)}, got {list(shape)}; {ANOTHER_BASE}"
        )
    return Scaled(merged, name, axis)


def _scale(file: TensorFile, module: _Module, halves: dict[str, str], rank: int, metadata: dict[str, object]) -> float:
    """alpha / r; alpha from the module's own tensor, else diffusers' adapter metadata, else r as diffusers does."""
    if "alpha" in halves:
        return float(file.read(halves["alpha"]).reshape(-1)[0]) / rank
    prefix = f"{module.component}."
    config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "lora_alpha" not in config:
        return 1.0
    alpha = _by_pattern(file, config.get("alpha_pattern"), module.name, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(file: TensorFile, patterns: object, name: str, default: object) -> float:
    """peft's alpha_pattern: module name (or its end) -> value. Plain names only: a regex could run forever."""
    chosen = default
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = str(pattern).removeprefix("^").replace("\\.", ".")
        if re.search(r"[^\w.]", plain):
            raise RepositoryError(
                f"{file.path.name}: alpha_pattern must name modules plainly, got {pattern!r}; write it out"
            )
        plain = plain.removeprefix("text_model.")
        if name == plain or (name.endswith(f".{plain}") and not str(pattern).startswith("^")):
            chosen = value
            break
    if not isinstance(chosen, int | float):
        raise RepositoryError(
            f"{file.path.name}: {name}: lora_alpha must be a number, got {chosen!r}; save the LoRA again"
        )
    return float(chosen)


def _adapter_metadata(file: TensorFile) -> dict[str, object]:
    text = file.metadata.get("lora_adapter_metadata")
    try:
        metadata = json.loads(text) if text else {}
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise RepositoryError(
            f"{file.path.name}: lora_adapter_metadata must be a JSON object, got {text!r:.60}; save it again"
        )
    is_dora = any(key.endswith("use_dora") and value for key, value in metadata.items())
    if is_dora and not _lengths(file.shapes):
        raise RepositoryError(f"{file.path.name}: a DoRA must hold its lengths, got none; save the LoRA again")
    return metadata


def _lora_module(key: str, shapes: Mapping[str, Shapes], kohya: dict[str, _Module]) -> tuple[_Module | None, str]:
    """The base's module a key belongs to (None: no such module), and which half of the LoRA it is."""
    ending = next((ending for ending in _HALVES if key.endswith(ending)), None)
    if ending is None:
        return None, ""
    stem = key.removesuffix(ending)
    if stem in kohya:
        return kohya[stem], _HALVES[ending]
    component = next((name for name in shapes if stem.startswith(f"{name}.")), "unet")
    name = stem.removeprefix(f"{component}.").replace(".processor.", ".")
    for candidate in (name, *_older_spellings(component, name)):
        if f"{candidate}.weight" in shapes.get(component, {}):
            return _Module(component, candidate), _HALVES[ending]
    return None, ""


def _older_spellings(component: str, name: str) -> tuple[str, ...]:
    if component == "unet":
        return (f"{name}.0",) if name.endswith(".to_out") else ()
    plain = name.removeprefix("text_model.")
    old = next((plain.removesuffix(end) + new for end, new in _OLD_TEXT.items() if plain.endswith(end)), plain)
    return plain, old, f"text_model.{plain}", f"text_model.{old}"


def _kohya_names(shapes: Mapping[str, Shapes]) -> dict[str, _Module]:
    """kohya-ss writes a module's dots as underscores; the way back is a table made from the base's own names."""
    table = {}
    for prefix, component in _KOHYA.items():
        for parameter in shapes.get(component, {}):
            module = _Module(component, parameter.removesuffix(".weight"))
            flat = module.name.replace(".", "_")
            table[prefix + flat] = module
            if component != "unet":
                table[f"{prefix}text_model_{flat}"] = module
    return table | _original_names(shapes.get("unet", {}))


def _original_names(unet: Shapes) -> dict[str, _Module]:
    """SDXL's kohya files name UNet modules as the original layout does: lora_unet_input_blocks_4_1_..."""
    try:
        found = places("unet", {name: shape for name, shape in unet.items() if name.endswith(".weight")}, frozenset())
    except RepositoryError:
        return {}  # a UNet that the original layout has no names for
    ends = {name: place.name.removeprefix(UNET).removesuffix(".weight") for name, place in found.items()}
    return {
        f"lora_unet_{end.replace('.', '_')}": _Module("unet", name.removesuffix(".weight"))
        for name, end in ends.items()
    }
