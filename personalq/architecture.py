"""The family an architecture belongs to: everything in a base's configs that fixes its graphs, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import RepositoryError

COMPONENTS = ("unet", "text_encoder", "vae")
SECOND_ENCODER = "text_encoder_2"
# What diffusers and transformers take where a config leaves a field out: a config that says it means the same graph.
_CLIP = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "text_encoder": _CLIP,
    SECOND_ENCODER: {**_CLIP, "projection_dim": 512, "eos_token_id": 49407},
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [64],
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "only_cross_attention": False,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "use_linear_projection": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    },
}
# Fields that change no graph: where the config came from, how pictures are made with it, and the float type of attention,
# which is the graph's own.
NO_GRAPH = {
    *("_class_name", "_diffusers_version", "_name_or_path", "dropout", "sample_size", "upcast_attention"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"),
}

# UNet config fields that change what the UNet computes or is told, and what they may be. One that is absent is fine.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "in_channels": (4,),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "attention_type": ("default",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
}
_WHY = {
    "in_channels": "inpainting, depth and upscaling UNets are told more than a prompt, which is not supported",
    "time_cond_proj_dim": "guidance-distilled UNets (LCM) are not supported; their LoRA form on a plain base is",
}
_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


def read_configs(base_dir: Path) -> dict[str, dict[str, Any]]:
    """A base pipeline's component configs: SD 1.x, 2.x, or SDXL, which has text_encoder_2 too.

    Raises RepositoryError for a base that PersonalQ would get silently wrong.
    """
    configs = {"unet": read_config(base_dir, "unet")}
    _check_known(base_dir, configs["unet"])
    is_sdxl = configs["unet"].get("addition_embed_type") == "text_time"
    for component in (*COMPONENTS[1:], *((SECOND_ENCODER,) if is_sdxl else ())):
        configs[component] = read_config(base_dir, component)
    if is_sdxl:
        _check_sdxl(base_dir, configs)
    for field in ("latents_mean", "latents_std"):
        if configs["vae"].get(field) is not None:
            raise RepositoryError(f"{base_dir}: vae {field} must be absent, got values; this VAE is not supported yet")
    return configs


def read_config(base_dir: Path, component: str) -> dict[str, Any]:
    """One component's config.json. Raises RepositoryError."""
    file = base_dir / component / "config.json"
    if not file.is_file():
        raise RepositoryError(
            f"{file}: must exist in a Stable Diffusion base, got nothing; add the whole diffusers folder"
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise RepositoryError(f"{file}: must be JSON, got {error}; copy the base again") from error
    if not isinstance(config, dict):
        raise RepositoryError(f"{file}: must be a JSON object, got {type(config).__name__}; copy the base again")
    return config


def _check_known(base_dir: Path, unet: dict[str, Any]) -> None:
    for field, allowed in _KNOWN.items():
        value = unet.get(field, allowed[0])
        if value not in allowed:
            wanted = " or ".join(str(choice) for choice in allowed)
            why = _WHY.get(field, "only Stable Diffusion 1.x, 2.x and XL are supported")
            raise RepositoryError(f"{base_dir}: unet {field} must be {wanted}, got {value!r}; {why}")
    blocks = [*unet.get("down_block_types", ()), *unet.get("up_block_types", ())]
    odd = next((block for block in blocks if block not in _BLOCKS), None)
    if odd is not None:
        raise RepositoryError(f"{base_dir}: unet blocks must be of {', '.join(_BLOCKS)}, got {odd!r}; use another base")


def _check_sdxl(base_dir: Path, configs: dict[str, dict[str, Any]]) -> None:
    """The UNet's added input is six time ids beside the second encoder's pooled text; the refiner has five."""
    unet, second = configs["unet"], configs[SECOND_ENCODER]
    pooled = second.get("projection_dim", 512)
    wanted = pooled + 6 * (unet.get("addition_time_embed_dim") or 0)
    found = unet.get("projection_class_embeddings_input_dim")
    if found != wanted:
        raise RepositoryError(
            f"{base_dir}: unet projection_class_embeddings_input_dim must be {wanted} (pooled text and six time ids), "
            f"got {found}; SDXL refiners are not supported"
        )


def family_key(configs: dict[str, dict[str, Any]]) -> str:
    """32 hex digits over what fixes the graphs: equal for every checkpoint that shares them, whoever wrote its configs."""
    kept = {part: architecture(part, config) for part, config in configs.items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def architecture(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that its graph depends on, said or not. Of a CLIP text model those are known; a UNet's or VAE's
    field that is not known here is taken for one of them."""
    defaults = DEFAULTS[part]
    known = defaults if part.startswith("text_encoder") else config.keys() - NO_GRAPH
    said = {name: config[name] for name in known if name in config}
    return defaults | {name: value for name, value in said.items() if value != defaults.get(name)}
