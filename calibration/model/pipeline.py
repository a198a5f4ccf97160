"""A checkpoint as torch runs it: an FP32 diffusers pipeline whose parameters are those that `personalq.weights` reads."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from personalq.architecture import SECOND_ENCODER
from personalq.cards.card import Card
from personalq.errors import PersonalQError, RepositoryError
from personalq.repository import Repository
from personalq.repository.results import Whole
from personalq.repository.settings import Settings, read_settings
from personalq.scheduler import DDIM_FIELDS, NOISY, BaseScheduler
from personalq.weights.checkpoint import CheckpointWeights, ComponentWeights, open_weights
from personalq.weights.deltas.embeddings import TOKEN_TABLES

from .conditioning import Pipe

OPTIONS: dict[type[Pipe], dict[str, Any]] = {
    StableDiffusionPipeline: {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    StableDiffusionXLPipeline: {"add_watermarker": False},
}
TEXT_MODELS = {"text_encoder": CLIPTextModel, SECOND_ENCODER: CLIPTextModelWithProjection}
MODELS = "the models of its base's configs"
LATENT_MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


def load_pipeline(repository: Repository, card: Card, device: str = "cpu") -> Pipe:
    """The checkpoint's (or base's) FP32 pipeline with a DDIM scheduler, a delta merged by the reader. Raises RepositoryError."""
    whole = repository.whole(card.id)
    weights, settings = opened(whole)
    with quiet_libraries(), one_line(card.id, MODELS):
        models = {name: model_of(name, config, weights.component(name)) for name, config in settings.configs.items()}
        pipe = open_base(whole.base_dir, settings, models)
        for name in settings.tokenizers:
            add_tokens(getattr(pipe, name), weights)
    return pipe.to(device)


def opened(whole: Whole) -> tuple[CheckpointWeights, Settings]:
    """What a checkpoint's files say: only headers and configs are read. Raises RepositoryError."""
    weights = open_weights(whole.base_dir, whole.checkpoint_dir, whole.card.kind)
    return weights, read_settings(whole.base_dir, whole.checkpoint_dir)


def open_base(base_dir: Path, settings: Settings, models: dict[str, nn.Module]) -> Pipe:
    """The base's pipeline, FP32, with these models in place of its own, and DDIM over the settings' noise schedule."""
    kind = StableDiffusionXLPipeline if SECOND_ENCODER in settings.configs else StableDiffusionPipeline
    parts = {name: CLIPTokenizer.from_pretrained(folder) for name, folder in settings.tokenizers.items()}
    options = {**OPTIONS[kind], **models, **parts, "scheduler": ddim(settings.scheduler.settings)}
    pipe: Pipe = kind.from_pretrained(base_dir, torch_dtype=torch.float32, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(settings: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM over a base's noise schedule. Each argument is said: `from_config` of another class takes DDIM's defaults."""
    return DDIMScheduler(**{field: settings[field] for field in DDIM_FIELDS})


def own_scheduler(scheduler: BaseScheduler) -> tuple[str, SchedulerMixin]:
    """(sampler, diffusers' scheduler that it equals): who draws the golden pictures. The base's own; DDIM where that draws
    noise, which torch and numpy draw differently."""
    settings = scheduler.settings
    if scheduler.sampler in ("ddim", *NOISY):
        return "ddim", ddim(settings)
    kind = getattr(diffusers, settings["_class_name"])
    taken = inspect.signature(kind.__init__).parameters
    return scheduler.sampler, kind(**{field: value for field, value in settings.items() if field in taken})


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


@contextmanager
def one_line(where: str, wanted: str) -> Iterator[None]:
    """A library's exception becomes one line that says what it said; ours come through as they are."""
    try:
        yield
    except (PersonalQError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RepositoryError(
            f"{where}: must load into {wanted}, got {said}; compare its configs and weights"
        ) from error


def model_of(component: str, config: dict[str, Any], weights: ComponentWeights) -> nn.Module:
    """A model of the base's config with the reader's parameters, every one of them and no other."""
    with init_empty_weights(include_buffers=False):
        if component in TEXT_MODELS:
            n_tokens = weights.shape(TOKEN_TABLES[component])[0]
            model = TEXT_MODELS[component](CLIPTextConfig.from_dict({**config, "vocab_size": n_tokens}))
        else:
            model = LATENT_MODELS[component].from_config(config)
    state = {name: torch.from_numpy(np.array(weights.read(name), np.float32)) for name in weights.names()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def add_tokens(tokenizer: CLIPTokenizer, weights: CheckpointWeights) -> CLIPTokenizer:
    """Teach a tokenizer the learned tokens; their rows are in the text encoders already."""
    if pieces := weights.pieces():
        tokenizer.add_tokens(pieces)
        weights.check_ids(tokenizer.convert_tokens_to_ids)
    return tokenizer


def quantisable_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Every Conv2d and Linear of the step path, by module name. Text K/V projections run once per prompt, apart from it."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.endswith(("attn2.to_k", "attn2.to_v"))
    }


def cross_attention(unet: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of every cross-attention layer, in module order: the order of the packed text rows."""
    return [(name, module) for name, module in unet.named_modules() if name.endswith(".attn2")]


def packed_rows(unet: nn.Module, text_embeds: Tensor) -> Tensor:
    """text_embeds (B,77,C) -> rows (B,77,R): K then V of every cross-attention layer, side by side."""
    layers = [attention for _, attention in cross_attention(unet)]
    return torch.cat([project(text_embeds) for layer in layers for project in (layer.to_k, layer.to_v)], dim=-1)
