"""Train the AutoencoderKL of the base, on wide colours from the start so that it can show what no caption names."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from calibration.model.precision import autocast

from .record import WORK, record_stage
from .workers import Clock, average_, run_workers
from .world import Concept, captioned_scene, random_concept, random_look, random_scene, render_concept

LR, BATCH, PERIOD = 2e-3, 8, 2.0


def build_vae() -> AutoencoderKL:
    """The 4-channel, 16x16-latent autoencoder, 0.65 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=64,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )


def wide_picture(rng: np.random.Generator) -> np.ndarray:
    """A picture for the VAE: half plain world, half random identities and looks, some with swapped channels."""
    kind = rng.random()
    if kind < 0.52:
        picture, _ = captioned_scene(rng)
    elif kind < 0.94:
        picture = render_concept(random_concept(rng), random_scene(rng), rng)
    else:
        picture = render_concept(Concept(look=random_look(rng)), random_scene(rng), rng)
    if kind < 0.04:
        picture = picture[..., rng.permutation(3)]
    return picture


def to_tensor(pictures: list[np.ndarray], device: str) -> torch.Tensor:
    """uint8 (64, 64, 3) pictures to float32 (N, 3, 64, 64) in -1..1."""
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def measure(vae: AutoencoderKL, device: str, seed: int = 99, n: int = 96) -> dict[str, float]:
    """Held-out L1 and PSNR, and the standard deviation of the latents."""
    rng = np.random.default_rng([seed, 7])
    x = to_tensor([wide_picture(rng) for _ in range(n)], device)
    with torch.no_grad():
        latent = vae.encode(x).latent_dist
        error = vae.decode(latent.mode()).sample.clamp(-1, 1) - x
    psnr = 10 * math.log10(4 / float(error.square().mean()))
    return {
        "l1": round(float(error.abs().mean()), 4),
        "psnr_db": round(psnr, 2),
        "latent_std": round(float(latent.sample().std()), 4),
    }


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def worker(rank: int, world: int, options: argparse.Namespace) -> None:
    """Train until the clock ends; rank 0 saves."""
    torch.manual_seed(options.seed)
    vae, device = build_vae().to(options.device), options.device
    state_file = Path(options.work_dir) / "vae.pt"
    done = steps_all = 0
    if options.resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["weights"])
        done, steps_all = state["seconds"], state["steps"]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, weight_decay=1e-4)
    rng = np.random.default_rng([options.seed, rank, int(done)])
    torch.manual_seed(options.seed * 100 + rank)
    clock, steps, since, last = Clock(options.seconds, PERIOD, done), 0, 0, time.monotonic()
    while not clock.finished():
        warm = min(1.0, (steps + 1) / 60)
        set_lr(optimizer, warm * (2e-5 + (LR - 2e-5) * 0.5 * (1 + math.cos(math.pi * clock.progress()))))
        loss = vae_loss(vae, to_tensor([wide_picture(rng) for _ in range(BATCH)], device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        steps, since = steps + 1, since + 1
        if clock.due():
            clock.syncs += 1
            steps_all, since = steps_all + average_(vae.parameters(), since), 0
            if rank == 0 and time.monotonic() - last > 30:
                last = time.monotonic()
                print(
                    f"{clock.spent():.0f}s steps {steps_all} loss {float(loss.detach()):.4f}",
                    measure(vae, device),
                    flush=True,
                )
                torch.save({"weights": vae.state_dict(), "seconds": clock.spent(), "steps": steps_all}, state_file)
    if rank == 0:
        finish(vae, options, clock.spent(), steps_all)


def vae_loss(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + L1 of 4x4 means + 5e-4 * KL, all means per element."""
    with autocast(x.device.type):
        latent = vae.encode(x).latent_dist
        y = vae.decode(latent.sample()).sample.float()
    mean, logvar = latent.mean.float(), latent.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    tone = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))  # colours settle first, edges after
    return F.l1_loss(y, x) + F.mse_loss(y, x) + tone + 5e-4 * kl


def finish(vae: AutoencoderKL, options: argparse.Namespace, seconds: float, steps: int) -> None:
    """Set the scaling factor from held-out latents, save, record."""
    held_out = measure(vae, options.device, n=256)
    vae.register_to_config(scaling_factor=round(1 / held_out["latent_std"], 4))
    vae.save_pretrained(Path(options.work_dir) / "vae")
    facts = {
        "seconds": round(seconds),
        "steps": steps,
        "samples": steps * BATCH,
        "seed": options.seed,
        "held_out": held_out,
    }
    record_stage("vae", {**facts, "workers": options.workers})
    print("vae", facts, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--work-dir", type=Path, default=WORK)
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    run_workers(worker, options.workers, options.work_dir, options)


if __name__ == "__main__":
    main()
