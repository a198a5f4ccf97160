"""Learned embeddings in every form: the vectors and ids that diffusers gives for the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: E402  (after the skip)
from safetensors.torch import load_file, save_file  # noqa: E402

from personalq.errors import RepositoryError  # noqa: E402
from personalq.weights.checkpoint import open_weights  # noqa: E402
from personalq.weights.deltas.embeddings import learned_tokens  # noqa: E402
from tests.exporters import architectures  # noqa: E402
from tests.personalq.weights.test_against_diffusers import assert_equal, quietly  # noqa: E402

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    architectures.sdxl().save_pretrained(folder)
    return folder


def lora(folder: Path) -> None:
    halves = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(64, 2)}
    save_file({f"{TO_Q}.{half}.weight": value for half, value in halves.items()}, folder / "dog.safetensors")


def fused(pipe: Any, folder: Path) -> Any:
    pipe.load_lora_weights(str(folder), weight_name="dog.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def test_pivotal_tuning_on_sd1_adds_a_token_for_each_row(tiny_base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    lora(tmp_path)
    save_file({"clip_l": torch.randn(3, 32)}, tmp_path / "dog_emb.safetensors")
    weights = open_weights(tiny_base, tmp_path, "lora")
    tokens = ["<s0>", "<s1>", "<s2>"]
    assert weights.added_tokens == tuple((token, (token,)) for token in tokens)
    pipe = fused(quietly(StableDiffusionPipeline.from_pretrained, tiny_base), tmp_path)
    pipe.load_textual_inversion(load_file(tmp_path / "dog_emb.safetensors")["clip_l"], token=tokens)
    close(weights, pipe)
    assert pipe.tokenizer.convert_tokens_to_ids("<s0>") == weights.first_added_id


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_pivotal_tuning_on_sdxl_adds_a_token_for_each_row_of_both(sdxl: Path, tmp_path: Path, names: Any) -> None:
    torch.manual_seed(2)
    lora(tmp_path)
    first, second = names
    vectors = {first: torch.randn(2, 32), second: torch.randn(2, 24)}
    save_file(vectors, tmp_path / "dog_emb.safetensors")
    weights = open_weights(sdxl, tmp_path, "lora")
    pipe = fused(quietly(StableDiffusionXLPipeline.from_pretrained, sdxl), tmp_path)
    for vector, encoder, tokenizer in (
        (vectors[first], pipe.text_encoder, pipe.tokenizer),
        (vectors[second], pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(vector, token=["<s0>", "<s1>"], text_encoder=encoder, tokenizer=tokenizer)
    close(weights, pipe)
    assert [token for token, _ in weights.added_tokens] == ["<s0>", "<s1>"]


def test_two_files_of_sdxl_are_one_embedding(sdxl: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    vectors = [torch.randn(2, 32), torch.randn(2, 24)]
    for vector, name in zip(vectors, ("learned_embeds", "learned_embeds_2"), strict=True):
        save_file({"<cat>": vector}, tmp_path / f"{name}.safetensors")
    weights = open_weights(sdxl, tmp_path, "textual_inversion")
    pipe = quietly(StableDiffusionXLPipeline.from_pretrained, sdxl)
    for name, encoder, tokenizer in (
        ("learned_embeds", pipe.text_encoder, pipe.tokenizer),
        ("learned_embeds_2", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(tmp_path / f"{name}.safetensors", text_encoder=encoder, tokenizer=tokenizer)
    assert_equal(weights, pipe)
    assert weights.added_tokens == (("<cat>", ("<cat>", "<cat>_1")),)
    (tmp_path / "learned_embeds_2.safetensors").unlink()
    with pytest.raises(RepositoryError, match=r"learned_embeds.safetensors: must hold clip_l and clip_g"):
        open_weights(sdxl, tmp_path, "textual_inversion")


def test_a1111_s_embedding_is_called_by_its_file(tiny_base: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "my-style.safetensors")
    weights = open_weights(tiny_base, tmp_path, "textual_inversion")
    pipe = quietly(StableDiffusionPipeline.from_pretrained, tiny_base)
    pipe.load_textual_inversion(load_file(tmp_path / "my-style.safetensors")["emb_params"], token="my-style")
    assert_equal(weights, pipe)
    assert weights.added_tokens == (("my-style", ("my-style", "my-style_1")),)


TOKENS = {
    "diffusers": ("learned_embeds", {"<dog>": (2, 8)}, ["<dog>"]),
    "several tokens": ("learned_embeds", {"<b>": (8,), "<a>": (1, 8)}, ["<a>", "<b>"]),
    "A1111": ("my-style", {"emb_params": (3, 8)}, ["my-style"]),
    "SDXL": ("my-style", {"clip_l": (2, 8), "clip_g": (2, 6)}, ["my-style"]),
    "pivotal tuning": ("dog_emb", {"clip_l": (2, 8), "clip_g": (2, 6)}, ["<s0>", "<s1>"]),
    "a word with a dot": ("learned_embeds", {"<dr.who>": (8,)}, ["<dr.who>"]),
}


@pytest.mark.parametrize(("stem", "shapes", "tokens"), TOKENS.values(), ids=TOKENS)
def test_the_trigger_is_the_token_that_the_file_adds(stem: str, shapes: Any, tokens: list[str]) -> None:
    assert learned_tokens(stem, shapes) == tokens


def close(weights: Any, pipe: Any) -> None:
    """Equal names and shapes; values as near as another order of additions leaves them."""
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if (model := getattr(pipe, name, None)) is None:
            continue
        for parameter, value in model.named_parameters():
            ours = np.asarray(weights.component(name).read(parameter), np.float32)
            np.testing.assert_allclose(ours, value.detach().numpy(), rtol=0, atol=1e-5, err_msg=parameter)
