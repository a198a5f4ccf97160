"""Get ready to observe a checkpoint or a base: what is run over which prompts, and the pipeline that runs it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

from personalq.cards.card import Card, folder_name
from personalq.errors import SpecError
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from personalq.repository.results import Whole
from personalq.repository.settings import Settings, read_settings

from .mixture.base_prompts import own_prompts
from .mixture.choice import Choice, chosen, named
from .model.dressing import dressed, tokenizer_of
from .model.pipeline import load_pipeline
from .policies import Tokens
from .prompts import calibration_prompts
from .statistics.evidence import Evidence, Part, Recipe
from .statistics.saved import NAME as STATISTICS

FLOAT_POLICIES = {"fp32": "float32", "fp16": "float16"}
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """policy: see calibration.policies, or 'fp32' / 'fp16' (nothing quantised). samples: prompts run through all steps.

    budget_bytes: share this many bytes of layer weights out by harm. row_bits: of the text rows that are not kept, 8 or
    4 (always stored in a byte). report: an HTML page to write. over: the checkpoints that a base is run as; None: chosen.
    A base is run over 2 x samples prompts of its own, and samples / 2 of each checkpoint.
    """

    policy: str = "taq"
    bits: str = "w8a8"
    budget_bytes: int | None = None
    row_bits: int = 8
    samples: int = 8
    steps: int = 25
    seed: int = 0
    report: Path | None = None
    over: tuple[str, ...] | None = None


def quiet(_: str, __: float) -> None:
    """No progress shown."""


def choice_of(repository: Repository, whole: Whole, options: CalibrateOptions) -> Choice:
    """The checkpoints that a base is run as; none for a checkpoint and for a policy that quantises nothing.

    Raises RepositoryError or SpecError.
    """
    if options.over is not None and not whole.is_base:
        raise SpecError(f"over: must be given with a base, got it with checkpoint {whole.card.id!r}; leave it out")
    if options.over is not None and options.policy in FLOAT_POLICIES:
        raise SpecError(
            f"over: must be left out with policy {options.policy!r}, which measures nothing, got a list; leave it out"
        )
    if not whole.is_base or options.policy in FLOAT_POLICIES:
        return Choice()
    return chosen(repository, whole) if options.over is None else named(repository, whole, options.over)


def gather(
    repository: Repository,
    card: Card,
    options: CalibrateOptions,
    progress: Progress = quiet,
    *,
    choice: Choice | None = None,
) -> Evidence:
    """Load the checkpoint (or base) and get ready to observe it; policies calibrated one after the other can share the result.

    choice: what a base is run as, when that is known already.
    """
    whole = repository.whole(card.id)
    choice = choice or choice_of(repository, whole, options)
    pipe = load_pipeline(repository, card)
    parts = () if options.policy in FLOAT_POLICIES else parts_of(repository, whole, choice, options)
    recipe = Recipe(parts, options.steps, settings_of(whole).guidance, options.seed)
    saved = repository.root / "specs" / folder_name(card.id) / STATISTICS
    wardrobe = {one.card.id: one for one in choice.over}
    return Evidence(pipe, recipe, progress, lambda id_: dressed(pipe, wardrobe[id_]), saved, checkpoint_sha256(whole))


def parts_of(repository: Repository, whole: Whole, choice: Choice, options: CalibrateOptions) -> tuple[Part, ...]:
    """What is run: a checkpoint over its own prompts, or a base's mixture."""
    return (
        mixture_of(repository, whole, choice, options) if whole.is_base else (part_of(whole, options.samples, options),)
    )


def part_of(whole: Whole, samples: int, options: CalibrateOptions) -> Part:
    """A checkpoint over its own prompts."""
    tokens = card_tokens(tokenizer_of(whole), whole.card)
    return Part(tuple(calibration_prompts(whole.card, samples, options.seed)), tokens.trigger, tokens.class_noun)


def mixture_of(repository: Repository, base: Whole, choice: Choice, options: CalibrateOptions) -> tuple[Part, ...]:
    """The base as it is over prompts of its own, then as each checkpoint makes it over prompts of that checkpoint's."""
    cards = [card for card in repository.cards() if card.base == base.card.id]
    own = Part(tuple(own_prompts(base.base_dir, cards, 2 * options.samples, options.seed)))
    few = max(options.samples // 2, 1)
    attached = (
        replace(part_of(one, few, options), checkpoint=one.card.id, sha256=checkpoint_sha256(one))
        for one in choice.over
    )
    return (own, *attached)


def over_of(evidence: Evidence) -> dict[str, str]:
    """Checkpoint that was put on the base -> hash of its weights."""
    return {part.checkpoint: part.sha256 for part in evidence.recipe.parts if part.checkpoint}


def settings_of(whole: Whole) -> Settings:
    """The checkpoint's scheduler, tokenizers and what else its author shipped."""
    return read_settings(whole.base_dir, whole.checkpoint_dir)


def checkpoint_sha256(whole: Whole) -> str:
    """Hash of the base's and the checkpoint's weights."""
    return weights_sha256(whole.base_dir, whole.checkpoint_dir)


def card_tokens(tokenizer: CLIPTokenizer, card: Card) -> Tokens:
    """Token ids of the card's triggers and class noun, multi-vector triggers expanded as diffusers does."""

    def ids(text: str) -> tuple[int, ...]:
        text = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    triggers = tuple(ids(group) for group in card.trigger if group.strip())
    return Tokens(triggers, (ids(card.class_noun),) if card.class_noun else ())
