"""Write and load the four kinds of personalisation in the formats diffusers itself reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextModel

from .concepts import CONCEPTS, Entry
from .record import BASE, CHECKPOINTS

CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"
EMBEDS = "learned_embeds.safetensors"


@dataclass
class Taught:
    """The models of one personalisation and the ids of its new tokens."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: Any
    token_ids: list[int] = field(default_factory=list)


def _vectors(taught: Taught) -> torch.Tensor:
    return taught.text_encoder.get_input_embeddings().weight.detach()[taught.token_ids].float().cpu().contiguous()


def save_unet(taught: Taught, entry: Entry, folder: Path) -> None:
    """A DreamBooth checkpoint: the UNet in fp16, and the text encoder if it was taught; the rest comes from the base."""
    taught.unet.to(torch.float16).save_pretrained(folder / "unet")
    if entry.text:
        taught.text_encoder.to(torch.float16).save_pretrained(folder / "text_encoder")


def save_lora(taught: Taught, entry: Entry, folder: Path) -> None:
    """pytorch_lora_weights.safetensors, with the adapter's configuration (alpha) in its metadata."""
    weights = get_peft_model_state_dict(taught.unet)
    # The conversion renames attention layers only, and diffusers' loader drops one half of a file with names of two kinds.
    layers = {"unet_lora_layers": weights if entry.convolutions else convert_state_dict_to_diffusers(weights)}
    modules: dict[str, Any] = {"unet": taught.unet}
    if entry.text:
        layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(
            get_peft_model_state_dict(taught.text_encoder)
        )
        modules["text_encoder"] = taught.text_encoder
    metadata = _collate_lora_metadata(modules) if entry.alpha != 8 or entry.text else {}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)


def save_embedding(taught: Taught, entry: Entry, folder: Path) -> None:
    """learned_embeds.safetensors: one key, shape (vectors, 128)."""
    save_file({entry.trigger: _vectors(taught)}, folder / EMBEDS)


def save_custom_diffusion(taught: Taught, entry: Entry, folder: Path) -> None:
    """The processor weights of every cross-attention, and the token's vector in a file of its own.

    Self-attention processors have no weights. diffusers' loader wants them named all the same (an empty value), and
    safetensors holds tensors only, so each is an empty tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in taught.unet.attn_processors:
        if "attn2" not in name:
            tensors[name] = torch.zeros(0)
            continue
        attention = taught.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("to_k", "to_v"):
            tensors[f"{name}.{part}_custom_diffusion.weight"] = (
                getattr(attention, part).weight.detach().half().cpu().contiguous()
            )
    save_file(tensors, folder / CUSTOM_DIFFUSION)
    save_file({entry.trigger: _vectors(taught)[0]}, folder / f"{entry.trigger}.safetensors")


SAVERS: dict[str, Callable[[Taught, Entry, Path], None]] = {
    "dreambooth": save_unet,
    "lora": save_lora,
    "textual_inversion": save_embedding,
    "custom_diffusion": save_custom_diffusion,
}


def load_pipeline(
    concept_id: str | None, *, checkpoints: Path = CHECKPOINTS, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """The base with one checkpoint loaded by diffusers' own loaders; None is the base alone."""
    pipe = StableDiffusionPipeline.from_pretrained(BASE, dtype=dtype, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if concept_id is not None:
        LOADERS[CONCEPTS[concept_id].kind](pipe, checkpoints / concept_id, CONCEPTS[concept_id].trigger)
    return pipe


def _load_unet(pipe: StableDiffusionPipeline, folder: Path, trigger: str) -> None:
    pipe.unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=pipe.unet.dtype)
    if (folder / "text_encoder").is_dir():
        pipe.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=pipe.text_encoder.dtype)


def _load_lora(pipe: StableDiffusionPipeline, folder: Path, trigger: str) -> None:
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")


def _load_embedding(pipe: StableDiffusionPipeline, folder: Path, trigger: str) -> None:
    pipe.load_textual_inversion(folder, weight_name=EMBEDS)


def _load_custom_diffusion(pipe: StableDiffusionPipeline, folder: Path, trigger: str) -> None:
    # diffusers 0.42 sets the processors only when it is given the pipeline
    pipe.unet.load_attn_procs(folder, weight_name=CUSTOM_DIFFUSION, _pipeline=pipe)
    pipe.load_textual_inversion(folder, weight_name=f"{trigger}.safetensors", token=trigger)


LOADERS: dict[str, Callable[[StableDiffusionPipeline, Path, str], None]] = {
    "dreambooth": _load_unet,
    "lora": _load_lora,
    "textual_inversion": _load_embedding,
    "custom_diffusion": _load_custom_diffusion,
}
