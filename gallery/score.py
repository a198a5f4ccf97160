"""Generate with the shipped weights and let the judges score them: scores.json, with intervals and counts."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from .concepts import CONCEPTS, evaluation_prompts, reference_images, siblings
from .deltas import load_pipeline
from .judge import Judge
from .record import BASE, HERE, WORK, record_stage, write_text
from .train_judge import held_out_classifier, held_out_identity
from .world import Scene, caption, random_scene

STEPS, GUIDANCE = 25, 4.0
SCORES = HERE / "scores.json"
REFERENCE_SEED, REAL_SEED = 5001, 5002  # never used in training


def base_cases(n: int, seed: int = 7001) -> tuple[list[Scene], list[str]]:
    """Held-out scenes with a caption each."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(n)]
    return scenes, [caption(scene, rng) for scene in scenes]


def generate(pipe: StableDiffusionPipeline, prompts: list[str], seed: int, guidance: float = GUIDANCE) -> np.ndarray:
    """One picture per prompt, each from its own seed, uint8 (N, 64, 64, 3)."""
    out = []
    for i in range(0, len(prompts), 16):
        part = prompts[i : i + 16]
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(part))]
        images = pipe(
            part,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=generators,
            height=64,
            width=64,
            output_type="np",
        ).images
        out.append(np.clip(images * 255, 0, 255).round().astype(np.uint8))
    return np.concatenate(out)


def picture_file(work: Path, name: str) -> Path:
    """Where a name's generated pictures are kept between scoring and contact sheets."""
    return work / "images" / f"{name}.npy"


def draw(name: str, options: argparse.Namespace) -> None:
    """Generate and keep the pictures of one checkpoint, or of the base."""
    pipe = load_pipeline(None if name == "base" else name).to(options.device)
    prompts = base_cases(options.base_n)[1] if name == "base" else evaluation_prompts(name) * options.per_prompt
    file = picture_file(options.work_dir, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, generate(pipe, prompts, seed=options.seed, guidance=options.guidance))


def draw_all(names: list[str], options: argparse.Namespace) -> None:
    """Generate for all names in single-thread processes, a share of the names each."""
    shared = [
        "--draw-only",
        "--device",
        options.device,
        "--per-prompt",
        str(options.per_prompt),
        "--base-n",
        str(options.base_n),
        "--work-dir",
        str(options.work_dir),
    ]
    shares = [names[i :: options.workers] for i in range(options.workers)]
    running = [subprocess.Popen([sys.executable, "-m", "gallery.score", *share, *shared]) for share in shares if share]
    if any(process.wait() for process in running):
        raise SystemExit("a drawing process failed")


def wilson(hits: int, n: int) -> list[float]:
    """95 % interval of a share."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round((middle + s * half) / (1 + z * z / n), 4) for s in (-1, 1)]


def mean_with_interval(values: np.ndarray) -> dict[str, object]:
    """Mean, bootstrap 95 % interval and count."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": round(float(values.mean()), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "n": len(values),
    }


def score_base(judge: Judge, images: np.ndarray) -> dict[str, object]:
    """Shares of held-out captions whose object, background, ... the classifier finds."""
    scenes, prompts = base_cases(len(images))
    found = judge.facets(images)
    right = {
        head: np.asarray([f == getattr(s, head) for f, s in zip(found[head], scenes, strict=True)])
        for head in ("object", "background")
    }
    right["object_and_background"] = right["object"] & right["background"]
    for head in ("colour", "pattern", "accessory"):
        named = np.asarray([getattr(s, head) in p.split() for s, p in zip(scenes, prompts, strict=True)])
        seen = named & np.asarray([s.look != "sketch" or head == "accessory" for s in scenes])
        right[head] = np.asarray([f == getattr(s, head) for f, s in zip(found[head], scenes, strict=True)])[seen]
    rows = {
        k: {"share": round(float(v.mean()), 4), "interval": wilson(int(v.sum()), len(v)), "n": len(v)}
        for k, v in right.items()
    }
    return {**rows, "prompt_score": mean_with_interval(judge.prompt_score(images, prompts))}


def score_concept(judge: Judge, name: str, work: Path) -> dict[str, object]:
    """One checkpoint: its pictures, real renders and its siblings' pictures against its references."""
    images, references = np.load(picture_file(work, name)), reference_images(name, 24, REFERENCE_SEED)
    prompts = evaluation_prompts(name)
    own = mean_with_interval(judge.concept_score(images, references))
    real = mean_with_interval(judge.concept_score(reference_images(name, 48, REAL_SEED), references))
    row: dict[str, object] = {
        "kind": CONCEPTS[name].kind,
        "trigger": CONCEPTS[name].trigger,
        "concept": own,
        "real": real,
        "ratio": round(own["mean"] / real["mean"], 4),  # type: ignore[operator]
        "prompt": mean_with_interval(judge.prompt_score(images, prompts * (len(images) // len(prompts)))),
    }
    row["siblings"] = {
        other: mean_with_interval(judge.concept_score(np.load(picture_file(work, other)), references))
        for other in siblings(name)
    }
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", help="draw only these anew (default: base and every checkpoint)")
    parser.add_argument("--draw-only", action="store_true")
    parser.add_argument("--no-draw", action="store_true", help="score the pictures that are there")
    parser.add_argument("--per-prompt", type=int, default=2)
    parser.add_argument("--base-n", type=int, default=160)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=9000)
    parser.add_argument("--work-dir", type=Path, default=WORK)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names, begin = options.ids or ["base", *CONCEPTS], time.monotonic()
    if options.draw_only:
        for name in names:
            draw(name, options)
        return
    if not options.no_draw:
        draw_all(names, options)
    judge = Judge.load()
    scores: dict[str, object] = {
        "steps": STEPS,
        "guidance": options.guidance,
        "base": score_base(judge, np.load(picture_file(options.work_dir, "base"))),
    }
    scores["concepts"] = {
        name: score_concept(judge, name, options.work_dir)
        for name in CONCEPTS
        if picture_file(options.work_dir, name).exists()
    }
    vae = AutoencoderKL.from_pretrained(BASE / "vae", dtype=torch.float32)
    scores["judges"] = {"classifier": held_out_classifier(judge, vae), "identity": held_out_identity(judge)}
    write_text(SCORES, json.dumps(scores, indent=1) + "\n")
    if not options.no_draw and not options.ids:
        record_stage("score", {"seconds": round(time.monotonic() - begin)})
    print(summary(scores))


def summary(scores: dict[str, object]) -> str:
    """A table for people."""
    lines = [f"{k}: {v['share']:.3f} {v['interval']}" for k, v in scores["base"].items() if "share" in v]  # type: ignore[attr-defined]
    for name, row in scores["concepts"].items():  # type: ignore[attr-defined]
        rival = max((s["mean"] for s in row["siblings"].values()), default=float("nan"))
        lines.append(
            f"{name:18s} {row['concept']['mean']:.3f} real {row['real']['mean']:.3f} ratio {row['ratio']:.3f} "
            f"prompt {row['prompt']['mean']:.3f} sibling {rival:.3f}"
        )
    return "\n".join([*lines, json.dumps(scores["judges"])])


if __name__ == "__main__":
    main()
