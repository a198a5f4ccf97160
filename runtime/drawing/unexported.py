"""Deltas that were never exported: an adapter made in memory, of a checkpoint in the repository or of a file.

Reads headers first; a delta that is no adapter exactly is refused with the reason.
"""

from pathlib import Path

from personalq.adapters import AdapterManifest, Learned
from personalq.architecture import family_key, read_configs
from personalq.bundle import CheckpointEntry
from personalq.cards.card import Card
from personalq.errors import EngineError
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from personalq.repository.results import Whole
from personalq.repository.settings import read_settings
from personalq.weights.adapter import adapter_of, why_not
from personalq.weights.checkpoint import CheckpointWeights, check_fit, open_weights
from personalq.weights.deltas.kinds import file_kind
from personalq.weights.header import read_header

from .attaching import Opened

_KINDS = {"lora": "lora", "custom_diffusion": "custom_diffusion", "textual_inversion": "textual_inversion"}


def of_checkpoint(repository: Repository, checkpoint_id: str) -> Opened:
    """The adapter of a checkpoint in the repository. Raises RepositoryError for one that cannot be read."""
    whole = repository.whole(checkpoint_id)
    assert whole.checkpoint_dir is not None, "a base is no delta"
    return _made(whole, open_weights(whole.base_dir, whole.checkpoint_dir, whole.card.kind))


def why_merged(repository: Repository, checkpoint_id: str) -> str:
    """Why a checkpoint cannot be attached exactly; '' when it can."""
    whole = repository.whole(checkpoint_id)
    return why_not(open_weights(whole.base_dir, whole.checkpoint_dir, whole.card.kind))


def of_file(repository: Repository, file: Path, base: str) -> Opened:
    """The adapter in one file, over a base. Raises EngineError or RepositoryError when it is none, or does not fit the base."""
    if not file.is_file():
        raise EngineError(f"--adapter {file}: must be a safetensors file or a checkpoint's id, got nothing there")
    kind = file_kind(read_header(file).shapes)
    if kind not in _KINDS:
        raise EngineError(
            f"{file.name}: must be a LoRA, a Custom Diffusion delta or an embedding, got {kind}; add it instead"
        )
    base_dir = repository.whole(base).base_dir
    weights = check_fit(base_dir, file, [file], kind)
    if why := why_not(weights):
        raise EngineError(f"{file.name}: must be attachable as it is, got {why}; add and export it instead")
    trigger = tuple(token for token, _ in weights.added_tokens)
    card = Card(id=file.stem[:200], name=file.stem[:200], kind=_KINDS[kind], base=base, trigger=trigger)  # type: ignore[arg-type]
    return _made(Whole(card, base_dir, file), weights)


def _made(whole: Whole, weights: CheckpointWeights) -> Opened:
    adapter = adapter_of(weights, open_weights(whole.base_dir, None, whole.card.kind))
    settings, card = read_settings(whole.base_dir, whole.checkpoint_dir), whole.card
    entry = CheckpointEntry(
        id=card.id,
        name=card.name,
        kind=card.kind,
        base=card.base,
        trigger=tuple(card.trigger),
        class_noun=card.class_noun,
        sha256="",
        files=_stems(whole.checkpoint_dir),
    )
    manifest = AdapterManifest(
        key="",
        key_parts={},
        checkpoint=entry,
        base_sha256=weights_sha256(whole.base_dir, None),
        family=family_key(read_configs(whole.base_dir)),
        exporter_version="",
        scheduler=settings.scheduler.settings,
        sources=dict(settings.sources),
        learned=tuple(Learned(token=token, pieces=pieces) for token, pieces in weights.added_tokens),
        rank=adapter.rank,
        **settings.sampling(),
    )
    return Opened(manifest, adapter)


def _stems(place: Path | None) -> tuple[str, ...]:
    """What <lora:STEM:1> may call it."""
    if place is None or place.is_file():
        return () if place is None else (place.stem,)
    return tuple(sorted(file.stem for file in place.glob("*.safetensors")))
