"""What a manifest says of a checkpoint, for exporters and for adapters that are made in memory: card, scheduler, tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters import AdapterManifest, Learned
from ..architecture import family_key, read_configs
from ..bundle import CheckpointEntry
from ..cards.card import Card
from ..weights.checkpoint import CheckpointWeights
from .identity import weights_sha256
from .results import Whole
from .settings import Settings


def checkpoint_entry(card: Card, sha256: str, files: Sequence[str] = ()) -> CheckpointEntry:
    """What a bundle says of its checkpoint. sha256: of base and delta; files: the stems of its own."""
    words = card.model_dump(include={"id", "name", "kind", "base", "trigger", "class_noun"})
    return CheckpointEntry(sha256=sha256, files=tuple(files), **words)


def adapter_manifest(whole: Whole, weights: CheckpointWeights, settings: Settings, sha256: str = "") -> AdapterManifest:
    """The manifest of a checkpoint's adapter before its matrices are made: no key, no files, rank 0.

    sha256: of base and delta. whole.checkpoint_dir may be one file.
    """
    return AdapterManifest(
        key="",
        key_parts={},
        checkpoint=checkpoint_entry(whole.card, sha256, _stems(whole)),
        base_sha256=weights_sha256(whole.base_dir, None),
        family=family_key(read_configs(whole.base_dir)),
        exporter_version="",
        scheduler=settings.scheduler.settings,
        sources=dict(settings.sources),
        learned=tuple(Learned(token=token, pieces=pieces) for token, pieces in weights.added_tokens),
        **settings.sampling(),
    )


def _stems(whole: Whole) -> list[str]:
    """What <lora:STEM:1> may call it."""
    place = whole.checkpoint_dir
    if place is None or place.is_file():
        return [] if place is None else [place.stem]
    return sorted(file.stem for file in place.glob("*.safetensors"))
