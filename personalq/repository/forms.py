"""The form a checkpoint takes: attached to its base's engine, or an engine of its own with the delta merged; and why.

By rule: what an adapter holds exactly is attached, the rest is merged. Only headers and small files are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..architecture import read_config, read_configs
from ..cards.card import Card
from ..weights.adapter import why_not
from ..weights.checkpoint import CheckpointWeights, open_weights
from ..weights.models import read_special_tokens, read_token_ids
from .results import Whole
from .settings import INDEX, Settings, read_settings

FORMS = ("auto", "attached", "merged")
LATENT = {"vae": ("scaling_factor", "shift_factor"), "unet": ("sample_size",)}  # what a config says beside the graph
ZEROS = "force_zeros_for_empty_prompt"


@dataclass(frozen=True)
class Form:
    """reason: in words, for the person who reads why."""

    name: Literal["attached", "merged"]
    reason: str


def form_of(whole: Whole, asked: str = "auto") -> Form:
    """The form of a checkpoint. asked: one of FORMS. Raises RepositoryError for what cannot be exported at all."""
    if asked != "auto":
        return Form("attached" if asked == "attached" else "merged", f"--form {asked} was given")
    if whole.checkpoint_dir is None or whole.checkpoint_dir == whole.base_dir:
        return Form("merged", "it is a whole pipeline, with no base here to be attached to")
    weights = open_weights(whole.base_dir, whole.checkpoint_dir, whole.card.kind)
    reason = why_merged(whole, weights)
    return Form("merged", reason) if reason else Form("attached", _what(whole.card))


def why_merged(whole: Whole, weights: CheckpointWeights) -> str:
    """Why a checkpoint over its base cannot be attached exactly, in words; '' when it can."""
    if whole.checkpoint_dir is not None and whole.checkpoint_dir.is_dir():
        own = own_settings(whole.base_dir, whole.checkpoint_dir, read_settings(whole.base_dir, whole.checkpoint_dir))
        if own:
            return f"{own[0]}, which its base's engine does not have"
    return why_not(weights)


def _what(card: Card) -> str:
    """Why a checkpoint of this kind is an adapter exactly."""
    return {
        "lora": "its change is a low-rank product, layer by layer",
        "custom_diffusion": "it changes K and V of the text alone, and adds tokens",
        "textual_inversion": "it adds tokens alone",
    }.get(card.kind, "it changes what an adapter holds")


def own_settings(base_dir: Path, checkpoint_dir: Path, settings: Settings) -> tuple[str, ...]:
    """What a checkpoint brings beside its weights that an engine of its base does not take from an adapter, in words."""
    return tuple(_own(base_dir, checkpoint_dir, settings))


def _own(base_dir: Path, checkpoint_dir: Path, settings: Settings) -> Iterator[str]:
    for name, folder in settings.tokenizers.items():
        if folder != base_dir / name and _tokens(folder) != _tokens(base_dir / name):
            yield f"it has its own {name}"
    configs = read_configs(base_dir)
    for component, fields in LATENT.items():
        if (checkpoint_dir / component / "config.json").is_file():
            mine, theirs = read_config(checkpoint_dir, component), configs[component]
            yield from (
                f"it has its own {component} {field}" for field in fields if mine.get(field) != theirs.get(field)
            )
    is_own = settings.files.get(INDEX, base_dir / INDEX).parent != base_dir
    if is_own and bool(settings.index.get(ZEROS, True)) != bool(read_settings(base_dir).index.get(ZEROS, True)):
        yield f"it has its own {ZEROS}"


def _tokens(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """What a tokenizer makes of text depends on these: its entries, and which of them begin, end and fill up."""
    return read_token_ids(folder), read_special_tokens(folder)
