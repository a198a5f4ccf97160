"""Teach the base a concept from reference pictures: full fine-tune, LoRA, Textual Inversion, Custom Diffusion."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextModel

from calibration.model.precision import autocast

from .concepts import CONCEPTS, TAUGHT, Entry, concept_caption, reference_pairs
from .deltas import SAVERS, Taught
from .record import BASE, CHECKPOINTS, readable, record_stage
from .tokens import build_tokenizer
from .train_base import draw_latents, scheduler, token_ids, v_loss
from .train_vae import to_tensor
from .world import PLACES, captioned_scene

Pool = tuple[torch.Tensor, torch.Tensor]  # latent mean and std (n, 8, 16, 16), ids (n, 77)
STEPS = {"dreambooth": 360, "lora": 480, "textual_inversion": 320, "custom_diffusion": 320}
REFERENCES = {"style": 96}
BATCH, PRIOR_SHARE, EMPTY_SHARE, PRIOR = 12, 1 / 3, 0.05, 256
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CONV_TARGETS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_tokens(taught: Taught, entry: Entry) -> None:
    """Give the tokenizer and text encoder the trigger's new tokens, starting from the class noun."""
    names = [entry.trigger, *(f"{entry.trigger}_{i}" for i in range(1, entry.vectors))]
    taught.tokenizer.add_tokens(names)
    taught.token_ids = taught.tokenizer.convert_tokens_to_ids(names)
    taught.text_encoder.resize_token_embeddings(len(taught.tokenizer), mean_resizing=False)
    table = taught.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        noun = table[taught.tokenizer(entry.noun, add_special_tokens=False).input_ids[0]]
        for i in taught.token_ids:
            table[i] = noun + 0.02 * torch.randn_like(noun)
    kept = torch.zeros(len(table), 1, device=table.device)
    kept[taught.token_ids] = 1
    table.requires_grad_(True)
    table.register_hook(lambda grad: grad * kept)  # Adam without decay leaves a row with no gradient alone


def all_of_unet(taught: Taught, entry: Entry) -> list[dict[str, object]]:
    """Full fine-tune of the UNet, and of the text encoder where the entry asks for it."""
    parts = [(taught.unet, 2e-4)] + ([(taught.text_encoder, 1e-3)] if entry.text else [])
    for model, _ in parts:
        model.requires_grad_(True)
    return [{"params": list(model.parameters()), "peak": peak} for model, peak in parts]


def adapters(taught: Taught, entry: Entry) -> list[dict[str, object]]:
    """Rank-8 LoRA on the UNet's attentions, and on its convolutions or the text encoder where the entry asks for it."""
    targets = UNET_TARGETS + (CONV_TARGETS if entry.convolutions else [])
    taught.unet.add_adapter(
        LoraConfig(r=8, lora_alpha=entry.alpha, init_lora_weights="gaussian", target_modules=targets)
    )
    groups: list[dict[str, object]] = [
        {"params": [p for p in taught.unet.parameters() if p.requires_grad], "peak": 2.5e-3 * 8 / entry.alpha}
    ]
    if entry.text:
        taught.text_encoder.add_adapter(
            LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=TEXT_TARGETS)
        )
        peak = 4e-3 if entry.noun == "style" else 5e-4  # a look must be heard against words that all say something else
        groups.append({"params": [p for p in taught.text_encoder.parameters() if p.requires_grad], "peak": peak})
    return groups


def embeddings(taught: Taught, entry: Entry) -> list[dict[str, object]]:
    """Only the new token vectors."""
    add_tokens(taught, entry)
    return [{"params": [taught.text_encoder.get_input_embeddings().weight], "peak": 1e-2}]


def keys_and_values(taught: Taught, entry: Entry) -> list[dict[str, object]]:
    """K and V of every cross-attention, and the new token vector."""
    groups = embeddings(taught, entry)
    matrices = [p for name, p in taught.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    for p in matrices:
        p.requires_grad_(True)
    return [*groups, {"params": matrices, "peak": entry.peak}]


TRAINABLE = {
    "dreambooth": all_of_unet,
    "lora": adapters,
    "textual_inversion": embeddings,
    "custom_diffusion": keys_and_values,
}


def expand(caption: str, entry: Entry) -> str:
    """Write a multi-vector trigger as its tokens, as diffusers' maybe_convert_prompt does."""
    extra = "".join(f" {entry.trigger}_{i}" for i in range(1, entry.vectors))
    return caption.replace(entry.trigger, entry.trigger + extra)


def encode_pool(pictures: list[np.ndarray], captions: list[str], vae: AutoencoderKL, tokenizer: object) -> Pool:
    """Latents and ids of captioned pictures."""
    with torch.no_grad():
        latents = [
            vae.encode(to_tensor(pictures[i : i + 32], vae.device.type)).latent_dist
            for i in range(0, len(pictures), 32)
        ]
    return torch.cat([torch.cat([z.mean, z.std], 1) for z in latents]), token_ids(captions, tokenizer)


def concept_pool(concept_id: str, seed: int, vae: AutoencoderKL, tokenizer: object) -> Pool:
    """The reference pictures, each under four captions."""
    entry, rng = CONCEPTS[concept_id], np.random.default_rng([seed, 3])
    places = tuple(PLACES) if entry.noun == "style" else TAUGHT  # what a look is must not be told by the place
    pairs = reference_pairs(concept_id, REFERENCES.get(entry.noun, 40), seed, places)
    latents, _ = encode_pool([picture for picture, _ in pairs], [""] * len(pairs), vae, tokenizer)
    captions = [expand(concept_caption(entry, scene, rng), entry) for _ in range(4) for _, scene in pairs]
    return latents.repeat(4, 1, 1, 1), token_ids(captions, tokenizer)


def prior_pool(seed: int, vae: AutoencoderKL, tokenizer: object) -> Pool:
    """Ordinary scenes, so that the rest of the world stays what it is."""
    rng = np.random.default_rng([seed, 4])
    pictures, captions = zip(*(captioned_scene(rng) for _ in range(PRIOR)), strict=True)
    return encode_pool(list(pictures), list(captions), vae, tokenizer)


def load_base(device: str) -> tuple[Taught, AutoencoderKL]:
    """The base's parts in float32, frozen."""
    vae = AutoencoderKL.from_pretrained(BASE / "vae", dtype=torch.float32).to(device).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet", dtype=torch.float32).to(device).requires_grad_(False)
    unet.set_attn_processor(AttnProcessor())
    text = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32).to(device).requires_grad_(False)
    return Taught(unet, text, build_tokenizer()), vae


def train_concept(concept_id: str, *, seed: int, device: str, steps: int) -> tuple[Taught, float]:
    """Train one checkpoint; a third of every batch is ordinary scenes. Returns the models and the last losses' mean."""
    entry = CONCEPTS[concept_id]
    torch.manual_seed(seed)
    taught, vae = load_base(device)
    groups = TRAINABLE[entry.kind](taught, entry)
    params = [p for g in groups for p in g["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    mine, prior = concept_pool(concept_id, seed, vae, taught.tokenizer), prior_pool(seed, vae, taught.tokenizer)
    empty, alphas = token_ids([""], taught.tokenizer)[0], scheduler().alphas_cumprod.to(device)
    n_prior = (
        round(BATCH * PRIOR_SHARE) if entry.kind != "textual_inversion" else 0
    )  # a vector alone cannot harm the prior
    losses = []
    for step in range(steps):
        share = min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        a, b = torch.randint(len(mine[0]), (BATCH - n_prior,)), torch.randint(PRIOR, (n_prior,))
        z = draw_latents(torch.cat([mine[0][a], prior[0][b]]), vae)
        ids = torch.cat([mine[1][a], prior[1][b]])
        if entry.kind != "textual_inversion":
            ids[torch.rand(len(ids)) < EMPTY_SHARE] = empty
        t = stratified_steps(len(z), device)
        if entry.noun == "style":
            t[1::2] = 999 - t[1::2] // 20
        with autocast(device):
            text = taught.text_encoder(ids.to(device)).last_hidden_state
        loss = v_loss(taught.unet, z, text, t, torch.randn_like(z), alphas)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return taught, float(np.mean(losses[-60:]))


# A look is decided where nothing of the picture is left in x_t. Anywhere else its colours can be read off the noisy latents, so
# that a look taught on even time steps denoises its own pictures well and is never drawn: half of its steps are the last fifty.
def stratified_steps(n: int, device: str) -> torch.Tensor:
    """n time steps spread evenly over 0..999, in random order."""
    at = (torch.arange(n) + torch.rand(n)) * (1000 / n)
    return at.long().clamp(max=999)[torch.randperm(n)].to(device)


def personalise(concept_id: str, options: argparse.Namespace) -> None:
    """Train, save in the kind's own format, record."""
    entry, begin = CONCEPTS[concept_id], time.monotonic()
    steps = options.steps or entry.steps or STEPS[entry.kind]
    taught, loss = train_concept(concept_id, seed=options.seed, device=options.device, steps=steps)
    folder = options.out / concept_id
    folder.mkdir(parents=True, exist_ok=True)
    SAVERS[entry.kind](taught, entry, folder)
    readable(folder)
    facts = {
        "kind": entry.kind,
        "seconds": round(time.monotonic() - begin),
        "steps": steps,
        "seed": options.seed,
        "final_loss": round(loss, 4),
    }
    record_stage(f"personalise/{concept_id}", facts)
    print(concept_id, facts, flush=True)


def in_parallel(ids: list[str], options: argparse.Namespace) -> None:
    """Run the ids through `options.workers` single-thread processes."""
    command = [
        sys.executable,
        "-m",
        "gallery.personalise",
        "--device",
        options.device,
        "--seed",
        str(options.seed),
        "--steps",
        str(options.steps),
        "--out",
        str(options.out),
    ]
    waiting, running = list(ids), []
    while waiting or running:
        running = [p for p in running if p.poll() is None]
        while waiting and len(running) < options.workers:
            running.append(subprocess.Popen([*command, waiting.pop(0)]))
        time.sleep(0.5)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", help="checkpoint ids")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="processes for --all")
    parser.add_argument("--steps", type=int, default=0, help="0: the kind's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CHECKPOINTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = list(CONCEPTS) if options.all else options.ids
    if len(ids) > 1:
        in_parallel(ids, options)
        return
    for concept_id in ids:
        personalise(concept_id, options)


if __name__ == "__main__":
    main()
