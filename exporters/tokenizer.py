"""The bundle's tokenizer.json: the base's CLIP tokenizer with the checkpoint's learned tokens, and the ids a runtime needs."""

import json
from pathlib import Path
from typing import Any

from personalq.bundle import Text
from personalq.errors import RepositoryError

from .weights import CheckpointWeights


def write_tokenizer(base_dir: Path, weights: CheckpointWeights, path: Path) -> Text:
    """Write `path` and return the special ids and multi-vector expansions. Raises RepositoryError for an unknown tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_tokenizer_json(base_dir / "tokenizer"))
    pieces = [piece for _, group in weights.added_tokens for piece in group]
    if pieces:
        tokenizer.add_tokens(pieces)
    for offset, piece in enumerate(pieces):
        found = tokenizer.token_to_id(piece)
        if found != weights.first_added_id + offset:
            raise RepositoryError(
                f"{base_dir.name}/tokenizer: token {piece} must get id {weights.first_added_id + offset}, got {found}; "
                "the base already knows this token: rename it in the checkpoint"
            )
    tokenizer.save(str(path))
    special = _special_tokens(base_dir / "tokenizer")
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    expansions = {token: " ".join(group) for token, group in weights.added_tokens if len(group) > 1}
    return Text(bos_id=ids["bos"], eos_id=ids["eos"], pad_id=ids["pad"], expansions=expansions)


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_text()
    if not (folder / "vocab.json").is_file():
        raise RepositoryError(
            f"{folder}: must hold tokenizer.json or vocab.json and merges.txt, got neither; add the whole base folder"
        )
    from transformers import CLIPTokenizer

    return str(CLIPTokenizer.from_pretrained(folder).backend_tokenizer.to_str())


def _special_tokens(folder: Path) -> dict[str, str]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_text())

    def text(key: str, default: str) -> str:
        value = config.get(key) or default
        return str(value["content"] if isinstance(value, dict) else value)

    end = text("eos_token", "<|endoftext|>")
    return {"bos": text("bos_token", "<|startoftext|>"), "eos": end, "pad": text("pad_token", end)}
