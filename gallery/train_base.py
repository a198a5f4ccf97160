"""Train the text encoder and UNet of the base jointly on the world's captions, over the frozen VAE."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from calibration.model.precision import autocast

from .record import BASE, WORK, readable, record_stage
from .tokens import build_tokenizer, save_tokenizer
from .train_vae import set_lr, to_tensor
from .workers import Clock, average_, run_workers
from .world import captioned_scene

LR, FLOOR, BATCH, PERIOD, CAPTIONS_LEFT_OUT = 1e-3, 3e-5, 16, 4.0, 0.1
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "num_train_timesteps": 1000,
}


def build_unet() -> UNet2DConditionModel:
    """Cross-attention at 16x16, 8x8, 4x4 and in the middle; every channel count a multiple of 16."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 4),
    )


def build_text_encoder() -> CLIPTextModel:
    """A causal CLIP text model, 77 tokens, hidden size 128."""
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=128,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def scheduler() -> DDIMScheduler:
    """The base's sampler, as its scheduler_config.json says."""
    return DDIMScheduler(**SCHEDULE)


def token_ids(captions: list[str], tokenizer: object) -> torch.Tensor:
    """(N, 77) ids, padded as the pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def v_loss(
    unet: nn.Module, z: torch.Tensor, text: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """v-prediction MSE with weight min(snr + 1, 6) / (snr + 1), which keeps the terminal step. z: (N, 4, 16, 16)."""
    a = alphas[t].view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
    snr_1 = 1 / (1 - a).clamp(min=1e-4)
    with autocast(z.device.type):
        guess = unet(x_t, t, text).sample.float()
    return ((guess - v).square() * (snr_1.clamp(max=6) / snr_1)).mean()


def encode_world(vae: AutoencoderKL, n: int, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Render n captioned scenes; return their latent mean and std in one fp16 (n, 8, 16, 16) and their ids (n, 77)."""
    rng, tokenizer, latents, ids = np.random.default_rng(seed), build_tokenizer(), [], []
    for _ in range(0, n, 32):
        pictures, captions = zip(*(captioned_scene(rng) for _ in range(32)), strict=True)
        with torch.no_grad(), autocast(device):
            latent = vae.encode(to_tensor(list(pictures), device)).latent_dist
        latents.append(torch.cat([latent.mean, latent.std], 1).half().cpu())
        ids.append(token_ids(list(captions), tokenizer).short())
    return torch.cat(latents), torch.cat(ids)


def draw_latents(rows: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Sample scaled latents (N, 4, 16, 16) from stored mean and std."""
    mean, std = rows.float().chunk(2, 1)
    return (mean + std * torch.randn_like(mean)) * vae.config.scaling_factor


class Trainer:
    """One worker's models, optimiser, data and moving average."""

    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        torch.manual_seed(options.seed)  # the same start in every worker
        self.unet, self.text = build_unet().to(self.device), build_text_encoder().to(self.device)
        self.unet.set_attn_processor(AttnProcessor())  # on CPU its backward is 1.4 times as fast as the fused one
        self.params = [*self.unet.parameters(), *self.text.parameters()]
        self.ema = [p.detach().clone() for p in self.params]
        home = options.start_from or options.work_dir
        self.vae = AutoencoderKL.from_pretrained(home / "vae").to(self.device).eval()
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, betas=(0.9, 0.99), weight_decay=1e-3)
        self.alphas = scheduler().alphas_cumprod.to(self.device)
        self.empty = token_ids([""], build_tokenizer())[0]
        self.done, self.steps, self.losses = 0.0, 0, []
        if options.start_from:
            self.start_from(options.start_from)
        if options.resume and self.state_file.exists():
            self.restore()
        torch.manual_seed(options.seed * 1000 + rank + 17 * int(self.done))

    @property
    def state_file(self) -> Path:
        return Path(self.options.work_dir) / "base.pt"

    def start_from(self, base: Path) -> None:
        """Begin with a published base's weights: how a clone goes on where the shipped training stopped."""
        unet, text = (
            UNet2DConditionModel.from_pretrained(base / "unet"),
            CLIPTextModel.from_pretrained(base / "text_encoder"),
        )
        for target in (self.params, self.ema):
            for p, value in zip(target, [*unet.parameters(), *text.parameters()], strict=True):
                p.data.copy_(value.data)

    def restore(self) -> None:
        """Continue from the last checkpoint (Adam state starts afresh)."""
        state = torch.load(self.state_file, weights_only=True)
        for target, source in ((self.params, state["weights"]), (self.ema, state["ema"])):
            for p, value in zip(target, source, strict=True):
                p.data.copy_(value)
        self.done, self.steps = state["seconds"], state["steps"]

    def step(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        """One step: every caption twice, at t and t + 500."""
        pick = torch.randint(len(data[0]), (BATCH,))
        ids = data[1][pick].long()
        ids[torch.rand(BATCH) < CAPTIONS_LEFT_OUT] = self.empty
        z = draw_latents(data[0][pick].to(self.device), self.vae).repeat(2, 1, 1, 1)
        t = torch.randint(0, 1000, (BATCH,), device=self.device)
        with autocast(self.device):
            text = self.text(ids.to(self.device)).last_hidden_state.repeat(2, 1, 1)
        loss = v_loss(self.unet, z, text, torch.cat([t, (t + 500) % 1000]), torch.randn_like(z), self.alphas)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def follow(self, decay: float) -> None:
        """Move the average towards the weights."""
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)

    def save(self, seconds: float) -> None:
        """Checkpoint for --resume."""
        beside = self.state_file.with_suffix(".tmp")
        weights = [p.detach() for p in self.params]
        torch.save({"weights": weights, "ema": self.ema, "seconds": seconds, "steps": self.steps}, beside)
        beside.replace(self.state_file)

    def publish(self, folder: Path) -> None:
        """Write the averaged weights as a diffusers folder in fp16."""
        unet, text = copy.deepcopy(self.unet), copy.deepcopy(self.text)
        for p, value in zip([*unet.parameters(), *text.parameters()], self.ema, strict=True):
            p.data.copy_(value)
        pipe = StableDiffusionPipeline(
            vae=copy.deepcopy(self.vae),
            text_encoder=text,
            tokenizer=build_tokenizer(),
            unet=unet,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.to(torch.float16).save_pretrained(folder)
        save_tokenizer(folder / "tokenizer")
        readable(folder)


def worker(rank: int, world: int, options: argparse.Namespace) -> None:
    """Render this worker's share, then train until the clock ends; rank 0 saves and publishes."""
    trainer, begin = Trainer(rank, options), time.monotonic()
    data = encode_world(
        trainer.vae, options.pictures // world, options.seed * 1000 + rank + 10 * int(trainer.done), options.device
    )
    render_seconds = time.monotonic() - begin
    print(
        f"rank {rank}: {len(data[0])} latents in {render_seconds:.0f}s, "
        f"std {float(draw_latents(data[0][:512], trainer.vae).std()):.3f}",
        flush=True,
    )
    average_(trainer.params, 1)  # meet, and start the clock together
    clock, local, since, last = Clock(options.seconds, PERIOD, trainer.done), 0, 0, 0.0
    snapshots = sorted(s for s in options.snapshots if s > trainer.done)
    while not clock.finished():
        set_lr(
            trainer.optimizer,
            min(1.0, (local + 1) / 60)
            * (FLOOR + (options.lr - FLOOR) * 0.5 * (1 + math.cos(math.pi * clock.progress()))),
        )
        trainer.step(data)
        local, since = local + 1, since + 1
        if not clock.due():
            continue
        clock.syncs += 1
        trainer.steps, since = trainer.steps + average_(trainer.params, since), 0
        trainer.follow(min(0.96, clock.spent() / (clock.spent() + 40)))
        if rank == 0 and clock.spent() - last > 30:
            last = clock.spent()
            recent = trainer.losses[-300:]
            print(f"{last:.0f}s steps {trainer.steps} loss {sum(recent) / len(recent):.4f}", flush=True)
            trainer.save(last)
        if rank == 0 and snapshots and clock.spent() >= snapshots[0]:
            trainer.publish(options.work_dir / f"snapshot-{snapshots.pop(0)}")
    if rank == 0:
        finish(trainer, options, clock.spent(), render_seconds)


def finish(trainer: Trainer, options: argparse.Namespace, seconds: float, render_seconds: float) -> None:
    """Save, publish and record."""
    trainer.save(seconds)
    trainer.publish(options.out)
    facts = {
        "seconds": round(seconds),
        "render_seconds": round(render_seconds),
        "pictures": options.pictures,
        "steps": trainer.steps,
        "samples": trainer.steps * 2 * BATCH,
        "seed": options.seed,
        "workers": options.workers,
        "final_loss": round(float(np.mean(trainer.losses[-500:])), 4),
        "unet_parameters": sum(p.numel() for p in trainer.unet.parameters()),
    }
    record_stage("base", facts)
    print("base", json.dumps(facts), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1750)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--pictures", type=int, default=28000)
    parser.add_argument("--snapshots", type=int, nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the work folder's last checkpoint")
    parser.add_argument(
        "--start-from", type=Path, help="begin with a published base, e.g. gallery/repository/bases/toyworld"
    )
    parser.add_argument("--work-dir", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=BASE)
    options = parser.parse_args()
    run_workers(worker, options.workers, options.work_dir, options)


if __name__ == "__main__":
    main()
