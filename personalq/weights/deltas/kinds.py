"""A checkpoint's delta files -> the edits of its base: what each file is, and who reads it. Reads headers and `.alpha`s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..models import SECOND_ENCODER
from ..one_file.original import is_original
from ..tensorfile import TensorFile
from .bundled import bundled_embeddings, bundled_tokens
from .custom_diffusion import custom_diffusion_edits, is_custom_diffusion
from .edits import Delta, Shapes, unmatched
from .embeddings import embedding_edits, is_embedding, learned_tokens
from .lora import lora_edits
from .lora_names import is_lora

SUFFIX = ".safetensors"
_KINDS = {
    "original": is_original,
    "lora": is_lora,
    "custom_diffusion": is_custom_diffusion,
    "textual_inversion": is_embedding,
}


def file_kind(shapes: Shapes) -> str:
    """What one file holds: 'original' (a whole model in one file), a delta's kind, or 'model' for anything else."""
    return next((kind for kind, is_it in _KINDS.items() if is_it(shapes)), "model")


def delta_of(files: Sequence[TensorFile], base: Mapping[str, Shapes], vocabulary: frozenset[str]) -> Delta:
    """The edits that delta files ask for. base: component -> parameter -> shape; vocabulary: the base tokenizer's entries.

    Raises RepositoryError for whatever does not fit the base, and for a tensor that nothing would use.
    """
    delta, embeddings = Delta(), []
    bundled = [one for file in files for one in bundled_embeddings(file, SECOND_ENCODER in base)]
    for file in files:
        kind = file_kind(file.shapes)
        if kind == "lora":
            lora_edits(file, base, delta)
        elif kind == "custom_diffusion":
            custom_diffusion_edits(file, base, delta)
        elif kind == "textual_inversion":
            embeddings.append(file)
        else:
            raise unmatched(file, file.names())
    embedding_edits(embeddings, base, vocabulary, delta, bundled)
    return delta


def added_tokens(files: Mapping[str, Shapes]) -> list[str]:
    """The tokens that files add, by their names and shapes. files: name -> tensor shapes."""
    loose = {name: shapes for name, shapes in sorted(files.items()) if "/" not in name and is_embedding(shapes)}
    tokens = [token for name, shapes in loose.items() for token in learned_tokens(name.removesuffix(SUFFIX), shapes)]
    bundled = [token for shapes in files.values() for token in bundled_tokens(shapes)]
    return list(dict.fromkeys([*bundled, *tokens]))
