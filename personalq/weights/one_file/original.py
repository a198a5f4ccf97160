"""One-file checkpoints in the original Stable Diffusion layout: where each parameter lies. Renames, no arithmetic.

The base's own parameter names say what is wanted; each has one place in the file (a few are a third of a fused
projection, one is stored transposed).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import RepositoryError
from ..marks import KEPT, is_mark
from ..models import SECOND_ENCODER, STEMS, TOKEN_EMBEDDING, Model, Stored
from ..tensorfile import TensorFile

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# Where a text encoder may lie, and whether it is in OpenCLIP's own form.
ENCODERS = {
    "text_encoder": (
        ("cond_stage_model.transformer.", False),
        ("conditioner.embedders.0.transformer.", False),
        ("cond_stage_model.model.", True),
    ),
    SECOND_ENCODER: (("conditioner.embedders.1.model.", True),),
}

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_STARTS = {original: name for name, original in _UNET_ENDS.items()}
_RESNET_BACK = {original: name for name, original in _RESNET.items()}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION_BACK = {original: name for name, original in _VAE_ATTENTION.items()}
_OPEN_CLIP = (
    (r"embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"final_layer_norm\.", "ln_final."),
)
_FUSED = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class Place:
    """Where one parameter lies: the tensor's name, which third of its rows (None = all), and whether it is turned."""

    name: str
    third: int | None = None
    is_transposed: bool = False


def is_original(names: Iterable[str]) -> bool:
    """Tell whether tensor names are those of a one-file Stable Diffusion checkpoint."""
    return any(name.startswith(UNET) for name in names)


def unet_place(parameter: str, n_resnets: int, attends: Mapping[int, bool]) -> str:
    """diffusers' UNet parameter -> its name in the original layout, without the prefix.

    n_resnets: resnets of a down block. attends: whether up block i has attention (its upsampler then comes third).
    """
    module, _, leaf = parameter.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    side, index, kind, number, rest = _block(parameter)
    inner = _inner(kind, rest)
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(index + 1) * (n_resnets + 1)}.0.op.{leaf}"
    if kind == "upsamplers":
        last = index * (n_resnets + 1) + n_resnets
        return f"output_blocks.{last}.{2 if attends[index] else 1}.conv.{leaf}"
    column = 1 if kind == "attentions" else 0
    row = index * (n_resnets + 1) + number
    return (
        f"input_blocks.{row + 1}.{column}.{inner}" if side == "down_blocks" else f"output_blocks.{row}.{column}.{inner}"
    )


def unet_parameter(name: str, n_resnets: int) -> str:
    """A UNet's tensor in the original layout, without the prefix -> diffusers' parameter; '' for one that no UNet has."""
    module, _, leaf = name.rpartition(".")
    if module in _UNET_STARTS:
        return f"{_UNET_STARTS[module]}.{leaf}"
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d)\.)?(.+)", name)
    if match is None:
        return ""
    side, row, column, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        kind, number = ("attentions", 0) if row == 1 else ("resnets", row // 2)
        return f"mid_block.{kind}.{number}.{_outer(kind, rest)}"
    down = side == "input_blocks"
    block, number = divmod(row - down, n_resnets + 1)
    place = f"{'down' if down else 'up'}_blocks.{block}"
    if rest.startswith("op."):
        return f"{place}.downsamplers.0.conv.{leaf}"
    if rest.startswith("conv.") and not down:
        return f"{place}.upsamplers.0.conv.{leaf}"
    kind = "resnets" if column == "0" else "attentions"
    return f"{place}.{kind}.{number}.{_outer(kind, rest)}"


def _outer(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    module, _, leaf = rest.rpartition(".")
    return f"{_RESNET_BACK.get(module, module)}.{leaf}"


def _block(parameter: str) -> tuple[str, int, str, int, str]:
    """'down_blocks.1.resnets.0.conv1.weight' -> ('down_blocks', 1, 'resnets', 0, 'conv1.weight'); mid_block has no index."""
    match = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", parameter)
    if match is None:
        raise RepositoryError(f"{parameter}: must be a parameter of Stable Diffusion's UNet, got another; use its base")
    side, index, kind, number, rest = match.groups()
    return side, int(index or 0), kind, int(number), rest


def _inner(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    module, _, leaf = rest.rpartition(".")
    return f"{_RESNET.get(module, module)}.{leaf}"


def vae_place(parameter: str, n_blocks: int) -> str:
    """diffusers' VAE parameter -> its name in the original layout, without the prefix. n_blocks: of the decoder."""
    match = re.fullmatch(r"(encoder|decoder)\.(.+)\.(weight|bias)", parameter)
    if match is None:
        return parameter  # quant_conv, post_quant_conv
    half, module, leaf = match.groups()
    module = module.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    module = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", module)
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", module):
        module = f"mid.attn_1.{_VAE_ATTENTION[found[1]]}"
    module = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", module)
    module = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", module)
    up = re.compile(r"up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)")
    module = up.sub(lambda m: f"up.{n_blocks - 1 - int(m[1])}." + (f"block.{m[3]}" if m[3] else "upsample"), module)
    return f"{half}.{module}.{leaf}"


def vae_parameter(name: str, n_blocks: int) -> str:
    """A VAE's tensor in the original layout, without the prefix -> diffusers' parameter; as it is when no rule fits."""
    attention = re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(weight|bias)", name)
    if attention is not None:
        half, part, leaf = attention.groups()
        return f"{half}.mid_block.attentions.0.{_VAE_ATTENTION_BACK.get(part, part)}.{leaf}"
    name = name.replace("nin_shortcut", "conv_shortcut").replace(".norm_out.", ".conv_norm_out.")
    name = re.sub(r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}", name)
    name = re.sub(r"\.down\.(\d)\.block\.(\d)", r".down_blocks.\1.resnets.\2", name)
    name = re.sub(r"\.down\.(\d)\.downsample", r".down_blocks.\1.downsamplers.0", name)
    up = re.compile(r"\.up\.(\d)\.(block\.(\d)|upsample)")
    return up.sub(
        lambda m: f".up_blocks.{n_blocks - 1 - int(m[1])}." + (f"resnets.{m[3]}" if m[3] else "upsamplers.0"), name
    )


def text_place(parameter: str, *, is_open_clip: bool) -> Place:
    """transformers' text-encoder parameter -> where it lies, without the prefix."""
    plain = parameter.removeprefix("text_model.")
    if not is_open_clip:
        return Place(f"text_model.{plain}")
    if plain == "text_projection.weight":
        return Place("text_projection", is_transposed=True)
    if fused := _FUSED.fullmatch(plain):
        layer, which, leaf = fused.groups()
        return Place(f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", third="qkv".index(which))
    for pattern, name in _OPEN_CLIP:
        if re.match(pattern, plain):
            return Place(re.sub(f"^{pattern}", name, plain))
    raise RepositoryError(f"{parameter}: must be a parameter of a CLIP text encoder, got another; use its base")


def places(component: str, wanted: Mapping[str, tuple[int, ...]], names: frozenset[str]) -> dict[str, Place]:
    """Every parameter of one component of the base -> where the one-file checkpoint `names` has it."""
    if component == "unet":
        n_resnets = sum(1 for n in wanted if re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", n))
        blocks = {int(m[1]) for n in wanted if (m := re.match(r"up_blocks\.(\d+)\.", n))}
        attends = {i: any(n.startswith(f"up_blocks.{i}.attentions") for n in wanted) for i in blocks}
        return {name: Place(UNET + unet_place(name, n_resnets, attends)) for name in wanted}
    if component == "vae":
        n_blocks = 1 + max(int(m[1]) for n in wanted if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", n)))
        return {name: Place(VAE + vae_place(name, n_blocks)) for name in wanted}
    for prefix, is_open_clip in ENCODERS[component]:
        if any(name.startswith(prefix) for name in names):
            found = {name: text_place(name, is_open_clip=is_open_clip) for name in wanted}
            return {n: Place(prefix + p.name, p.third, p.is_transposed) for n, p in found.items()}
    return {}


# What lies in such files beside parameters: buffers, training's state, marks. None of it changes a picture.
_BESIDE = re.compile(
    r"betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights|global_step|scale_factor"
    r"|denoiser\.\w+|(?:.*\.)?(?:position_ids|attn_mask|logit_scale)|cond_stage_model\.model\.text_projection"
    r"|cond_stage_model\.transformer\.text_projection\.weight|(?:first_stage_model\.)?loss\..*"
)
_AVERAGED = re.compile(r"model_ema\.|first_stage_model\.model_ema\.")


def read_original(file: TensorFile, base: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Model]:
    """The models of a one-file checkpoint, by component; one that the file lacks is left out.

    base: component -> parameter -> shape, of the base it is a fine-tune of. Raises RepositoryError when a tensor is missing,
    has another shape than the base's, or is one that nothing would use.
    """
    models = {}
    for component, wanted in base.items():
        found = places(component, wanted, frozenset(file.entries))
        if any(place.name in file.entries for place in found.values()):
            models[component] = Model(
                {name: _stored(file, component, name, wanted[name], place) for name, place in found.items()}
            )
    if unused := unused_tensors(file, models):
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        raise RepositoryError(
            f"{file.path.name}: every tensor must be used, got {len(unused)} that no model of the base has ({shown}); "
            "name its own base with --base"
        )
    return models


def unused_tensors(file: TensorFile, models: Mapping[str, Model]) -> list[str]:
    """The tensors that are no parameter of these models, and nothing known that lies beside them."""
    used = {stored.name for model in models.values() for stored in model.stored.values()}
    rest = [name for name in sorted(file.entries.keys() - used) if not is_mark(name) and not _AVERAGED.match(name)]
    # OpenCLIP's last layer is not used: SD 2.x was trained on what the one before it gives
    last = _last_layer(file, ENCODERS["text_encoder"][2][0])
    return [name for name in rest if not _BESIDE.fullmatch(name) and not (last and name.startswith(last))]


def averaged_tensors(names: Iterable[str]) -> int:
    """How many tensors are training's moving average of the weights, which are left out."""
    return sum(1 for name in names if _AVERAGED.match(name))


def _last_layer(file: TensorFile, prefix: str) -> str:
    layer = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    layers = [int(match[1]) for name in file.entries if (match := layer.match(name))]
    return f"{prefix}transformer.resblocks.{max(layers)}." if layers else ""


def _stored(file: TensorFile, component: str, name: str, shape: tuple[int, ...], place: Place) -> Stored:
    stored_as = place.name
    if stored_as not in file.shapes:  # some tools write CLIP without this level
        stored_as = stored_as.replace(".transformer.text_model.", ".transformer.")
    found = file.shapes.get(stored_as)
    if found is None:
        raise RepositoryError(
            f"{file.path.name}: must hold {place.name} for {component}.{name}, got none; name its own base with --base"
        )
    rows = found if place.third is None else (found[0] // 3, *found[1:])
    rows = rows[::-1] if place.is_transposed else rows
    is_pointwise = component == "vae" and len(rows) == 4 and len(shape) == 2 and rows[2:] == (1, 1)
    squeezed = rows[:2] if is_pointwise else rows  # the VAE's attention was made of 1x1 convolutions
    longer = name.endswith(TOKEN_EMBEDDING) and squeezed[1:] == shape[1:]  # tokens were added to it
    if squeezed != shape and not longer:
        raise RepositoryError(
            f"{file.path.name}: {place.name} must fit the base's {list(shape)}, got {list(found)}; "
            "name its own base with --base"
        )
    return Stored(file, stored_as, squeezed, place.third, place.is_transposed)


def unpack(models: Mapping[str, Model], folder: Path) -> list[str]:
    """Write models under `folder` as diffusers would, tensor by tensor in the dtype they have; return the files' names.

    What the file says of itself, in its header and by its marks, stays with the UNet.
    """
    written = []
    for component, model in models.items():
        target = folder / component / f"{STEMS.get(component, 'model')}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(model, target)
        written.append(f"{component}/{target.name}")
    return written


def _write(model: Model, target: Path) -> None:
    header: dict[str, object] = {}
    place, source = 0, next(iter(model.stored.values())).file
    marks = ",".join(filter(is_mark, source.entries))
    header["__metadata__"] = {**source.metadata, "format": "pt", **({KEPT: marks} if marks else {})}
    for name, stored in sorted(model.stored.items()):
        size = stored.n_bytes()
        header[name] = {
            "dtype": stored.file.entries[stored.name].dtype,
            "shape": list(stored.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, stored in sorted(model.stored.items()):
            out.write(np.ascontiguousarray(stored.bits()).data)
