"""Prompt to picture: rows once per prompt, classifier-free guidance in one batch, the loop as a generator of steps.

It knows pictures, seeds and latents; prompts are read in prompter, engines are behind their protocol, noise schedules in
sampling.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from personalq.errors import EngineError
from personalq.prompts import Prompt
from personalq.rows import Ids

from ..engines.engine import Array, Conditioning, Denoiser, Engine, TextEmbeds
from .attaching import Chosen, Wearing
from .image import Image
from .prompter import Prompter, PromptRows
from .samplers import Plan, Trail, plan_steps, predict, sampler_named
from .schedule import schedule_from_config


@dataclass(frozen=True)
class Settings:
    """How to draw; pictures of one batch share it. None: what the bundle recommends; of samplers, the base's own."""

    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None


@dataclass(frozen=True)
class Picture:
    """What to draw. noise: (4,h,w) float32 start noise in place of the seed's. A prompt that is a Prompt was read before."""

    prompt: str | Prompt
    negative_prompt: str | Prompt = ""
    seed: int = 0
    noise: Array | None = None


@dataclass(frozen=True)
class Step:
    """One step of denoising, done. latents: (N,4,h,w) float32 after it; predicted: the clean latents it aims at."""

    index: int
    n_steps: int
    timestep: float
    latents: Array
    predicted: Array


def start_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 noise of `shape`, (4,h,w); the same seed gives the same noise on every machine."""
    if seed < 0:
        raise EngineError(f"seed: must be 0 or more, got {seed}; choose another seed")
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Pipeline:
    """Draws pictures with one engine. Caches the rows of the last prompts, and those of the empty prompt."""

    def __init__(
        self,
        engine: Engine,
        adapters: Sequence[Chosen] = (),
        *,
        on_any_base: bool = False,
        cached_prompts: int = 16,
    ) -> None:
        """adapters: attached to a base's engine; the first one says how is drawn. on_any_base: also those made for other weights.

        Raises EngineError for adapters that do not fit the engine, or each other.
        """
        self.engine = engine
        self.wearing = Wearing(engine.manifest, engine.bundle, adapters, on_any_base=on_any_base)
        self.manifest = self.wearing.manifest
        self.prompts = Prompter(engine, self.wearing, cached_prompts)
        self.tokenizer, self.second_tokenizer = self.prompts.tokenizer, self.prompts.second_tokenizer
        self.schedule = schedule_from_config(self.manifest.scheduler)

    def rows(self, prompt: str | Prompt) -> PromptRows:
        """The prompt's rows, from the cache when it was among the last ones asked for.

        Logs what is not used of it; raises PromptError when it cannot be drawn, or its trigger did not fit.
        """
        return self.prompts.rows(prompt)

    def warnings(self, picture: Picture) -> tuple[str, ...]:
        """What will not be used of a picture's prompts, or not as written elsewhere: a line each. Encodes nothing.

        Raises PromptError when one cannot be drawn.
        """
        asked = {"prompt": picture.prompt, "negative_prompt": picture.negative_prompt}
        told = [f"{name}: {text}" for name, prompt in asked.items() for text in self.prompts.read(prompt).warnings]
        return (*self.wearing.warnings, *told)

    def embed(self, texts: Sequence[str]) -> TextEmbeds:
        """Texts as they stand, brackets and all -> their embeddings, one chunk each."""
        return self.prompts.embed(texts)

    def token_ids(self, texts: Sequence[str]) -> tuple[Ids, Ids | None]:
        """Texts as they stand -> ids (B,77) of the first tokenizer, and of SDXL's second one."""
        return self.prompts.token_ids(texts)

    def rows_of_ids(self, ids: Ids, *, embeds: TextEmbeds) -> PromptRows:
        """Token ids (77,) and their embeddings (a batch of one) -> rows."""
        return self.prompts.rows_of_ids(ids, embeds=embeds)

    def denoise(self, pictures: Sequence[Picture], settings: Settings | None = None) -> Iterator[Step]:
        """Draw the latents of a batch step by step; stop early by not asking for more.

        Everything is checked before the first step. A picture does not depend on the others of its batch (the kernels'
        rounding may): those with longer prompts run beside it, not with it.
        """
        settings = settings or Settings()
        name = self.schedule.sampler if settings.sampler is None else settings.sampler
        sampler = sampler_named(name)
        plan = plan_steps(name, self.schedule, self.manifest.steps if settings.steps is None else settings.steps)
        guidance = _checked_guidance(self.manifest.guidance if settings.guidance is None else settings.guidance)
        shape = self._latent_shape(settings.width, settings.height)
        noises = [_Noise(picture, shape) for picture in pictures]
        halves = [half for picture in pictures for half in self._halves(picture, is_guided=guidance != 1.0)]
        clip = self.schedule.clip if sampler.clips else math.inf
        return self._loop(_Run(name, plan, guidance, clip), halves, noises)

    def _halves(self, picture: Picture, *, is_guided: bool) -> list[PromptRows]:
        """The rows of a picture's prompts, negative one first, equally many."""
        prompts = [picture.negative_prompt, picture.prompt] if is_guided else [picture.prompt]
        found = [self.rows(prompt) for prompt in prompts]
        most = max(rows.n_rows for rows in found)
        return [self.prompts.lengthened(prompt, rows, most) for prompt, rows in zip(prompts, found, strict=True)]

    def _loop(self, run: "_Run", halves: list[PromptRows], noises: list["_Noise"]) -> Iterator[Step]:
        sampler, plan, trail, n = sampler_named(run.sampler), run.plan, Trail(), len(noises)
        x = np.stack([noise.start for noise in noises]) * np.float32(plan.start_scale)
        still = np.zeros_like(x)
        denoiser = self._denoiser(halves, *x.shape[2:])
        for i, t in enumerate(plan.times):
            predictions = denoiser(np.repeat(x, len(halves) // n, axis=0), float(t))
            if not np.isfinite(predictions).all():
                raise EngineError(
                    f"noise_pred: must be finite, got NaN or Inf at step {i + 1} of {len(plan)}; "
                    f"run 'personalq verify {self.manifest.checkpoint.id}'"
                )
            said = predict(self.schedule, plan, i, x, guide(predictions, n, run.guidance), run.clip)
            fresh = np.stack([noise.draw() for noise in noises]) if sampler.is_noisy else still
            x = sampler.step(self.schedule, plan, i, x, said, fresh, trail)
            yield Step(index=i, n_steps=len(plan), timestep=float(t), latents=x, predicted=said[0])

    def _denoiser(self, halves: list[PromptRows], height: int, width: int) -> Denoiser:
        """The UNet for a batch of prompts, those of one length at a time."""
        groups = [[i for i, half in enumerate(halves) if half.n_rows == n] for n in sorted({h.n_rows for h in halves})]
        attached = self.wearing.attached
        bound = [
            (group, self.engine.denoiser(_batch([halves[i] for i in group]), height, width, attached))
            for group in groups
        ]
        if len(bound) == 1:
            return bound[0][1]

        def denoise(sample: Array, timestep: float) -> Array:
            predictions = np.empty_like(sample)
            for group, denoiser in bound:
                predictions[group] = denoiser(sample[group], timestep)
            return predictions

        return denoise

    def decode(self, latents: Array) -> Image:
        """latents (4,h,w) float32 -> picture (H,W,3) uint8."""
        latent = self.manifest.latent
        scaled = latents[None] / np.float32(latent.scaling_factor) + np.float32(latent.shift_factor)
        return to_uint8(self.engine.decode(scaled)[0])

    def image(self, prompt: str | Prompt, **options: Any) -> Image:
        """Draw and decode one picture; options are fields of Picture and of Settings, by name."""
        asked = {field.name for field in fields(Settings)} & options.keys()
        settings = Settings(**{name: options.pop(name) for name in asked})
        latents = [step.latents for step in self.denoise([Picture(prompt, **options)], settings)][-1]
        return self.decode(latents[0])

    def _latent_shape(self, width: int | None, height: int | None) -> tuple[int, int, int]:
        latent = self.manifest.latent
        sides = {"height": (height, latent.height), "width": (width, latent.width)}
        for name, (asked, _) in sides.items():
            if asked is not None and (asked <= 0 or asked % latent.scale):
                nearest = nearest_sides(asked, latent.scale)
                raise EngineError(f"{name}: must be a multiple of {latent.scale}, got {asked}; nearest: {nearest}")
        h, w = (default if asked is None else asked // latent.scale for asked, default in sides.values())
        return (latent.channels, h, w)


def nearest_sides(asked: int, scale: int) -> str:
    """The sides in pixels next to one that does not fit: '512 or 520'."""
    below = asked // scale * scale
    return " or ".join(str(side) for side in (below, below + scale) if side > 0) or str(scale)


def guide(predictions: Array, n: int, guidance: float) -> Array:
    """(n|2n,4,h,w), pairs side by side -> (n,4,h,w): uncond + guidance * (cond - uncond).

    Classifier-Free Diffusion Guidance, eq. 6.
    """
    if len(predictions) == n:
        return np.asarray(predictions, dtype=np.float32)
    unconditional, conditional = predictions[0::2], predictions[1::2]
    return np.asarray(unconditional + np.float32(guidance) * (conditional - unconditional), dtype=np.float32)


def to_uint8(image: Array) -> Image:
    """(3,H,W) in -1..1 -> (H,W,3) uint8, rounded as diffusers rounds."""
    pixels = np.rint((image.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255)
    return np.ascontiguousarray(pixels, dtype=np.uint8)


@dataclass(frozen=True)
class _Run:
    """The decisions for one batch, made before its first step."""

    sampler: str
    plan: Plan
    guidance: float
    clip: float


class _Noise:
    """One picture's noise: the first draw of its seed is where it starts, later ones are what ancestral steps add."""

    def __init__(self, picture: Picture, shape: tuple[int, ...]) -> None:
        seeded = start_noise(picture.seed, shape)  # checks the seed, also where the noise is given
        self.start = seeded if picture.noise is None else picture.noise
        self._shape = self.start.shape
        self._generator = np.random.default_rng(picture.seed)
        self._generator.standard_normal(shape)

    def draw(self) -> Array:
        return self._generator.standard_normal(self._shape).astype(np.float32)


def _batch(halves: list[PromptRows]) -> Conditioning:
    return {name: np.concatenate([half.conditioning[name] for half in halves]) for name in halves[0].conditioning}


def _checked_guidance(guidance: float) -> float:
    if not (math.isfinite(guidance) and guidance >= 1):
        raise EngineError(f"guidance: must be 1 (none) or more, got {guidance}; 4 to 8 is usual")
    return float(guidance)
