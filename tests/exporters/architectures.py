"""Tiny pipelines of every architecture PersonalQ exports, random and seeded, as diffusers builds them."""

from typing import Any

from tests.conftest import tiny_pipeline, tiny_text_config, tiny_tokenizer


def sd1(seed: int = 0) -> Any:
    """Stable Diffusion 1.x: convolutions around attention, heads by number, epsilon."""
    return tiny_pipeline(seed)


def sd2(seed: int = 0) -> Any:
    """Stable Diffusion 2.x: linear projections, head dimensions per block, GELU text encoder, v-prediction."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = tiny_pipeline(seed)
    torch.manual_seed(seed)
    pipe.register_modules(
        unet=UNet2DConditionModel(
            **{**unet_settings(), "attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
        ),
        text_encoder=CLIPTextModel(text_config(hidden_act="gelu")),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction", steps_offset=1
        ),
    )
    return pipe


def sdxl(seed: int = 0) -> Any:
    """Stable Diffusion XL: two text encoders, pooled text and size ids, more transformer layers deeper down."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    plain = tiny_pipeline(seed)
    torch.manual_seed(seed)
    second = tiny_tokenizer()
    second.pad_token = "!"
    unet = UNet2DConditionModel(
        **{
            **unet_settings(),
            "cross_attention_dim": 56,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        }
    )
    return StableDiffusionXLPipeline(
        vae=plain.vae,
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(hidden_size=24, hidden_act="gelu", projection_dim=20, num_hidden_layers=3)
        ),
        tokenizer=plain.tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=plain.scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def unet_settings() -> dict[str, Any]:
    return {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }


def text_config(**changes: Any) -> Any:
    config = tiny_text_config(tiny_tokenizer())
    config.update(changes)
    return config
