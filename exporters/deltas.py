"""What a LoRA, Custom-Diffusion or Textual-Inversion file does to a base: one edit per parameter, from headers alone.

The names are those diffusers 0.42 and kohya-ss write. Nothing is read but headers and the small `.alpha` tensors until
an edit is applied. Formulas: LoRA (Hu et al. 2021) W' = W + alpha/r * up @ down; Custom Diffusion (Kumari et al. 2022)
replaces K and V of cross-attention; Textual Inversion (Gal et al. 2022) appends rows to the token embedding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from personalq.errors import RepositoryError

from .tensorfile import Array, TensorFile

Float = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

TOKEN_EMBEDDING = "embeddings.token_embedding.weight"

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
    ".alpha": "alpha",
}
# What old attention processors called the projections of a text encoder.
_OLD_TEXT = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}
_KOHYA = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder"}
_ANOTHER_BASE = "this delta was made for another base; add it with --base of the model it was trained on"


class Edit(Protocol):
    """What happens to one parameter of the base."""

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]: ...

    def apply(self, base: Array) -> Float: ...


@dataclass(frozen=True)
class LowRank:
    """W + scale * up @ down, in float32. Linear (out, in) and Conv2d (out, in, kh, kw); up (out, r[, 1, 1])."""

    file: TensorFile
    down: str
    up: str
    scale: float

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return base

    def apply(self, base: Array) -> Float:
        down, up = (self.file.read(name).astype(np.float32) for name in (self.down, self.up))
        product = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        return np.asarray(base, np.float32) + np.float32(self.scale) * product.reshape(base.shape)


@dataclass(frozen=True)
class Added:
    """b + scale * bias: the bias half of a LoRA trained with lora_bias."""

    file: TensorFile
    name: str
    scale: float

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return base

    def apply(self, base: Array) -> Float:
        return np.asarray(base, np.float32) + np.float32(self.scale) * self.file.read(self.name).astype(np.float32)


@dataclass(frozen=True)
class Replaced:
    """The file's tensor instead of the base's."""

    file: TensorFile
    name: str

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return self.file.shape(self.name)

    def apply(self, base: Array) -> Float:
        return self.file.read(self.name).astype(np.float32)


@dataclass(frozen=True)
class AppendedRows:
    """The base's first `keep` rows, then every row of the named tensors: (n, C) or (C,), in order."""

    keep: int
    parts: tuple[tuple[TensorFile, str], ...]

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return (self.keep + sum(row_count(file.shape(name)) for file, name in self.parts), base[1])

    def apply(self, base: Array) -> Float:
        rows = [file.read(name).astype(np.float32).reshape(-1, base.shape[1]) for file, name in self.parts]
        return np.concatenate([np.asarray(base[: self.keep], np.float32), *rows])


@dataclass
class Delta:
    """edits[component][parameter], and the tokens to add: (token, its pieces), in the order of their ids."""

    edits: dict[str, dict[str, Edit]] = field(default_factory=dict)
    added_tokens: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def put(self, component: str, parameter: str, edit: Edit) -> None:
        self.edits.setdefault(component, {})[parameter] = edit


def row_count(shape: tuple[int, ...]) -> int:
    """How many vectors an embedding tensor holds: (C,) is one, (n, C) is n."""
    return shape[0] if len(shape) > 1 else 1


def file_kind(file: TensorFile) -> str:
    """'lora', 'custom_diffusion' or 'textual_inversion', from the tensors' names."""
    names = file.names()
    if any("lora" in name or name.endswith(".alpha") for name in names):
        return "lora"
    if any("custom_diffusion" in name or ".attn2." in name for name in names):
        return "custom_diffusion"
    return "textual_inversion"


# --- LoRA


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
        raise _unmatched(file, unknown)
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
        raise RepositoryError(f"{where}: must fit the base's {list(base)}, got {got}; {_ANOTHER_BASE}")
    scale = _scale(file, module, halves, down[0], metadata)
    delta.put(module.component, parameter, LowRank(file, halves["down"], halves["up"], scale))
    if "bias" in halves:
        if shapes.get(f"{module.name}.bias") != file.shape(halves["bias"]):
            raise RepositoryError(
                f"{where}: LoRA bias must fit the base's bias, got {list(file.shape(halves['bias']))}; {_ANOTHER_BASE}"
            )
        delta.put(module.component, f"{module.name}.bias", Added(file, halves["bias"], scale))


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
    if any(key.endswith("use_dora") and value for key, value in metadata.items()):
        raise _dora(file)
    return metadata


def _dora(file: TensorFile) -> RepositoryError:
    return RepositoryError(
        f"{file.path.name}: must be a plain LoRA, got DoRA magnitudes; merge it into a full checkpoint and add that"
    )


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
    return table


# --- Custom Diffusion


def custom_diffusion_edits(file: TensorFile, shapes: Mapping[str, Shapes], delta: Delta) -> None:
    """Put the replaced projections into `delta`.

    Names: `...attn2.processor.to_k_custom_diffusion.weight` as diffusers writes, or plain `...attn2.to_k.weight`.
    """
    unet = shapes["unet"]
    unknown = []
    for key in file.names():
        name = key.removeprefix("unet.").replace(".processor.", ".").replace("_custom_diffusion", "")
        if name not in unet:
            unknown.append(key)
        elif file.shape(key) != unet[name]:
            got = list(file.shape(key))
            raise RepositoryError(
                f"{file.path.name}: {name}: must fit the base's {list(unet[name])}, got {got}; {_ANOTHER_BASE}"
            )
        else:
            delta.put("unet", name, Replaced(file, key))
    if unknown:
        raise _unmatched(file, unknown)


# --- Textual Inversion


def embedding_edits(
    files: Sequence[TensorFile], shapes: Mapping[str, Shapes], vocabulary: frozenset[str], delta: Delta
) -> None:
    """Append every file's embeddings to the token embedding, as diffusers' load_textual_inversion does, files in order.

    vocabulary: the base tokenizer's entries; the first new token gets the id len(vocabulary).
    """
    base = shapes["text_encoder"][TOKEN_EMBEDDING]
    keep = len(vocabulary) or base[0]
    parts = [(file, key) for file in files for key in file.names()]
    tokens: list[tuple[str, tuple[str, ...]]] = []
    for file, key in parts:
        shape = file.shape(key)
        if not 1 <= len(shape) <= 2 or shape[-1] != base[1] or row_count(shape) < 1:
            wanted = f"vectors of the base's width {base[1]}"
            raise RepositoryError(f"{file.path.name}: {key}: must be {wanted}, got {list(shape)}; {_ANOTHER_BASE}")
        token = _token_name(file.path, key)
        pieces = (token, *(f"{token}_{i}" for i in range(1, row_count(shape))))
        taken = [piece for piece in pieces if piece in vocabulary or any(piece in others for _, others in tokens)]
        if taken:
            raise RepositoryError(
                f"{file.path.name}: token must be new to the base's tokenizer, got {taken[0]!r}; rename it in the file"
            )
        tokens.append((token, pieces))
    if keep > base[0]:
        raise RepositoryError(
            f"tokenizer: must have at most the {base[0]} tokens of the text encoder, got {keep}; repair the base"
        )
    if parts:
        delta.put("text_encoder", TOKEN_EMBEDDING, AppendedRows(keep, tuple(parts)))
        delta.added_tokens += tuple(tokens)


def _token_name(path: Path, key: str) -> str:
    """A1111's safetensors call the tensor 'emb_params' and take the token from the file's name; all others name it."""
    if key in ("clip_l", "clip_g"):
        raise RepositoryError(
            f"{path.name}: must be an embedding for one text encoder, got SDXL's {key!r}; this is not supported yet"
        )
    return path.stem if key == "emb_params" else key


def _unmatched(file: TensorFile, keys: Sequence[str]) -> RepositoryError:
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in keys):
        return _dora(file)
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return RepositoryError(
        f"{file.path.name}: every tensor must match the base, got {len(keys)} that do not ({shown}); {_ANOTHER_BASE}"
    )
