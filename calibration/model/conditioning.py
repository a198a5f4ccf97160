"""What a UNet is told of its prompts, and the UNet asked with it: the one place that knows which bases are told more."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.func import functional_call

Pipe = StableDiffusionPipeline | StableDiffusionXLPipeline
ITS_OWN: Mapping[str, Tensor] = MappingProxyType({})


class Conditioning(NamedTuple):
    """N prompts: text (N,77,C); SDXL's pooled text (N,P) and time_ids (N,6), both (N,0) for every other base. float32.

    time_ids (Podell et al. 2023, section 2.2): original size, crop corner and target size, in pixels, height first.
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor

    def at(self, rows: Any) -> "Conditioning":
        """Some of the prompts, by whatever indexes a tensor."""
        return Conditioning(*(value[rows] for value in self))


def heard(keywords: Mapping[str, Any]) -> Conditioning:
    """What a diffusers pipeline told the UNet, from the keywords of the call."""
    text = keywords["encoder_hidden_states"]
    added, nothing = keywords.get("added_cond_kwargs") or {}, text.new_zeros(len(text), 0)
    return Conditioning(text, added.get("text_embeds", nothing), added.get("time_ids", nothing))


def predict(
    unet: nn.Module, sample: Tensor, timestep: Tensor, told: Conditioning, parameters: Mapping[str, Tensor] = ITS_OWN
) -> Tensor:
    """sample (N,4,h,w), timestep () or (N,) -> prediction (N,4,h,w), with these parameters in place of the UNet's own."""
    added = {"text_embeds": told.pooled, "time_ids": told.time_ids}  # a UNet that is told nothing more does not look
    keywords = {"encoder_hidden_states": told.text, "added_cond_kwargs": added, "return_dict": False}
    prediction: Tensor = functional_call(unet, dict(parameters), (sample, timestep), keywords)[0]
    return prediction


def encode(pipe: Pipe, prompts: list[str]) -> tuple[Tensor, Conditioning]:
    """prompts -> (ids (P,77) int64 of the first tokenizer, what the UNet is told), as the diffusers pipeline does it.

    Sizes are those of the base's own latents. An empty prompt is encoded like any other.
    """
    texts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in prompts]
    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        if not isinstance(pipe, StableDiffusionXLPipeline):
            return ids, heard({"encoder_hidden_states": pipe.text_encoder(ids.to(pipe.device))[0]})
        text, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
    side = float(pipe.unet.config.sample_size * pipe.vae_scale_factor)
    return ids, Conditioning(text, pooled, text.new_tensor([side, side, 0, 0, side, side]).repeat(len(text), 1))


def encode_guided(pipe: Pipe, prompts: list[str]) -> Conditioning:
    """(2P, ...): no prompt and each prompt in turn, as guidance takes them; no prompt is zeros where the base says so."""
    _, told = encode(pipe, [text for prompt in prompts for text in ("", prompt)])
    if pipe.config.get("force_zeros_for_empty_prompt", False):
        told.text[::2], told.pooled[::2] = 0, 0
    return told
