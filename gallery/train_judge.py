"""Train the judges on renders, many of them blurred, noised or passed through the VAE, and export them to ONNX."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from calibration.model.precision import autocast

from .judge import HEADS, Judge
from .record import JUDGES, WORK, record_stage
from .train_vae import set_lr
from .world import Concept, Scene, random_concept, random_identity, random_look, random_scene, render, render_concept

Rng = np.random.Generator
IGNORED = -100
VIEWS = 4


class Trunk(nn.Module):
    """uint8 (N, 64, 64, 3) to features (N, 320)."""

    def __init__(self) -> None:
        super().__init__()
        plan = [(3, 32, 5, 2), (32, 64, 3, 2), (64, 64, 3, 1), (64, 128, 3, 2), (128, 128, 3, 1), (128, 160, 3, 2)]
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, k, s in plan
        ]
        self.layers = nn.Sequential(*blocks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.layers(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


class Classifier(nn.Module):
    """One softmax per facet."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.hidden = nn.Sequential(nn.Linear(320, 192), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(192, len(labels)) for labels in HEADS.values())

    def logits(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.hidden(self.trunk(images))
        return [head(x) for head in self.heads]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.softmax(1) for x in self.logits(images))


class IdentityNet(nn.Module):
    """Unit vectors (N, 64) that are close for one identity, whatever the scene."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.project = nn.Sequential(nn.Linear(320, 192), nn.ReLU(), nn.Linear(192, 64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.project(self.trunk(images)), dim=1)


def labels_of(scene: Scene, concept: Concept | None) -> list[int]:
    """Class numbers by head; what cannot be seen is ignored."""
    facts: dict[str, str] = {head: getattr(scene, head) for head in HEADS}
    hidden = {"colour", "pattern"} if scene.look == "sketch" else set()
    if concept is not None and concept.subject is not None:
        facts |= {
            "object": concept.subject.kind,
            "pattern": concept.subject.pattern,
            "accessory": concept.subject.accessory,
        }
        hidden |= {"colour"}
    if concept is not None and concept.look is not None:
        hidden |= {"colour", "pattern", "look"}
    return [IGNORED if h in hidden else labels.index(facts[h]) for h, labels in HEADS.items()]


def labelled_picture(rng: Rng) -> tuple[np.ndarray, list[int]]:
    """A plain scene (3 in 5), a random identity or a random look, with its labels."""
    scene = random_scene(rng)
    if rng.random() < 0.6:
        return render(scene, rng), labels_of(scene, None)
    concept = random_concept(rng)
    return render_concept(concept, scene, rng), labels_of(scene, concept)


def identity_family(rng: Rng) -> list[list[np.ndarray]]:
    """Pictures of three strangers of one kind (or three looks), VIEWS scenes each."""
    if rng.random() < 0.3:
        concepts = [Concept(look=random_look(rng)) for _ in range(3)]
    else:
        first = random_identity(rng)
        concepts = [
            Concept(subject=s) for s in (first, *(replace(random_identity(rng), kind=first.kind) for _ in range(2)))
        ]
    return [[render_concept(c, replace(random_scene(rng), look="photo"), rng) for _ in range(VIEWS)] for c in concepts]


def softened(images: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """The pictures as the VAE gives them back, uint8."""
    out = []
    for part in images.split(64):
        x = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad(), autocast(x.device.type):
            latent = vae.encode(x).latent_dist
            y = vae.decode(latent.mode() + 0.15 * torch.randn_like(latent.mean) * latent.mean.std()).sample
        out.append(((y.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    return torch.cat(out)


def disturbed(images: torch.Tensor) -> torch.Tensor:
    """Half mirrored (no label tells left from right), a quarter blurred, a quarter noised. uint8 in, float 0..255 out."""
    x, n = images.float(), len(images)
    x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(2), x)
    sharp = x.permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, 1).permute(0, 2, 3, 1)
    kind = torch.rand(n, 1, 1, 1, device=x.device)
    x = torch.where(kind < 0.25, x + (blurred - x) * torch.rand_like(kind), x)
    return torch.where(kind > 0.75, x + torch.randn_like(x) * 14 * torch.rand_like(kind), x).clamp(0, 255)


def contrast(vectors: torch.Tensor, temperature: float = 0.15) -> torch.Tensor:
    """Supervised contrastive loss; vectors (identities * VIEWS, 64), views adjacent."""
    n = len(vectors)
    owner = torch.arange(n, device=vectors.device) // VIEWS
    same = (owner[:, None] == owner[None]) & ~torch.eye(n, dtype=torch.bool, device=vectors.device)
    logits = (vectors @ vectors.T / temperature).masked_fill(
        torch.eye(n, dtype=torch.bool, device=vectors.device), -1e4
    )
    return -(logits.log_softmax(1)[same]).mean()


def fit(model: nn.Module, loss: Callable[[], torch.Tensor], seconds: float, lr: float) -> int:
    """AdamW with a one-cycle rate on the clock; return the steps done."""
    optimizer, start, steps = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4), time.monotonic(), 0
    model.train()
    while (share := (time.monotonic() - start) / seconds) < 1:
        set_lr(optimizer, lr * min(1.0, (steps + 1) / 30) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))))
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        steps += 1
        if steps % 50 == 0:
            print(
                f"{type(model).__name__} {share * seconds:.0f}s step {steps} loss {float(value.detach()):.4f}",
                flush=True,
            )
    model.eval()
    return steps


def train_classifier(options: argparse.Namespace, vae: AutoencoderKL) -> tuple[nn.Module, int]:
    """Fit the classifier on a pool of renders and their softened copies."""
    rng, device = np.random.default_rng([options.seed, 1]), options.device
    pictures, labels = zip(*(labelled_picture(rng) for _ in range(options.pool)), strict=True)
    pool, truth = torch.from_numpy(np.stack(pictures)).to(device), torch.tensor(labels, device=device)
    soft = softened(pool[: len(pool) // 2], vae)
    model = Classifier().to(device)

    def loss() -> torch.Tensor:
        pick = torch.randint(len(pool), (96,), device=device)
        images = pool[pick]
        images[pick < len(soft)] = soft[pick[pick < len(soft)]]  # half of the pool is seen only through the VAE
        with autocast(device):
            logits = model.logits(disturbed(images))
        return sum(F.cross_entropy(x.float(), truth[pick, i], ignore_index=IGNORED) for i, x in enumerate(logits))

    return model, fit(model, loss, options.seconds, 2e-3)


def train_identity(options: argparse.Namespace, vae: AutoencoderKL) -> tuple[nn.Module, int]:
    """Fit the identity embedding on thousands of random identities."""
    rng, device = np.random.default_rng([options.seed, 2]), options.device
    families = np.stack([identity_family(rng) for _ in range(options.pool // (3 * VIEWS))])
    pool = torch.from_numpy(families).to(device)  # (families, 3 identities, VIEWS, 64, 64, 3)
    pool[:, :, ::2] = softened(pool[:, :, ::2].flatten(0, 2), vae).view_as(
        pool[:, :, ::2]
    )  # every other view through the VAE
    model = IdentityNet().to(device)

    def loss() -> torch.Tensor:
        pick = torch.randint(len(pool), (14,), device=device)
        with autocast(device):
            vectors = model(disturbed(pool[pick].flatten(0, 2)))
        return contrast(vectors.float())

    return model, fit(model, loss, options.seconds, 2e-3)


def export(model: nn.Module, path: Path) -> None:
    """Write one ONNX file with a dynamic batch."""
    path.parent.mkdir(exist_ok=True)
    sample = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(
        model.cpu(),
        (sample,),
        path,
        input_names=["images"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )
    path.chmod(0o644)


def held_out_classifier(judge: Judge, vae: AutoencoderKL, n: int = 2000, seed: int = 991) -> dict[str, float]:
    """Accuracy by head on fresh plain renders, and on the same through the VAE."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(n)]
    images = np.stack([render(s, rng) for s in scenes])
    truth = np.asarray([labels_of(s, None) for s in scenes])
    soft = softened(torch.from_numpy(images), vae.cpu()).numpy()
    result: dict[str, float] = {"n": n}
    for name, pictures in (("renders", images), ("through_vae", soft)):
        found = np.stack([p.argmax(1) for p in judge.probabilities(pictures).values()], 1)
        for i, head in enumerate(HEADS):
            seen = truth[:, i] != IGNORED
            result[f"{head}_{name}"] = round(float((found == truth)[seen, i].mean()), 4)
    return result


def held_out_identity(judge: Judge, n: int = 50, trials: int = 6, seed: int = 992) -> dict[str, float]:
    """Retrieval among n unseen identities: a fresh picture against three references of each."""
    rng, hits, own, other = np.random.default_rng(seed), [], [], []
    for _ in range(trials):
        concepts = [random_concept(rng) for _ in range(n)]
        shots = np.stack(
            [[render_concept(c, replace(random_scene(rng), look="photo"), rng) for _ in range(VIEWS)] for c in concepts]
        )
        vectors = judge.embed(shots.reshape(-1, 64, 64, 3)).reshape(n, VIEWS, -1)
        cosines = np.einsum("id,jrd->ijr", vectors[:, 0], vectors[:, 1:]).mean(2)
        hits.append((cosines.argmax(1) == np.arange(n)).mean())
        own.append(np.diag(cosines).mean())
        other.append(cosines[~np.eye(n, dtype=bool)].mean())
    keys = ("retrieval", "own_cosine", "other_cosine")
    return {
        "n": n * trials,
        "distractors": n - 1,
        **{k: round(float(np.mean(v)), 4) for k, v in zip(keys, (hits, own, other), strict=True)},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("classifier", "identity"))
    parser.add_argument("--seconds", type=float, default=780)
    parser.add_argument("--pool", type=int, default=32000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=WORK)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(options.work_dir / "vae").to(options.device).eval()
    for name, train in (("classifier", train_classifier), ("identity", train_identity)):
        if options.only in (None, name):
            begin = time.monotonic()
            model, steps = train(options, vae)
            export(model, JUDGES / f"{name}.onnx")
            facts = {
                "seconds": round(time.monotonic() - begin),
                "steps": steps,
                "pictures": options.pool,
                "seed": options.seed,
            }
            record_stage(f"judge_{name}", facts)
            print(name, facts, flush=True)


if __name__ == "__main__":
    main()
