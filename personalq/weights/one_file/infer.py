"""What a one-file checkpoint is: the configs of its models and their parameters, from its tensors' names and shapes alone.

Shapes do not say how many heads an attention or how many groups a norm has: those are what every Stable Diffusion of the
family has. A file whose widths no such model could have is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import RepositoryError
from ..deltas.edits import Shapes
from ..models import SECOND_ENCODER, TOKEN_EMBEDDING
from .original import ENCODERS, UNET, VAE, unet_parameter, vae_parameter

Config = dict[str, Any]
GROUPS = 32  # of every norm of Stable Diffusion
HEAD = 64  # width of an attention head, but for SD 1.x, whose UNet has HEADS of them at every width
HEADS = 8
# A text model's names: the token table, where the layers are, the first product of a layer's MLP.
_CLIP = (TOKEN_EMBEDDING, "encoder.layers", "mlp.fc1.weight")
_OPEN_CLIP = ("token_embedding.weight", "transformer.resblocks", "mlp.c_fc.weight")


def family_of(shapes: Shapes) -> str:
    """'sd1', 'sd2' or 'sdxl'. Raises RepositoryError for anything else, naming the tensor that tells."""
    context = next((s[1] for n, s in shapes.items() if n.startswith(UNET) and n.endswith("attn2.to_k.weight")), 0)
    if not context:
        raise RepositoryError(
            f"{UNET}*: must have cross-attention (attn2.to_k), got none; this is no Stable Diffusion UNet"
        )
    if f"{UNET}label_emb.0.0.weight" in shapes:
        return "sdxl"
    is_linear = any(len(s) == 2 for n, s in shapes.items() if n.startswith(UNET) and n.endswith("proj_in.weight"))
    return "sd2" if is_linear else "sd1"


def infer_configs(shapes: Shapes) -> dict[str, Config]:
    """component -> config.json of the models in a one-file checkpoint. Raises RepositoryError for a model it lacks."""
    family = family_of(shapes)
    configs = {"unet": _unet(_under(shapes, UNET), family), "vae": _vae(_under(shapes, VAE))}
    for component in ("text_encoder", *((SECOND_ENCODER,) if family == "sdxl" else ())):
        configs[component] = _text(component, shapes)
    if family == "sdxl":
        pooled, told = configs[SECOND_ENCODER]["projection_dim"], shapes[f"{UNET}label_emb.0.0.weight"][1]
        configs["unet"] |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (told - pooled) // 6,
            "projection_class_embeddings_input_dim": told,
        }
        configs["vae"] |= {"scaling_factor": 0.13025, "force_upcast": True}
    return configs


def infer_shapes(shapes: Shapes, configs: Mapping[str, Config]) -> dict[str, dict[str, tuple[int, ...]]]:
    """component -> diffusers' parameter -> shape: what the models of these configs take from the file."""
    n_resnets = configs["unet"]["layers_per_block"]
    n_blocks = len(configs["vae"]["block_out_channels"])
    found: dict[str, dict[str, tuple[int, ...]]] = {
        "unet": {unet_parameter(name, n_resnets): shape for name, shape in _under(shapes, UNET).items()},
        "vae": {},
    }
    for name, shape in _under(shapes, VAE).items():
        parameter = vae_parameter(name, n_blocks)
        is_pointwise = ".attentions.0.to_" in parameter and len(shape) == 4
        found["vae"][parameter] = shape[:2] if is_pointwise else shape
    for component in configs.keys() - found.keys():
        found[component] = _text_shapes(component, shapes, configs[component])
    return found


def _under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _need(shapes: Shapes, name: str, prefix: str) -> tuple[int, ...]:
    if name not in shapes:
        raise RepositoryError(
            f"{prefix}{name}: must be in a whole one-file checkpoint, got no such tensor; "
            "name the base that has this model with --base, or add the whole file"
        )
    return shapes[name]


def _unet(shapes: Shapes, family: str) -> Config:
    """The U of a Stable Diffusion: widths, depth and attention of each level, from the blocks of its way down."""
    conv_in = _need(shapes, "input_blocks.0.0.weight", UNET)
    widths: list[int] = []
    depths: list[int] = []
    n_resnets, row, is_new = 0, 1, True
    while any(name.startswith(f"input_blocks.{row}.") for name in shapes):
        if f"input_blocks.{row}.0.op.weight" in shapes:
            is_new = True
        else:
            if is_new:
                widths.append(_need(shapes, f"input_blocks.{row}.0.in_layers.2.weight", UNET)[0])
                depths.append(_depth(shapes, f"input_blocks.{row}.1."))
            n_resnets += len(widths) == 1
            is_new = False
        row += 1
    _check_groups([conv_in[0], *widths], UNET)
    blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    layers = [depth or 1 for depth in depths]
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    heads: int | list[int] = HEADS if family == "sd1" else [max(1, width // HEAD) for width in widths]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": conv_in[1],
        "out_channels": _need(shapes, "out.2.weight", UNET)[0],
        "block_out_channels": widths,
        "layers_per_block": n_resnets,
        "down_block_types": blocks,
        "up_block_types": [block.replace("Down", "Up") for block in reversed(blocks)],
        "transformer_layers_per_block": 1 if set(layers) == {1} else layers,
        "cross_attention_dim": context,
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "use_linear_projection": family != "sd1",
        "sample_size": 128 if family == "sdxl" else 64,
    }


def _depth(shapes: Shapes, prefix: str) -> int:
    """How many transformer blocks an attention has; 0 where there is none."""
    block = re.compile(re.escape(prefix) + r"transformer_blocks\.(\d+)\.")
    return len({match[1] for name in shapes if (match := block.match(name))})


def _vae(shapes: Shapes) -> Config:
    _need(shapes, "decoder.conv_in.weight", VAE)
    levels = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.down\.(\d+)\.", name))}
    widths = [_need(shapes, f"encoder.down.{i}.block.0.conv1.weight", VAE)[0] for i in sorted(levels)]
    resnets = {match[1] for name in shapes if (match := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))}
    _check_groups(widths, VAE)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _need(shapes, "encoder.conv_in.weight", VAE)[1],
        "out_channels": _need(shapes, "decoder.conv_out.weight", VAE)[0],
        "latent_channels": _need(shapes, "decoder.conv_in.weight", VAE)[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": len(resnets),
        "norm_num_groups": GROUPS,
        "scaling_factor": 0.18215,
    }


def _check_groups(widths: list[int], prefix: str) -> None:
    odd = next((width for width in widths if width % GROUPS), None)
    if odd is not None:
        raise RepositoryError(
            f"{prefix}*: widths must be multiples of {GROUPS}, as every Stable Diffusion has, got {odd}; "
            "add the model as a diffusers folder, whose configs say what shapes do not"
        )


def _text(component: str, shapes: Shapes) -> Config:
    """CLIP's text model; OpenCLIP's, of SD 2.x, is used without its last layer, as the model was trained."""
    prefix, is_open_clip = _encoder_prefix(component, shapes)
    inside = {name.removeprefix("text_model."): shape for name, shape in _under(shapes, prefix).items()}
    table, layers, inner = _OPEN_CLIP if is_open_clip else _CLIP
    n_tokens, width = _need(inside, table, prefix)
    n_layers = len({match[1] for name in inside if (match := re.match(rf"{re.escape(layers)}\.(\d+)\.", name))})
    is_second = component == SECOND_ENCODER
    config: Config = {
        "architectures": ["CLIPTextModelWithProjection" if is_second else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": n_tokens,
        "hidden_size": width,
        "intermediate_size": _need(inside, f"{layers}.0.{inner}", prefix)[0],
        "num_attention_heads": max(1, width // HEAD),
        "num_hidden_layers": n_layers - (is_open_clip and not is_second),
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",
        "max_position_embeddings": 77,
        "projection_dim": 512 if is_open_clip else width,
    }
    if is_second:
        config |= {"projection_dim": _need(inside, "text_projection", prefix)[1], "eos_token_id": 2}
    return config


def _encoder_prefix(component: str, shapes: Shapes) -> tuple[str, bool]:
    for prefix, is_open_clip in ENCODERS[component]:
        if any(name.startswith(prefix) for name in shapes):
            return prefix, is_open_clip
    where = " or ".join(prefix + "*" for prefix, _ in ENCODERS[component])
    raise RepositoryError(
        f"{component}: must be in a whole one-file checkpoint ({where}), got none; name the base that has it with --base"
    )


def _text_shapes(component: str, shapes: Shapes, config: Config) -> dict[str, tuple[int, ...]]:
    """The parameters of a CLIP text model of this config, by transformers' names."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    wide, narrow, vector = (inner, width), (width, inner), (width,)
    layer = {"mlp.fc1.weight": wide, "mlp.fc1.bias": (inner,), "mlp.fc2.weight": narrow, "mlp.fc2.bias": vector}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{part}.weight": (width, width), f"self_attn.{part}.bias": vector}
    for norm in ("layer_norm1", "layer_norm2"):
        layer |= {f"{norm}.weight": vector, f"{norm}.bias": vector}
    found: dict[str, tuple[int, ...]] = {
        TOKEN_EMBEDDING: (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        "final_layer_norm.weight": vector,
        "final_layer_norm.bias": vector,
    }
    for i in range(config["num_hidden_layers"]):
        found |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    if component == SECOND_ENCODER:
        found = {f"text_model.{name}": shape for name, shape in found.items()}
        found["text_projection.weight"] = (config["projection_dim"], width)
    return found
