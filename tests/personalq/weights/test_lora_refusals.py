"""What is no LoRA that can be merged is refused in one line that names the tensor, and guesses no cause."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from hypothesis import HealthCheck, given, settings  # noqa: E402  (after the skip)
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from personalq.errors import RepositoryError  # noqa: E402
from personalq.weights.checkpoint import open_weights  # noqa: E402
from tests.personalq.weights.test_deltas import refused  # noqa: E402
from tests.personalq.weights.test_lora_files import PLAIN, Q  # noqa: E402

# --- what is no LoRA of Stable Diffusion

ELSEWHERE = {
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "a diffusion transformer",
    "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight": "a diffusion transformer",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "a diffusion transformer",
    "diffusion_model.joint_blocks.0.x_block.attn.proj.lora_A.weight": "a diffusion transformer",
    "transformer.transformer_blocks.0.attn.to_q.lora.down.weight": "a diffusion transformer",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": "a third text encoder",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": "a third text encoder",
    "lora_prior_unet_down_blocks_0.lora_down.weight": "a prior",
    "vae.encoder.conv_in.lora_A.weight": "the VAE",
    "lora_vae_encoder_conv_in.lora_down.weight": "the VAE",
}


@pytest.mark.parametrize(("key", "place"), ELSEWHERE.items())
def test_a_part_of_another_model_is_named(tiny_base: Path, tmp_path: Path, key: str, place: str) -> None:
    save_file(PLAIN | {key: torch.ones(4, 64)}, tmp_path / "lora.safetensors")
    text = refused(tiny_base, tmp_path, "lora")
    wanted = "must change the UNet or a text encoder of Stable Diffusion 1, 2 or XL, got a part of"
    assert text.startswith(f"lora.safetensors: {key}: {wanted} {place}")
    assert "--base" not in text


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"unet.{Q}.oft_R.weight", "OFT as peft writes it"),
        (f"lora_unet_{Q.replace('.', '_')}.lambda_layer", "T-LoRA"),
        ("text_encoder.text_model.embeddings.token_embedding.lora_embedding_A", "a LoRA of an embedding table"),
        (f"unet.{Q}.ia3_l", "(IA)^3 as peft writes it"),
    ],
)
def test_an_algorithm_that_is_not_read_is_named(tiny_base: Path, tmp_path: Path, key: str, method: str) -> None:
    save_file(PLAIN | {key: torch.ones(4, 64)}, tmp_path / "lora.safetensors")
    assert f"full difference, got {method}; merge it into a whole model and add that" in refused(
        tiny_base, tmp_path, "lora"
    )


PARTS = (
    ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "alpha", "lora_B.bias", "diff_b", "scalar"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale", "alpha"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
    ("weight", "on_input"),
    ("diff", "diff_b", "w_norm", "b_norm"),
    ("oft_blocks", "oft_diag", "rescale", "alpha"),
)
SIZES = st.sampled_from([0, 1, 2, 4, 8, 32, 64])
SHAPES = st.one_of(
    st.sampled_from(
        [(), (64,), (64, 4), (4, 64), (64, 64), (8, 8), (4, 64, 3, 3), (4, 4, 3, 3), (8, 8, 8), (2, 8, 8, 8)]
    ),
    st.lists(SIZES, max_size=4).map(tuple),
)


@given(
    module=st.sampled_from([Q, "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm1"]),
    shapes=st.sampled_from(PARTS).flatmap(lambda parts: st.dictionaries(st.sampled_from(parts), SHAPES, min_size=1)),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_of_any_shape_are_merged_or_refused_in_one_line(
    tiny_base: Path, tmp_path: Path, module: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    save_file(
        {f"unet.{module}.{part}": torch.ones(shape) for part, shape in shapes.items()}, tmp_path / "any.safetensors"
    )
    try:
        unet = open_weights(tiny_base, tmp_path, "lora").component("unet")
    except RepositoryError as error:
        assert "\n" not in str(error)
    else:
        for name in unet.changed:
            merged = unet.read(name)
            assert merged.dtype == np.float32 and merged.shape == unet.shape(name)


# --- tensors of LyCORIS that make no module

K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
WRONG: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "half a LoHa": ({"hada_w1_a": (64, 4), "hada_w1_b": (4, 32)}, "must have all parts of a LoHa, got hada_w1_a, hada_w1_b"),
    "one core": (
        {"hada_w1_a": (4, 64), "hada_w1_b": (4, 32), "hada_w2_a": (4, 64), "hada_w2_b": (4, 32), "hada_t1": (4, 4, 1, 1)},
        "must have hada_t1 and hada_t2, got one of them",
    ),
    "a LoHa of another base": (
        {"hada_w1_a": (64, 4), "hada_w1_b": (4, 768), "hada_w2_a": (64, 4), "hada_w2_b": (4, 768)},
        "must fit the base's [64, 32], got a factor of [64, 768]; add it with --base",
    ),
    "factors that do not meet": (
        {"hada_w1_a": (64, 3), "hada_w1_b": (4, 32), "hada_w2_a": (64, 4), "hada_w2_b": (4, 32)},
        "must fit the base's [64, 32], got hada_w1_a [64, 3], hada_w1_b [4, 32]",
    ),
    "a LoKr of another base": (
        {"lokr_w1": (8, 16), "lokr_w2": (8, 48)},
        "must fit the base's [64, 32], got a Kronecker product of [8, 16] and [8, 48]",
    ),
    "half a LoKr": ({"lokr_w1": (8, 8), "lokr_w2_a": (8, 2)}, "must have lokr_w2 or both its factors, got lokr_w1, lokr_w2_a"),
    "a LoKr twice": (
        {"lokr_w1": (8, 8), "lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2": (8, 4)},
        "must have lokr_w1 or both its factors",
    ),
    "a GLoRA of another base": (
        {"a1.weight": (768, 4), "a2.weight": (4, 768), "b1.weight": (64, 4), "b2.weight": (4, 768)},
        "must fit the base's [64, 32], got b1 [64, 4], b2 [4, 768], a1 [768, 4], a2 [4, 768]",
    ),
    "(IA)^3 of another base": (
        {"weight": (768,), "on_input": ()},
        "must fit the base's [64, 32], got factors of [768] on its inputs",
    ),
    "a full difference of another base": ({"diff": (64, 768)}, "must fit the base's [64, 32], got diff [64, 768]"),
    "a bias where there is none": (
        {"diff": (64, 32), "diff_b": (64,)},
        "diff_b must fit the base's bias, got [64]",
    ),
    "OFT of another base": ({"oft_blocks": (4, 8, 8)}, "must fit the base's [64, 32], got oft_blocks [4, 8, 8]"),
    "BOFT of too many stages": ({"oft_blocks": (5, 8, 8, 8)}, "must fit the base's [64, 32], got oft_blocks [5, 8, 8, 8]"),
    "LoCon of another base": (
        {"lora_down.weight": (4, 32, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (64, 4, 1, 1)},
        "must fit the base's [64, 32], got up [64, 4, 1, 1], mid [4, 4, 3, 3], down [4, 32, 1, 1]",
    ),
    "parts of two algorithms": (
        {"diff": (64, 32), "hada_w1_a": (64, 4)},
        "must have all parts of a LoHa, got diff, hada_w1_a",
    ),
    "lengths that nothing uses": (
        {"diff": (64, 32), "dora_scale": (64, 1)},
        f"every tensor must be a part of its full difference, got {K}.dora_scale besides",
    ),
    "an alpha of many": (
        {"lora_down.weight": (4, 32), "lora_up.weight": (64, 4), "alpha": (2,)},
        f"{K}.alpha: must be one number that is not 0, got [1.0, 1.0]",
    ),
    "peft's OFT": ({"oft_R.weight": (8, 28)}, f"{K}.oft_R.weight: must be part of a LoRA, DoRA, LoCon, LoHa"),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "text"), WRONG.values(), ids=WRONG)
def test_tensors_that_make_no_module_are_refused(
    tiny_base: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]], text: str
) -> None:
    save_file({f"{K}.{part}": torch.ones(shape) for part, shape in shapes.items()}, tmp_path / "wrong.safetensors")
    assert text in refused(tiny_base, tmp_path, "lora")


def test_an_alpha_of_zero_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    state = {f"{K}.lora_down.weight": torch.ones(4, 32), f"{K}.lora_up.weight": torch.ones(64, 4)}
    save_file(state | {f"{K}.alpha": torch.tensor(0.0)}, tmp_path / "wrong.safetensors")
    assert "alpha: must be one number that is not 0, got [0.0]" in refused(tiny_base, tmp_path, "lora")
