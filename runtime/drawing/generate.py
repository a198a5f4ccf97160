"""A request in words to a picture: Check-in picks the checkpoint and writes the prompt, its best engine draws it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personalq.errors import CheckinError
from personalq.repository import Repository

from ..engines.engine import open_engine
from ..store import Store
from .choosing import Asked, read_asked, what_draws, with_tags
from .image import write_png
from .pipeline import Picture, Pipeline, Settings

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Generated:
    """One picture and how it came to be. seconds: all of it; seconds_per_step: the denoising loop alone.

    adapters: [{"id", "strength"}] attached to the base's engine, none in form 'merged'. warnings: what was not used of the
    prompts or adapters, or not as written; on stderr they stand too, as what is logged.
    """

    checkpoint: str
    prompt: str
    image: str
    sampler: str
    engine: str
    fallback_reason: str
    form: str
    seconds: float
    seconds_per_step: float
    adapters: list[dict[str, Any]] = field(default_factory=list)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """What is drawn besides the request. checkpoint: '' lets Check-in pick it, unless adapters are named.

    adapters: 'ID', 'FILE', each with ':STRENGTH' or without. on: a base, in place of the checkpoint's own.
    """

    checkpoint: str = ""
    target: str = "onnxruntime"
    seed: int = 0
    negative_prompt: str = ""
    settings: Settings = field(default_factory=Settings)
    adapters: tuple[str, ...] = ()
    on: str = ""


def generate(
    repository: Repository,
    request: str,
    out: Path,
    order: Order | None = None,
    progress: Progress = lambda text, done: None,
) -> Generated:
    """Draw `request` into the PNG file `out`. When the order names a checkpoint or adapters, Check-in only writes the prompt.

    Raises CheckinError when no checkpoint fits or a question is open, EngineError when there is no bundle.
    """
    started, order = time.perf_counter(), order or Order()
    names = _names(repository)
    asked = with_tags([read_asked(one) for one in order.adapters], request, names)
    progress("asking Check-in", 0.0)
    checkpoint_id, prompt = _chosen(repository, request, order, asked)
    wanted = [Asked(checkpoint_id), *asked] if checkpoint_id else asked
    drawn = what_draws(repository, Store(repository.root), with_tags(wanted, prompt, names), order.on, order.target)
    progress("opening the engine", 0.05)
    found = drawn.found
    engine = open_engine(found.engine_name, found.bundle)
    pipeline = Pipeline(engine, drawn.chosen, on_any_base=drawn.on_any_base)
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
        checkpoint=checkpoint_id or pipeline.manifest.checkpoint.id,
        prompt=prompt,
        image=str(out),
        sampler=order.settings.sampler or pipeline.schedule.sampler,
        engine=found.engine_name,
        fallback_reason=found.fallback_reason,
        form=drawn.form,
        seconds=round(seconds, 3),
        seconds_per_step=round(per_step, 4),
        adapters=[{"id": one.id, "strength": one.strength} for one in drawn.chosen],
        warnings=warnings,
    )


def order_of(
    *,
    checkpoint: str,
    target: str,
    seed: int,
    steps: int | None,
    sampler: str | None,
    adapters: tuple[str, ...] = (),
    on: str = "",
) -> Order:
    """The order that the options of `personalq generate` make."""
    return Order(checkpoint, target, seed, settings=Settings(steps=steps, sampler=sampler), adapters=adapters, on=on)


def _chosen(repository: Repository, request: str, order: Order, asked: Sequence[Asked]) -> tuple[str, str]:
    """The checkpoint ('' for adapters alone) and the prompt, with the trigger of everything that is named by its id."""
    if not order.checkpoint and not asked:
        return choose(repository, request)
    named_ids = [order.checkpoint] if order.checkpoint else []
    prompt = request
    for id_ in [*named_ids, *(one.name for one in asked if not one.is_file)]:
        prompt = named(repository, id_, prompt)[1]
    return (repository.card(order.checkpoint).id if order.checkpoint else "", prompt)


def _names(repository: Repository) -> dict[str, str]:
    """What <lora:NAME:...> may call each checkpoint with weights: its id or its name, casefolded -> its id."""
    cards = repository.cards()
    return {card.name.casefold(): card.id for card in cards if card.name} | {
        card.id.casefold(): card.id for card in cards
    }


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
