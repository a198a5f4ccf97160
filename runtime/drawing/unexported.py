"""Deltas that were never exported: an adapter made in memory, of a checkpoint in the repository or of a file.

Reads headers first; a delta that is no adapter exactly is refused with the reason.
"""

from pathlib import Path

from personalq.cards.card import Card
from personalq.errors import EngineError
from personalq.repository import Repository
from personalq.repository.described import adapter_manifest
from personalq.repository.forms import why_merged
from personalq.repository.results import Whole
from personalq.repository.settings import read_settings
from personalq.weights.adapter import adapter_of, why_not
from personalq.weights.checkpoint import CheckpointWeights, check_fit, open_weights
from personalq.weights.deltas.kinds import file_kind
from personalq.weights.header import read_header

from .attaching import Opened

_KINDS = ("lora", "custom_diffusion", "textual_inversion")


def of_checkpoint(repository: Repository, checkpoint_id: str) -> Opened:
    """The adapter of a checkpoint in the repository. Raises EngineError for one that is no adapter exactly, with the reason."""
    whole = repository.whole(checkpoint_id)
    weights = open_weights(whole.base_dir, whole.checkpoint_dir, whole.card.kind)
    if why := why_merged(whole, weights):
        raise EngineError(
            f"{checkpoint_id}: must be an adapter to be attached, or to have a strength, got a delta that is merged: {why}; "
            f"run 'personalq export {checkpoint_id}' and draw it alone"
        )
    return _made(whole, weights)


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
    card = Card(id=file.stem[:200], name=file.stem[:200], kind=kind, base=base, trigger=trigger)  # type: ignore[arg-type]
    return _made(Whole(card, base_dir, file), weights)


def _made(whole: Whole, weights: CheckpointWeights) -> Opened:
    adapter = adapter_of(weights, open_weights(whole.base_dir, None, whole.card.kind))
    manifest = adapter_manifest(whole, weights, read_settings(whole.base_dir, whole.checkpoint_dir))
    return Opened(manifest.model_copy(update={"rank": adapter.rank}), adapter)
