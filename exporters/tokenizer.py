"""The bundle's tokenizer.json: the base's CLIP tokenizer with the checkpoint's learned tokens, and the ids a runtime needs."""

import json
from pathlib import Path

from personalq.bundle import Text
from personalq.errors import RepositoryError
from personalq.repository.settings import Settings
from personalq.weights.checkpoint import CheckpointWeights
from personalq.weights.models import read_special_tokens
from personalq.weights.one_file.clip_tokenizer import tokenizer_json


def write_tokenizers(settings: Settings, weights: CheckpointWeights, folder: Path) -> Text:
    """Write tokenizer.json, and tokenizer_2.json for SDXL; return special ids and multi-vector expansions.

    Raises RepositoryError for a tokenizer that cannot be read, or a second one that is not the first with another pad.
    """
    ids = _write(settings.tokenizers["tokenizer"], weights, folder / "tokenizer.json")
    second_pad_id, is_empty_zero = None, False
    if second_dir := settings.tokenizers.get("tokenizer_2"):
        second = _write(second_dir, weights, folder / "tokenizer_2.json")
        if (second["bos"], second["eos"]) != (ids["bos"], ids["eos"]):
            raise RepositoryError(
                f"{second_dir}: begin and end must be {ids['bos']} and {ids['eos']} as in tokenizer, "
                f"got {second['bos']} and {second['eos']}; this base is not supported"
            )
        second_pad_id, is_empty_zero = second["pad"], bool(settings.index.get("force_zeros_for_empty_prompt", True))
    return Text(
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        second_pad_id=second_pad_id,
        is_empty_zero=is_empty_zero,
        expansions={token: " ".join(group) for token, group in weights.added_tokens if len(group) > 1},
    )


def write_tokenizer_folders(settings: Settings, weights: CheckpointWeights, folder: Path) -> list[str]:
    """Write every tokenizer as transformers reads it, learned tokens in it; return the folders' names.

    vocab.json and merges.txt are what transformers 4's CLIPTokenizer wants; transformers 5 writes tokenizer.json alone.
    """
    for name, source in settings.tokenizers.items():
        place = folder / name
        place.mkdir()
        _write(source, weights, place / "tokenizer.json")
        whole = json.loads((place / "tokenizer.json").read_text())
        model, tokens = whole["model"], {str(token.pop("id")): token for token in whole["added_tokens"]}
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        (place / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
        (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        file = source / "tokenizer_config.json"
        config = json.loads(file.read_text()) if file.is_file() else {}
        config |= {"tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": tokens}
        config |= {f"{kind}_token": token for kind, token in read_special_tokens(source).items()}
        (place / "tokenizer_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return [*settings.tokenizers]


def _write(source: Path, weights: CheckpointWeights, path: Path) -> dict[str, int]:
    """One tokenizer with the checkpoint's learned tokens -> its begin, end and pad ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_tokenizer_json(source))
    if pieces := weights.pieces():
        tokenizer.add_tokens(pieces)
        weights.check_ids(tokenizer.token_to_id, f"{source.parent.name}/{source.name}: ")
    tokenizer.save(str(path))
    return {kind: tokenizer.token_to_id(token) for kind, token in read_special_tokens(source).items()}


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_text()
    if not (folder / "vocab.json").is_file():
        raise RepositoryError(
            f"{folder}: must hold tokenizer.json or vocab.json and merges.txt, got neither; add the whole base folder"
        )
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(first, second) for first, second in (line.split() for line in lines if line and line[0:2] != "#v")]
    return json.dumps(tokenizer_json(vocab, merges))
