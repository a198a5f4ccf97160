"""The spellings of LoRA and LyCORIS files: which module of the base a tensor changes, and which part of the change it is.

Read: diffusers (attention processors too), peft, kohya-ss, LyCORIS, OneTrainer, ComfyUI, AI Toolkit. A name is compared
with dots as underscores, so one table made of the base's own parameter names has every spelling of a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import RepositoryError
from ..marks import is_mark
from ..models import SECOND_ENCODER, TOKEN_EMBEDDING
from ..one_file.original import UNET, places
from ..tensorfile import TensorFile
from .edits import Shapes, unmatched

BUNDLED = "bundle_emb."  # what embeddings inside a LoRA file are called: bundle_emb.<token>.<tensor>

_STEMS = (".lora_linear_layer", ".lora", "_lora")
_HALVES = {
    **{f"{stem}.{side}.weight": side for stem in _STEMS for side in ("down", "mid", "up")},
    **{f".lora_{side}.weight": side for side in ("down", "mid", "up")},
    **{f"{stem}.alpha": "alpha" for stem in _STEMS},
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
}
_LYCORIS = {
    **{f".hada_w{i}_{side}": f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"},
    **{f".hada_t{i}": f"hada_t{i}" for i in (1, 2)},
    **{f".lokr_w{i}{end}": f"lokr_w{i}{end}" for i in (1, 2) for end in ("", "_a", "_b")},
    **{f".{letter}{i}.weight": f"{letter}{i}" for letter in "ab" for i in (1, 2)},
    **{
        f".{part}": part
        for part in ("lokr_t2", "diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "oft_diag", "on_input")
    },
}
# Endings that other files have too.
_SHARED = {".weight": "weight", ".scalar": "scalar", ".rescale": "rescale"}
_PARTS = _HALVES | _LYCORIS | _SHARED
_LENGTHS = tuple(ending for ending, part in _HALVES.items() if part in ("magnitude", "dora_scale"))
_OWN = tuple(_HALVES | _LYCORIS)
_LORA = re.compile(r"(?:^|[._])lora[._]")
# peft writes its adapter's name into the key when it is asked for the whole state.
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+)\.(?!weight$|bias$)([^.]+)(?=$|\.\w+$)")

# What may stand before a module's name, dots as underscores.
_PEFT = "base_model_model_"
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("", "unet_", "lora_unet_", "lycoris_", _PEFT, f"unet_{_PEFT}"),
    "text_encoder": (
        *("text_encoder_", "lora_te_", "lora_te1_", f"text_encoder_{_PEFT}"),
        *("clip_l_", "clip_l_transformer_", "text_encoders_clip_l_transformer_"),
    ),
    SECOND_ENCODER: (
        *("text_encoder_2_", "lora_te2_", f"text_encoder_2_{_PEFT}"),
        *("clip_g_", "clip_g_transformer_", "text_encoders_clip_g_transformer_"),
    ),
}
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_COMPONENTS = tuple(f"{component}." for component in _PREFIXES)
# With one text encoder no name of its own is needed; SD2's is ComfyUI's clip_h.
_ONLY_ENCODER = ("", _PEFT, "clip_h_", "clip_h_transformer_", "text_encoders_clip_h_transformer_")
_ORIGINAL = ("", "unet_", "lora_unet_", "diffusion_model_", "model_diffusion_model_", _PEFT)
# What old attention processors called the projections of a text encoder.
_OLD_TEXT = {"_q_proj": "_to_q", "_k_proj": "_to_k", "_v_proj": "_to_v", "_out_proj": "_to_out"}
# What cannot be part of a LoRA for Stable Diffusion 1, 2 or XL, whatever the base.
_ELSEWHERE = (
    (re.compile(r"^(?:lora_)?vae[._]|^first_stage_model\."), "the VAE"),
    (re.compile(r"^(?:lora_)?prior[._]"), "a prior (Stable Cascade, Würstchen)"),
    (re.compile(r"^lora_te3_|^text_encoder_3\.|t5xxl"), "a third text encoder (Stable Diffusion 3, Flux)"),
    (
        re.compile(r"^(?:lora_)?transformer[._]|(?:double|single|joint)_(?:transformer_)?blocks[._]"),
        "a diffusion transformer (Stable Diffusion 3, Flux and others)",
    ),
)
_NOT_READ = {
    ".oft_R": "OFT as peft writes it",
    ".boft_R": "BOFT as peft writes it",
    ".boft_s": "BOFT as peft writes it",
    ".ia3_l": "(IA)^3 as peft writes it",
    ".lambda_layer": "T-LoRA",
    ".vera_lambda": "VeRA",
    ".lora_embedding_": "a LoRA of an embedding table",
    ".reshape_weight": "a LoRA that changes shapes",
}


@dataclass(frozen=True)
class Module:
    """A module of the base: its component, and its name without '.weight'."""

    component: str
    name: str


def is_lora(shapes: Shapes) -> bool:
    """Tell whether a file has a tensor that is spelled as part of a LoRA or one of LyCORIS' algorithms, known or not."""
    return any(_LORA.search(n) or n.endswith(_OWN) or _ADAPTER.search(n) or n.startswith(BUNDLED) for n in shapes)


def lengths(names: Sequence[str]) -> list[str]:
    """The tensors that are a DoRA's lengths."""
    return [name for name in names if _ADAPTER.sub(r".\1", name).endswith(_LENGTHS)]


def unread_names(shapes: Shapes) -> list[str]:
    """What diffusers 0.42.1 passes over without a word: names without a component, and alphas of attention processors.

    Empty for files that it converts (kohya-ss), and for those that it refuses.
    """
    if all(name.startswith(_KOHYA) for name in shapes) or not all("lora" in name for name in shapes):
        return []
    return [name for name in shapes if not name.startswith(_COMPONENTS) or name.endswith("_lora.alpha")]


def parts_by_module(file: TensorFile, shapes: Mapping[str, Shapes], home: str = "") -> dict[Module, dict[str, str]]:
    """What the file has for each module: part -> the tensor's name. home: the component that names without one belong to.

    Raises RepositoryError for names of nothing in the base, of two adapters, and for one part under two names.
    """
    table = spellings(shapes)
    modules: dict[Module, dict[str, str]] = {}
    unknown, adapters = [], set()
    for key in (name for name in file.names() if not name.startswith(BUNDLED) and not is_mark(name)):
        plain = _ADAPTER.sub(r".\1", key)
        adapters |= {match[2] for match in [_ADAPTER.search(key)] if match}
        ending = _ending(plain)
        stem = plain.removesuffix(ending)
        module = table.get(_flat(f"{home}.{stem}" if home else stem)) if ending else None
        if module is None:
            unknown.append(key)
            continue
        first = modules.setdefault(module, {}).setdefault(_PARTS[ending], key)
        if first != key and len(adapters) < 2:
            raise _twice(file, module, first, key)
    if len(adapters) > 1:
        raise RepositoryError(
            f"{file.path.name}: must hold one adapter, got {', '.join(sorted(adapters)[:3])}; save each in a file of its own"
        )
    if unknown:
        raise _refusal(file, unknown)
    return modules


def _ending(key: str) -> str:
    """The longest ending that names a part; '' for none."""
    return max((ending for ending in _PARTS if key.endswith(ending)), key=len, default="")


def _twice(file: TensorFile, module: Module, first: str, second: str) -> RepositoryError:
    where = f"{module.component}.{module.name}"
    return RepositoryError(f"{file.path.name}: {where}: must be there once, got {first} and {second}; save it again")


def _refusal(file: TensorFile, unknown: Sequence[str]) -> RepositoryError:
    for key in unknown:
        if method := next((method for mark, method in _NOT_READ.items() if mark in key), None):
            return RepositoryError(
                f"{file.path.name}: {key}: must be part of a LoRA, DoRA, LoCon, LoHa, LoKr, GLoRA, (IA)^3, OFT or full "
                f"difference, got {method}; merge it into a whole model and add that"
            )
        if place := next((place for pattern, place in _ELSEWHERE if pattern.search(key)), None):
            return RepositoryError(
                f"{file.path.name}: {key}: must change the UNet or a text encoder of Stable Diffusion 1, 2 or XL, "
                f"got a part of {place}; only these can be added"
            )
    return unmatched(file, unknown)


def _flat(name: str) -> str:
    return name.replace(".", "_").replace("_processor_", "_")


def spellings(shapes: Mapping[str, Shapes]) -> dict[str, Module]:
    """Every spelling of every module of the UNet and the text encoders, dots as underscores."""
    table: dict[str, Module] = {}
    for component, prefixes in _PREFIXES.items():
        if component == "text_encoder" and SECOND_ENCODER not in shapes:
            prefixes = (*prefixes, *_ONLY_ENCODER)
        for module in _modules(component, shapes.get(component, {})):
            for name in _names(module):
                table |= {prefix + name: module for prefix in prefixes}
    for name, module in _original_names(shapes.get("unet", {})):
        table |= {prefix + name: module for prefix in _ORIGINAL}
    return table


def _modules(component: str, shapes: Shapes) -> Iterator[Module]:
    """Everything with a weight but the token table, which learned embeddings lengthen."""
    for parameter in shapes:
        if parameter.endswith(".weight") and not parameter.endswith(TOKEN_EMBEDDING):
            yield Module(component, parameter.removesuffix(".weight"))


def _names(module: Module) -> Iterator[str]:
    flat = _flat(module.name)
    if module.component == "unet":
        yield flat
        if flat.endswith("_to_out_0"):
            yield flat.removesuffix("_0")  # an attention processor's
        return
    bare = flat.removeprefix("text_model_")
    old = next((bare.removesuffix(new) + old for new, old in _OLD_TEXT.items() if bare.endswith(new)), bare)
    yield from (f"{prefix}{name}" for prefix in ("", "text_model_") for name in {bare, old})


def _original_names(unet: Shapes) -> Iterator[tuple[str, Module]]:
    """SDXL's kohya files and ComfyUI's name UNet modules as the original layout does: input_blocks_4_1_..."""
    try:
        found = places("unet", {name: shape for name, shape in unet.items() if name.endswith(".weight")}, frozenset())
    except RepositoryError:
        return  # a UNet that the original layout has no names for
    for name, place in found.items():
        yield _flat(place.name.removeprefix(UNET).removesuffix(".weight")), Module("unet", name.removesuffix(".weight"))
