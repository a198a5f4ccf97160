"""Tiny checkpoints on disk, for the tests of importers and of the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def write_card(folder: Path, **fields: object) -> None:
    """Write a card.json with the given fields over sensible ones."""
    card = {"id": folder.name, "kind": "lora", "base": "toy", "trigger": ["sks"], "class_noun": "dog", **fields}
    (folder / "card.json").write_text(json.dumps(card))


def base(folder: Path, *, width: int = 8) -> Path:
    """Write a base pipeline whose UNet has one cross-attention layer."""
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    unet = {f"{LAYER}.to_{p}.weight": np.zeros((4, width), np.float32) for p in "qkv"}
    save_file(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({"w": np.zeros(2, np.float32)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    table = {"text_model.embeddings.token_embedding.weight": np.zeros((10, 6), np.float32)}
    save_file(table, folder / "text_encoder" / "model.safetensors")
    (folder / "model_index.json").write_text(
        json.dumps({"unet": ["a", "b"], "vae": ["a", "b"], "text_encoder": ["a", "b"]})
    )
    return folder


def lora(folder: Path, *, width: int = 8, with_card: bool = True) -> Path:
    """Write a LoRA for a base of the given width."""
    folder.mkdir(parents=True)
    tensors = {
        f"unet.{LAYER}.to_k.lora_A.weight": np.zeros((2, width), np.float32),
        f"unet.{LAYER}.to_k.lora_B.weight": np.zeros((4, 2), np.float32),
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    if with_card:
        write_card(folder)
    return folder


def embedding(folder: Path, *, width: int = 6) -> Path:
    """Write learned embeddings for <cat-toy>, without a card."""
    folder.mkdir(parents=True)
    save_file({"<cat-toy>": np.zeros((2, width), np.float32)}, folder / "learned_embeds.safetensors")
    (folder / "README.md").write_text(
        "---\nbase_model: toy\ntags: [textual_inversion]\n---\nA toy cat made of cloth and wool.\n"
    )
    return folder


def custom_diffusion(folder: Path, *, width: int = 8) -> Path:
    """Write a Custom-Diffusion delta with its token."""
    folder.mkdir(parents=True)
    name = f"{LAYER}.processor.to_k_custom_diffusion.weight"
    save_file({name: np.zeros((4, width), np.float32)}, folder / "pytorch_custom_diffusion_weights.safetensors")
    save_file({"<new1>": np.zeros(6, np.float32)}, folder / "<new1>.safetensors")
    write_card(folder, kind="custom_diffusion", trigger=["<new1>"], class_noun="cat")
    return folder
