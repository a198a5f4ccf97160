"""A family is what fixes the graphs: a config that says its defaults, or how pictures are made, is the same family."""

import inspect
import json
from typing import Any

import pytest

from personalq.architecture import DEFAULTS, NO_GRAPH, SECOND_ENCODER, family_key

# Stable Diffusion 1.5's configs as diffusers 0.6 and transformers 4.22 wrote them.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PUBLISHED = {"unet": UNET, "text_encoder": TEXT, "vae": VAE}


def changed(part: str, **fields: Any) -> dict[str, dict[str, Any]]:
    return PUBLISHED | {part: PUBLISHED[part] | fields}


def test_what_a_config_leaves_out_means_the_default() -> None:
    short = {
        part: {name: value for name, value in config.items() if DEFAULTS[part].get(name) != value}
        for part, config in PUBLISHED.items()
    }
    full = {part: DEFAULTS[part] | json.loads(json.dumps(config)) for part, config in PUBLISHED.items()}
    assert len(short["unet"]) < 8 and len(full["unet"]) > 40
    assert family_key(short) == family_key(PUBLISHED) == family_key(full)


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("unet", {"sample_size": 96, "upcast_attention": True, "_diffusers_version": "0.42.1"}),
        ("vae", {"scaling_factor": 0.13025, "force_upcast": False, "sample_size": 768}),
        ("text_encoder", {"eos_token_id": 49407, "torch_dtype": "float16", "projection_dim": 512, "vocab_size": 49410}),
        ("text_encoder", {"tie_word_embeddings": True, "top_k": 50, "return_dict": True}),
        ("unet", {"mid_block_scale_factor": 1.0}),
    ],
    ids=str,
)
def test_how_pictures_are_made_and_who_wrote_a_config_is_no_architecture(part: str, fields: dict[str, Any]) -> None:
    assert family_key(changed(part, **fields)) == family_key(PUBLISHED)


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("unet", {"attention_head_dim": [5, 10, 20, 20]}),
        ("unet", {"use_linear_projection": True}),
        ("unet", {"a_field_of_tomorrow": 1}),
        ("vae", {"block_out_channels": [128, 256, 512]}),
        ("vae", {"a_field_of_tomorrow": 1}),
        ("text_encoder", {"hidden_act": "gelu"}),
        ("text_encoder", {"num_hidden_layers": 23}),
    ],
    ids=str,
)
def test_what_changes_the_graph_is_another_family(part: str, fields: dict[str, Any]) -> None:
    assert family_key(changed(part, **fields)) != family_key(PUBLISHED)


def test_the_second_encoders_end_token_is_in_its_graph() -> None:
    keys = {family_key({**PUBLISHED, SECOND_ENCODER: TEXT | {"eos_token_id": eos}}) for eos in (2, 49407)}
    assert len(keys) == 2


def test_defaults_are_those_of_diffusers_and_transformers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'personalq[export]'")
    transformers = pytest.importorskip("transformers")
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        parameters = inspect.signature(kind.__init__).parameters
        theirs = {name: one.default for name, one in parameters.items() if name not in ("self", *NO_GRAPH)}
        assert {name: list(v) if isinstance(v, tuple) else v for name, v in theirs.items()} == DEFAULTS[part]
    clip = transformers.CLIPTextConfig()
    for part in ("text_encoder", SECOND_ENCODER):
        assert {name: getattr(clip, name) for name in DEFAULTS[part]} == DEFAULTS[part]
