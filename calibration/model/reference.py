"""Goldens: what the FP32 torch pipeline computes with the checkpoint's weights. The gate compares with these."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from personalq.cards.card import Card, is_style
from personalq.errors import RepositoryError
from personalq.goldens import POOLED, VERSION
from personalq.repository.atomic import write_atomic
from personalq.scheduler import BaseScheduler
from personalq.weights.header import read_header

from ..blob import same_bytes
from ..prompts import plain_examples, subject_of
from .conditioning import Pipe, encode
from .outputs import sampled_outputs
from .pipeline import own_scheduler, packed_rows

TIMESTEPS = (999, 799, 599, 399, 199, 39)


def start_noise(pipe: Pipe, seed: int) -> npt.NDArray[np.float32]:
    """(4,h,w) float32 start latents of a seed, as the runtime draws them."""
    side = pipe.unet.config.sample_size
    return np.random.default_rng(seed).standard_normal((pipe.unet.config.in_channels, side, side)).astype(np.float32)


def golden_prompts(card: Card) -> list[str]:
    """The empty prompt, then two prompts with the trigger: the card's own examples where it has them."""
    subject = subject_of(card)
    frames = (
        ("a dog {} in the style of {}", "a house {} in the style of {}")
        if is_style(card)
        else ("a photo of {1} {0}",) * 2
    )
    made = [frame.format(scene, subject) for frame, scene in zip(frames, ("on the beach", "in the snow"), strict=True)]
    examples = [p for p in plain_examples(card) if any(group and group in p for group in card.trigger)]
    return ["", *dict.fromkeys([*examples[:2], *made])][:3]


def metadata_of(path: Path) -> Mapping[str, str]:
    """What goldens say of themselves; nothing when there are none that can be read."""
    try:
        return read_header(path).metadata
    except RepositoryError:
        return {}


def is_current(path: Path, checkpoint_sha256: str, scheduler: BaseScheduler) -> bool:
    """True when `path` holds goldens of this format, of these weights and of this scheduler."""
    metadata = metadata_of(path)
    wanted = {"version": VERSION, "checkpoint_sha256": checkpoint_sha256, "scheduler_sha256": scheduler.sha256()}
    return all(metadata.get(name) == value for name, value in wanted.items())


def write_reference(
    pipe: Pipe,
    prompts: list[str],
    path: Path,
    *,
    scheduler: BaseScheduler,
    steps: int,
    guidance: float,
    checkpoint_sha256: str,
    checked_against: str,
) -> None:
    """Run every part of the pipeline in FP32 and write inputs and outputs to `path` (safetensors, atomically).

    prompts: no prompt, then at least two, see golden_prompts.

    Pictures are drawn as the base's scheduler draws; single steps are DDIM's, which remembers nothing.
    """
    ids, told = encode(pipe, prompts)
    generator = np.random.default_rng(7)
    side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    sample = generator.standard_normal((len(TIMESTEPS), channels, side, side)).astype(np.float32)
    prompt = np.array([1 + i % (len(prompts) - 1) for i in range(len(TIMESTEPS))], np.int64)
    noise = np.stack([start_noise(pipe, seed) for seed in range(2)])
    with torch.no_grad():
        rows = packed_rows(pipe.unet, told.text)
        inputs = [
            (torch.from_numpy(sample[i : i + 1]), t, told.at([p]))
            for (i, t), p in zip(enumerate(TIMESTEPS), prompt, strict=True)
        ]
        seen = sampled_outputs(pipe.unet, inputs)
        with drawing_as(pipe, scheduler) as sampler:
            latents = [_image_latents(pipe, prompts[1 + i], noise[i : i + 1], steps, guidance) for i in range(2)]
        latent = torch.cat(latents) / pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(latent).sample
    images = ((decoded.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    tensors = {
        "ids": ids.numpy(),
        "text_embeds": told.text.numpy(),
        **({POOLED: told.pooled.numpy()} if told.pooled.numel() else {}),
        "rows": rows.numpy(),
        "sample": sample,
        "timestep": np.array(TIMESTEPS, np.float32),
        "prompt": prompt,
        "noise_pred": seen.noise_pred,
        **_steps_taken(pipe, sample, seen.noise_pred, steps),
        "attention": seen.attention,
        "layers": seen.layers,
        "blocks": seen.blocks,
        "latent": latent.numpy(),
        "decoded": decoded.numpy(),
        "image_prompt": np.array([1, 2], np.int64),
        "start_noise": noise,
        "images": images.numpy(),
    }
    metadata = {
        "version": VERSION,
        "checkpoint_sha256": checkpoint_sha256,
        "checked_against": checked_against,
        "scheduler_sha256": scheduler.sha256(),
        "sampler": sampler,
        "prompts": json.dumps(prompts),
        "steps": str(steps),
        "guidance": str(guidance),
        "layers": json.dumps(seen.layer_sizes),
        "blocks": json.dumps(seen.block_sizes),
    }
    write_atomic(path, same_bytes(tensors, metadata))


@contextmanager
def drawing_as(pipe: Pipe, scheduler: BaseScheduler) -> Iterator[str]:
    """The pipeline with the base's own scheduler in place of DDIM, and the sampler that it is."""
    ddim = pipe.scheduler
    sampler, pipe.scheduler = own_scheduler(scheduler)
    try:
        yield sampler
    finally:
        pipe.scheduler = ddim


def _steps_taken(
    pipe: Pipe, sample: npt.NDArray[np.float32], noise_pred: npt.NDArray[np.float32], steps: int
) -> dict[str, npt.NDArray[np.generic]]:
    """next_step (N,): a step of the schedule near each golden time; next_sample (N,4,h,w): where it leads from a sample."""
    pipe.scheduler.set_timesteps(steps)
    times = pipe.scheduler.timesteps
    chosen = [int((times - t).abs().argmin()) for t in TIMESTEPS]
    made = [
        pipe.scheduler.step(torch.from_numpy(pred), times[i], torch.from_numpy(x)).prev_sample.numpy()
        for pred, i, x in zip(noise_pred, chosen, sample, strict=True)
    ]
    return {"next_step": np.array(chosen, np.int64), "next_sample": np.stack(made)}


def _image_latents(
    pipe: Pipe, prompt: str, noise: npt.NDArray[np.float32], steps: int, guidance: float
) -> torch.Tensor:
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise),
        output_type="latent",
    ).images
