"""A checkpoint put on its base's pipeline for a while: what an attached adapter makes of the base, in exact arithmetic.

In the UNet the parameters that the delta changes are swapped for the merged ones; the text encoders and tokenizers are the
checkpoint's, and so is the noise schedule; the VAE is shared. One checkpoint's changes are in memory at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from personalq.repository.results import Whole
from personalq.repository.settings import Settings
from personalq.weights.checkpoint import CheckpointWeights, ComponentWeights

from .conditioning import Pipe
from .pipeline import MODELS, TEXT_MODELS, add_tokens, ddim, model_of, one_line, opened, quiet_libraries


@contextmanager
def dressed(pipe: Pipe, whole: Whole) -> Iterator[Pipe]:
    """The base's pipeline as this checkpoint's inside the block; every part of it is put back after it, bit for bit.

    Raises RepositoryError for a checkpoint that does not fit the base.
    """
    weights, settings = opened(whole)
    with quiet_libraries(), one_line(whole.card.id, MODELS):
        parts = _parts(weights, settings)
    before = {name: getattr(pipe, name) for name in parts}
    kept: dict[str, Tensor] = {}
    try:
        _put_on(pipe.unet, weights.component("unet"), kept)
        _set(pipe, parts)
        yield pipe
    finally:
        _set(pipe, before)
        for name, parameter in pipe.unet.named_parameters():
            if name in kept:
                parameter.data = kept[name]


def tokenizer_of(whole: Whole) -> CLIPTokenizer:
    """The checkpoint's first tokenizer, with the tokens that it learned."""
    weights, settings = opened(whole)
    with quiet_libraries(), one_line(whole.card.id, "a CLIP tokenizer"):
        return add_tokens(CLIPTokenizer.from_pretrained(settings.tokenizers["tokenizer"]), weights)


def _put_on(unet: torch.nn.Module, weights: ComponentWeights, kept: dict[str, Tensor]) -> None:
    """Swap what the delta changes; the base's own tensors go to `kept`, untouched: whoever holds one still has the base's."""
    for name, parameter in unet.named_parameters():
        if name in weights.changed:
            kept[name] = parameter.data
            merged = torch.from_numpy(np.array(weights.read(name), np.float32))
            parameter.data = merged.to(parameter.device)


def _parts(weights: CheckpointWeights, settings: Settings) -> dict[str, Any]:
    """The text encoders that the delta changes, every tokenizer, and DDIM over the checkpoint's noise schedule."""
    parts: dict[str, Any] = {"scheduler": ddim(settings.scheduler.settings)}
    for name, folder in settings.tokenizers.items():
        parts[name] = add_tokens(CLIPTokenizer.from_pretrained(folder), weights)
    for name in TEXT_MODELS:
        if name in settings.configs and weights.component(name).changed:
            parts[name] = model_of(name, settings.configs[name], weights.component(name))
    return parts


def _set(pipe: Pipe, parts: dict[str, Any]) -> None:
    for name, value in parts.items():
        setattr(pipe, name, value)
