"""A checkpoint as diffusers itself runs it: FP32 pipeline with the delta loaded by diffusers' own loaders."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from personalq.architecture import SECOND_ENCODER, read_configs
from personalq.card import Card
from personalq.errors import RepositoryError
from personalq.repository import Repository

from .conditioning import Pipe

WHOLE = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
}
OPTIONS: dict[type[Pipe], dict[str, Any]] = {
    StableDiffusionPipeline: {"safety_checker": None, "requires_safety_checker": False},
    StableDiffusionXLPipeline: {"add_watermarker": False},
}
# An SDXL embedding's file: which vectors belong to which text encoder and its tokenizer.
EMBEDDING_PARTS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}


def load_pipeline(repository: Repository, card: Card, device: str = "cpu") -> Pipe:
    """The checkpoint's FP32 pipeline, DDIM scheduler, delta merged where diffusers can. Raises RepositoryError."""
    base_dir, folder = repository.base_dir(card), repository.checkpoint_dir(card.id)
    kind = StableDiffusionXLPipeline if SECOND_ENCODER in read_configs(base_dir) else StableDiffusionPipeline
    with quiet_libraries():
        pipe = kind.from_pretrained(base_dir, torch_dtype=torch.float32, local_files_only=True, **OPTIONS[kind])
        # the base's own settings: StableDiffusionPipeline overrules a steps_offset of 0, the runtime obeys it
        own = type(pipe.scheduler).from_pretrained(base_dir, subfolder="scheduler", local_files_only=True)
        pipe.scheduler = DDIMScheduler.from_config(own.config)
        LOADERS[card.kind](pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """diffusers and transformers print bars and advice of their own while they load; errors still come through."""
    kept = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    try:
        for library, _ in kept:
            library.set_verbosity_error()
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level in kept:
            library.set_verbosity(level)
            library.enable_progress_bar()


def _load_whole(pipe: Pipe, folder: Path) -> None:
    for name, model in WHOLE.items():
        if (folder / name).is_dir():
            setattr(pipe, name, model.from_pretrained(folder / name, torch_dtype=torch.float32))


def _load_lora(pipe: Pipe, folder: Path) -> None:
    file = _only(folder, "*.safetensors")
    refuse_partly_loaded(file)
    pipe.load_lora_weights(folder, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def refuse_partly_loaded(file: Path) -> None:
    """Raise RepositoryError for a DoRA whose lengths diffusers 0.42.1 drops: kohya's, and those of a text encoder."""
    with safe_open(file, "np") as tensors:
        keys = tensors.keys()
    names = [name for name in keys if "lora_magnitude_vector" in name or "dora_scale" in name]
    dropped = [n for n in names if not n.endswith(".lora_magnitude_vector") or n.startswith("text_encoder")]
    if dropped:
        raise RepositoryError(
            f"{file}: must be a DoRA that diffusers loads whole, got lengths it drops ({dropped[0]}); "
            "export it with --spec fp16, or merge it into a full checkpoint"
        )


def _load_tokens(pipe: Pipe, folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("pytorch_custom_diffusion"):
            continue
        if isinstance(pipe, StableDiffusionXLPipeline):
            _load_two_parts(pipe, file)
        else:
            pipe.load_textual_inversion(folder, weight_name=file.name)


def _load_two_parts(pipe: StableDiffusionXLPipeline, file: Path) -> None:
    """An embedding for both text encoders; the token is the file's name, as A1111 takes it."""
    vectors = load_file(file)
    if set(vectors) != set(EMBEDDING_PARTS) or len({x.shape[:-1] for x in vectors.values()}) != 1:
        got = ", ".join(f"{name} {list(x.shape)}" for name, x in sorted(vectors.items()))
        raise RepositoryError(
            f"{file.name}: must hold clip_l and clip_g, as many vectors for each of SDXL's text encoders, got {got}; "
            "add an embedding that was trained on SDXL"
        )
    for name, (encoder, tokenizer) in EMBEDDING_PARTS.items():
        where = {"text_encoder": getattr(pipe, encoder), "tokenizer": getattr(pipe, tokenizer)}
        pipe.load_textual_inversion(vectors[name], token=file.stem, **where)


def _load_custom_diffusion(pipe: Pipe, folder: Path) -> None:
    file = _only(folder, "pytorch_custom_diffusion*.safetensors")
    # without _pipeline, diffusers 0.42 reads the file and sets nothing
    pipe.unet.load_attn_procs(folder, weight_name=file.name, _pipeline=pipe)
    if not any(hasattr(p, "to_k_custom_diffusion") for p in pipe.unet.attn_processors.values()):
        raise RepositoryError(
            f"{file}: must set Custom-Diffusion K and V in the UNet, got none set; add the checkpoint again"
        )
    _load_tokens(pipe, folder)


LOADERS = {
    "dreambooth": _load_whole,
    "lora": _load_lora,
    "textual_inversion": _load_tokens,
    "custom_diffusion": _load_custom_diffusion,
}


def _only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise RepositoryError(f"{folder}: must hold one file {pattern}, got {len(files)}; add the checkpoint again")
    return files[0]


def quantisable_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Every Conv2d and Linear of the step path, by module name. Text K/V projections run once per prompt, apart from it."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and not name.endswith(("attn2.to_k", "attn2.to_v"))
        and ".processor." not in name
    }


def cross_attention(unet: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of every cross-attention layer, in module order: the order of the packed text rows."""
    return [(name, module) for name, module in unet.named_modules() if name.endswith(".attn2")]


def text_projections(attention: Any) -> tuple[nn.Module, nn.Module]:
    """The layer's K and V projections of text; Custom Diffusion keeps its own in the attention processor."""
    processor = attention.processor
    key = getattr(processor, "to_k_custom_diffusion", attention.to_k)
    return key, getattr(processor, "to_v_custom_diffusion", attention.to_v)


def packed_rows(unet: nn.Module, text_embeds: Tensor) -> Tensor:
    """text_embeds (B,77,C) -> rows (B,77,R): K then V of every cross-attention layer, side by side."""
    layers = [attention for _, attention in cross_attention(unet)]
    return torch.cat([project(text_embeds) for layer in layers for project in text_projections(layer)], dim=-1)
