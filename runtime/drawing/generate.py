"""A request in words to a picture: Check-in picks the checkpoint and writes the prompt, its best engine draws it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from personalq.errors import CheckinError
from personalq.repository import Repository

from ..engines.engine import open_engine
from ..store import Store
from .image import write_png
from .pipeline import Picture, Pipeline, Settings

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Generated:
    """One picture and how it came to be. seconds: all of it; seconds_per_step: the denoising loop alone.

    warnings: what was not used of the prompts, or not as written; on stderr they stand too, as what is logged.
    """

    checkpoint: str
    prompt: str
    image: str
    sampler: str
    engine: str
    fallback_reason: str
    seconds: float
    seconds_per_step: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """What is drawn besides the request. checkpoint: '' lets Check-in pick it."""

    checkpoint: str = ""
    target: str = "onnxruntime"
    seed: int = 0
    negative_prompt: str = ""
    settings: Settings = field(default_factory=Settings)


def generate(
    repository: Repository,
    request: str,
    out: Path,
    order: Order | None = None,
    progress: Progress = lambda text, done: None,
) -> Generated:
    """Draw `request` into the PNG file `out`. When the order names a checkpoint, Check-in only writes its prompt.

    Raises CheckinError when no checkpoint fits or a question is open, EngineError when there is no bundle.
    """
    started, order = time.perf_counter(), order or Order()
    progress("asking Check-in", 0.0)
    checkpoint_id, prompt = (
        named(repository, order.checkpoint, request) if order.checkpoint else choose(repository, request)
    )
    found = Store(repository.root).find(checkpoint_id, order.target)
    progress("opening the engine", 0.05)
    pipeline = Pipeline(open_engine(found.engine_name, found.bundle))
    begun, latents, n_steps = time.perf_counter(), None, 0
    picture = Picture(prompt, order.negative_prompt, order.seed)
    warnings = pipeline.warnings(picture)
    for step in pipeline.denoise([picture], order.settings):
        latents, n_steps = step.latents, step.n_steps
        progress(f"step {step.index + 1} of {step.n_steps}", 0.1 + 0.85 * (step.index + 1) / step.n_steps)
    per_step = (time.perf_counter() - begun) / max(n_steps, 1)
    assert latents is not None
    write_png(out, pipeline.decode(latents[0]))
    seconds = time.perf_counter() - started
    return Generated(
        checkpoint=checkpoint_id,
        prompt=prompt,
        image=str(out),
        sampler=order.settings.sampler or pipeline.schedule.sampler,
        engine=found.engine_name,
        fallback_reason=found.fallback_reason,
        seconds=round(seconds, 3),
        seconds_per_step=round(per_step, 4),
        warnings=warnings,
    )


def order_of(*, checkpoint: str, target: str, seed: int, steps: int | None, sampler: str | None) -> Order:
    """The order that the options of `personalq generate` make."""
    return Order(checkpoint, target, seed, settings=Settings(steps=steps, sampler=sampler))


def named(repository: Repository, checkpoint: str, request: str) -> tuple[str, str]:
    """The checkpoint a person named, and the request as its prompt: trigger put in where it is not there yet."""
    from personalq.checkin.rewrite import prompt_for

    card = repository.card(checkpoint)
    return card.id, prompt_for(request, card)


def choose(repository: Repository, request: str) -> tuple[str, str]:
    """Check-in's checkpoint and prompt. Raises CheckinError with the question when one is open."""
    from personalq.checkin import ask

    decision = ask(repository, request)
    if decision.decision == "clarify":
        options = " / ".join(decision.options)
        raise CheckinError(f"{decision.question} ({options}): say it in the request, or name one with --checkpoint ID")
    if decision.decision != "select":
        raise CheckinError(
            "no checkpoint fits this request; list them with 'personalq ls', or name one with --checkpoint"
        )
    assert decision.checkpoint is not None and decision.prompt is not None
    return decision.checkpoint, decision.prompt
