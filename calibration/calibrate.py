"""`personalq calibrate`: run the checkpoint over its own prompts, stream statistics, apply a policy, write spec and goldens."""

import datetime
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from personalq.card import Card, folder_name
from personalq.identity import family_key, read_configs, weights_sha256
from personalq.repository import Repository
from personalq.rows import KeptTokens, RowLayer, pack_layers
from personalq.spec import LayerSpec, Provenance, RowsSpec, Spec, SpecFile

from .model import cross_attention, load_pipeline, quantisable_layers
from .policies import POLICIES, Tokens, decide, float_layers
from .prompts import calibration_prompts, prompts_sha256
from .reference import start_noise, write_reference
from .statistics import LayerRanges, Observer

REFERENCE = "reference.safetensors"
FLOAT_POLICIES = {"fp32": "float32", "fp16": "float16"}
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """policy: see calibration.policies, or 'fp32' / 'fp16' (nothing quantised). samples: prompts run through all steps."""

    policy: str = "taq"
    bits: str = "w8a8"
    budget_bytes: int | None = None
    samples: int = 8
    steps: int = 25
    seed: int = 0


@dataclass(frozen=True)
class CalibrateResult:
    spec_path: Path
    spec_file: SpecFile
    kept_tokens: tuple[str, ...]
    layers: int
    seconds: float
    peak_rss_bytes: int


def quiet(_: str, __: float) -> None:
    """No progress shown."""


def calibrate(
    repository: Repository, checkpoint_id: str, options: CalibrateOptions, progress: Progress = quiet
) -> CalibrateResult:
    """Write `specs/<id>/<policy>-<bits>.json` (+ tensors) and `reference.safetensors`; return what was decided.

    Raises RepositoryError or SpecError. progress(text, fraction 0..1) is called as the work goes on.
    """
    started = time.perf_counter()
    card = repository.card(checkpoint_id)
    progress("loading the checkpoint", 0.0)
    pipe = load_pipeline(repository, card)
    folder = repository.root / "specs" / folder_name(card.id)
    reference = folder / REFERENCE
    if not reference.is_file():
        progress("running the FP32 reference", 0.02)
        write_reference(pipe, card, reference, **sampling_defaults(repository.base_dir(card)))
    spec_file, kept = build_spec(repository, card, pipe, options, progress)
    path = spec_file.write(folder / f"{spec_file.spec.name}.json")
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return CalibrateResult(path, spec_file, kept, len(spec_file.spec.layers), seconds, peak)


def build_spec(
    repository: Repository, card: Card, pipe: StableDiffusionPipeline, options: CalibrateOptions, progress: Progress
) -> tuple[SpecFile, tuple[str, ...]]:
    """Collect statistics (unless the policy quantises nothing) and decide every layer and row."""
    tokens = card_tokens(pipe, card)
    widths = [(name, attention.to_k.out_features) for name, attention in cross_attention(pipe.unet)]
    prompts: list[str] = []
    if options.policy in FLOAT_POLICIES:
        modules = {n: LayerRanges(_op(m), m.weight) for n, m in quantisable_layers(pipe.unet).items()}
        layers, tensors = float_layers(modules, "reference: nothing is quantised"), {}
        rows, name = RowsSpec(kept=KeptTokens(slots=0), layers=tuple(pack_layers(widths))), options.policy
    else:
        prompts = calibration_prompts(card, options.samples, options.seed)
        ranges = observe(pipe, prompts, options, progress)
        layers, tensors = decide(ranges, options.policy, options.bits)
        rule = POLICIES[options.policy]
        rows = RowsSpec(kept=rule.kept(tokens), layers=tuple(pack_layers(widths)), reasons=rule.row_reasons)
        name = f"{options.policy}-{options.bits}"
    spec = Spec(
        name=name,
        policy=options.policy,
        bits=options.policy if options.policy in FLOAT_POLICIES else options.bits,
        checkpoint=card.id,
        family=family_key(read_configs(repository.base_dir(card))),
        storage=FLOAT_POLICIES.get(options.policy, "float16"),
        layers=layers,
        rows=rows,
        budget_bytes=options.budget_bytes,
        provenance=provenance(repository, card, prompts, options),
    )
    return SpecFile(spec, tensors), kept_words(rows.kept, pipe)


def observe(
    pipe: StableDiffusionPipeline, prompts: list[str], options: CalibrateOptions, progress: Progress
) -> dict[str, LayerRanges]:
    """Denoise every prompt (both halves of guidance, all steps) with the observer on; prompt by prompt, memory flat."""
    observer = Observer(pipe.unet)
    guidance = sampling_defaults(Path(pipe.config._name_or_path))["guidance"]
    with observer.watching(), torch.no_grad():
        for index, prompt in enumerate(prompts):
            progress("collecting statistics", 0.1 + 0.8 * index / len(prompts))
            noise = torch.from_numpy(start_noise(pipe, options.seed * 1000 + 100 + index))[None]
            pipe(prompt, num_inference_steps=options.steps, guidance_scale=guidance, latents=noise, output_type="latent")
    return observer.layers


def card_tokens(pipe: StableDiffusionPipeline, card: Card) -> Tokens:
    """Token ids of the card's triggers and class noun, multi-vector triggers expanded as diffusers does."""

    def ids(text: str) -> tuple[int, ...]:
        text = pipe.maybe_convert_prompt(text, pipe.tokenizer)
        return tuple(pipe.tokenizer(text, add_special_tokens=False).input_ids)

    triggers = tuple(ids(group) for group in card.trigger if group.strip())
    return Tokens(triggers, (ids(card.class_noun),) if card.class_noun else ())


def kept_words(kept: KeptTokens, pipe: StableDiffusionPipeline) -> tuple[str, ...]:
    """Human names of the kept rows, for the command line and reports."""
    words = [pipe.tokenizer.decode(sequence).strip() for sequence in kept.trigger]
    words += ["<BOS>"] if kept.bos else []
    words += [pipe.tokenizer.decode(sequence).strip() for sequence in kept.class_noun]
    return tuple(words + (["<EOS>"] if kept.eos else []) + (["<PAD>"] if kept.pad else []))


def provenance(repository: Repository, card: Card, prompts: list[str], options: CalibrateOptions) -> Provenance:
    return Provenance(
        checkpoint_sha256=weights_sha256(repository.base_dir(card), repository.checkpoint_dir(card.id)),
        prompts_sha256=prompts_sha256(prompts),
        prompts=len(prompts),
        timesteps=(options.steps,) if prompts else (),
        seeds=(options.seed,),
        versions={name: version(name) for name in ("torch", "diffusers", "transformers")},
        date=datetime.date.today().isoformat(),
    )


def sampling_defaults(base_dir: Path) -> dict[str, Any]:
    """Steps and guidance the base recommends (`personalq.json` in its folder), else Stable Diffusion's usual ones."""
    file = base_dir / "personalq.json"
    wanted = json.loads(file.read_text()) if file.is_file() else {}
    return {"steps": int(wanted.get("steps", 25)), "guidance": float(wanted.get("guidance", 7.5))}


def _op(module: torch.nn.Module) -> str:
    return "conv" if isinstance(module, torch.nn.Conv2d) else "linear"


__all__ = ["CalibrateOptions", "CalibrateResult", "LayerSpec", "RowLayer", "calibrate"]
