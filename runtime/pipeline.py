"""Prompt to picture: rows once per prompt, classifier-free guidance in one batch, the loop as a generator of steps.

It knows prompts, seeds and latents; engines are behind their protocol, noise schedules in sampling.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError, PromptError
from personalq.rows import Ids, find_sequence, kept_index, kept_positions, row_index
from personalq.tokens import Encoded, Tokenizer

from .engine import TOKENIZER, UNET_INPUTS, Array, Conditioning, Engine
from .image import Image
from .sampling import ddim_step, predict, schedule_from_config, timesteps

logger = logging.getLogger("personalq.runtime")


@dataclass(frozen=True)
class Step:
    """One step of denoising, done. latents: (4,h,w) float32 after it; predicted: the clean latents it aims at."""

    index: int
    n_steps: int
    timestep: int
    latents: Array
    predicted: Array


@dataclass(frozen=True)
class PromptRows:
    """A prompt, encoded and turned into what the UNet needs (batch of 1). kept: positions whose rows are FP16."""

    conditioning: Conditioning
    kept: tuple[int, ...]
    text_embeds: Array
    cut: str = ""


def start_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 noise of `shape`, (4,h,w); the same seed gives the same noise on every machine."""
    if seed < 0:
        raise EngineError(f"seed: must be 0 or more, got {seed}; choose another seed")
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Pipeline:
    """Draws pictures with one engine. Keeps the rows of the last prompts, and those of the empty prompt, computed."""

    def __init__(self, engine: Engine, *, cached_prompts: int = 16) -> None:
        self.engine = engine
        self.manifest = engine.manifest
        self.tokenizer = Tokenizer(engine.bundle / TOKENIZER, self.manifest.text)
        self.schedule = schedule_from_config(self.manifest.scheduler)
        self._triggers = tuple(self.tokenizer.token_ids(trigger) for trigger in self.manifest.checkpoint.trigger)
        self._cached_prompts = cached_prompts
        self._cache: OrderedDict[str, PromptRows] = OrderedDict()
        self._empty: PromptRows | None = None

    def rows(self, prompt: str) -> PromptRows:
        """The prompt's rows, from the cache when it was among the last ones asked for.

        Logs a warning with the text that did not fit; raises PromptError when that text holds the trigger.
        """
        if prompt == "":
            self._empty = self._empty or self.rows_of_ids(self.tokenizer.encode("").ids)
            return self._empty
        if prompt not in self._cache:
            encoded = self.tokenizer.encode(prompt)
            self._check_cut(encoded)
            self._cache[prompt] = self.rows_of_ids(encoded.ids, cut=encoded.cut)
            while len(self._cache) > self._cached_prompts:
                self._cache.popitem(last=False)
        rows = self._cache[prompt]
        self._cache.move_to_end(prompt)
        if rows.cut:
            logger.warning("prompt: only %d tokens fit; cut: %r", self.manifest.text.length, rows.cut)
        return rows

    def rows_of_ids(self, ids: Ids, *, cut: str = "", text_embeds: Array | None = None) -> PromptRows:
        """Token ids (77,) -> rows. `text_embeds` (1,77,C): given embeddings in place of the text encoder's."""
        rows = self.manifest.rows
        positions = kept_positions(ids, rows.kept, self.manifest.text.eos_id) if rows.form == "split" else ()
        embeds = self.engine.encode(ids[None]) if text_embeds is None else text_embeds
        made = self.engine.text_rows(embeds, kept_index(positions, rows.kept.slots)[None])
        made["row_index"] = row_index(positions, self.manifest.text.length)[None]
        conditioning = {name: made[name] for name in UNET_INPUTS[rows.form]}
        return PromptRows(conditioning=conditioning, kept=positions, text_embeds=embeds, cut=cut)

    def _check_cut(self, encoded: Encoded) -> None:
        """Refuse a prompt whose trigger was cut; one that also stands whole in what fits is fine."""
        kept = encoded.tokens[: encoded.n_words]
        limit = self.manifest.text.length
        for trigger, ids in zip(self.manifest.checkpoint.trigger, self._triggers, strict=True):
            if find_sequence(encoded.tokens, ids) and not find_sequence(kept, ids):
                raise PromptError(
                    f"prompt: its trigger {trigger!r} must be within the first {limit} tokens, got it in what is cut "
                    f"({encoded.cut!r}); shorten the prompt or put the trigger earlier"
                )

    def denoise(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        noise: Array | None = None,
    ) -> Iterator[Step]:
        """Draw latents step by step; stop early by not asking for more. None = what the bundle's manifest says.

        Everything is checked before the first step. `noise`: (4,h,w) start noise in place of the seed's.
        """
        n_steps = self.manifest.steps if steps is None else steps
        scale = _checked_guidance(self.manifest.guidance if guidance is None else guidance)
        start = start_noise(seed, self._latent_shape(width, height)) if noise is None else noise
        schedule_steps = timesteps(self.schedule, n_steps)
        positive = self.rows(prompt)
        negative = self.rows(negative_prompt) if scale != 1.0 else None
        return self._loop(schedule_steps, positive, negative, scale, start)

    def _loop(
        self,
        steps: npt.NDArray[np.int64],
        positive: PromptRows,
        negative: PromptRows | None,
        guidance: float,
        noise: Array,
    ) -> Iterator[Step]:
        halves = [positive] if negative is None else [negative, positive]
        denoiser = self.engine.denoiser(_batch(halves), *noise.shape[1:])
        x = noise
        for index, t in enumerate(int(step) for step in steps):
            predictions = denoiser(np.broadcast_to(x, (len(halves), *x.shape)), float(t))
            if not np.isfinite(predictions).all():
                raise EngineError(
                    f"noise_pred: must be finite, got NaN or Inf at step {index + 1} of {len(steps)}; "
                    f"run 'personalq verify {self.manifest.checkpoint.id}'"
                )
            x_0, eps = predict(self.schedule, t, x, guide(predictions, guidance))
            x = ddim_step(self.schedule, len(steps), t, x_0, eps)
            yield Step(index=index, n_steps=len(steps), timestep=t, latents=x, predicted=x_0)

    def decode(self, latents: Array) -> Image:
        """latents (4,h,w) float32 -> picture (H,W,3) uint8."""
        latent = self.manifest.latent
        scaled = latents[None] / np.float32(latent.scaling_factor) + np.float32(latent.shift_factor)
        return to_uint8(self.engine.decode(scaled)[0])

    def image(self, prompt: str, **settings: Any) -> Image:
        """Draw and decode one picture; settings as for `denoise`."""
        latents = [step.latents for step in self.denoise(prompt, **settings)][-1]
        return self.decode(latents)

    def _latent_shape(self, width: int | None, height: int | None) -> tuple[int, int, int]:
        latent = self.manifest.latent
        sides = {"height": (height, latent.height), "width": (width, latent.width)}
        for name, (asked, _) in sides.items():
            if asked is not None and (asked <= 0 or asked % latent.scale):
                raise EngineError(f"{name}: must be a multiple of {latent.scale}, got {asked}; choose another size")
        h, w = (default if asked is None else asked // latent.scale for asked, default in sides.values())
        return (latent.channels, h, w)


def guide(predictions: Array, guidance: float) -> Array:
    """(1|2,4,h,w) -> (4,h,w): uncond + guidance * (cond - uncond) (Classifier-Free Diffusion Guidance, eq. 6)."""
    if len(predictions) == 1:
        return np.asarray(predictions[0], dtype=np.float32)
    unconditional, conditional = predictions
    return np.asarray(unconditional + np.float32(guidance) * (conditional - unconditional), dtype=np.float32)


def to_uint8(image: Array) -> Image:
    """(3,H,W) in -1..1 -> (H,W,3) uint8, rounded as diffusers rounds."""
    pixels = np.rint((image.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255)
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def _batch(halves: list[PromptRows]) -> Conditioning:
    return {name: np.concatenate([half.conditioning[name] for half in halves]) for name in halves[0].conditioning}


def _checked_guidance(guidance: float) -> float:
    if not (math.isfinite(guidance) and guidance >= 1):
        raise EngineError(f"guidance: must be 1 (none) or more, got {guidance}; 4 to 8 is usual")
    return float(guidance)
