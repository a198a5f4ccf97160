"""Read a checkpoint as its author published it: which files, which kind, and what its card says.

Reads headers and text only; never unpickles, never follows a link out of the folder, never writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CardError, RepositoryError
from ..weights.deltas.kinds import added_tokens, file_kind
from ..weights.deltas.lora import PEFT_CONFIG
from ..weights.header import Header, read_header
from ..weights.models import REQUIRED, is_model
from ..weights.pickles import PICKLES, is_trainer_file, pickle_refusal
from .card import MAX_CARD_BYTES, Card, read_card
from .kinds import kind_note
from .readme import Found, read_readme
from .sidecars import json_object, read_sidecar, unwanted
from .sources import embedding_beside, needed_pickles, training_states, twins_in

_KEPT = frozenset({".safetensors", ".info", ".json", ".txt", ".md", ".model", ".png", ".jpg", ".jpeg", ".webp"})
MAX_FILES = 5000


@dataclass(frozen=True)
class Source:
    """A checkpoint read from disk: files are (name inside the checkpoint folder, where it lies)."""

    path: Path
    card: Card
    files: tuple[tuple[str, Path], ...]
    headers: Mapping[str, Header]
    warnings: tuple[str, ...]


def read_source(path: Path, *, base: str = "", card_id: str = "", adult: bool = False) -> Source:
    """Read a folder or a single safetensors file; ``base`` and ``card_id`` override the card.

    What a sidecar marks as adult content or as a real person is refused unless ``adult``.

    Raises RepositoryError (weights, names) or CardError (card) with one line.
    """
    files, warnings = list_files(path)
    if not adult:
        _refuse_unwanted(path, dict(files))
    headers = {name: read_header(file) for name, file in files if name.endswith(".safetensors")}
    kind = _kind(path, headers)
    found = _gather(path, dict(files), headers, kind)
    fields: dict[str, Any] = {name: value for name, (value, _, _) in found.items()}
    provenance = {name: {"source": where, "confidence": sure} for name, (_, where, sure) in found.items()}
    given = fields.get("provenance")
    provenance |= given if isinstance(given, dict) else {}
    if "kind" in fields and (note := kind_note(fields["kind"], kind)):
        warnings.append(note)
    fields |= {"kind": kind, "provenance": provenance, "id": card_id or fields.get("id") or plain_id(path)}
    fields["base"] = base or fields.get("base") or ""
    card, notes = read_card(fields, where=str(path))
    return Source(path, card, tuple(files), headers, (*warnings, *notes))


def list_files(path: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return the files of a source worth keeping, sorted by name, and warnings about the others."""
    if path.suffix in PICKLES:
        raise pickle_refusal(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise RepositoryError(
                f"{path}: must be a folder or a .safetensors file, got {path.suffix or 'no suffix'}; name the weights"
            )
        is_alone = sum(1 for _ in path.parent.glob("*.safetensors")) == 1
        beside = {"card.json": path.with_suffix(".json"), "README.md": path.with_suffix(".md")}
        for ending in (".civitai.info", ".metadata.json"):
            beside[ending] = next(
                (f for f in (path.with_suffix(ending), Path(f"{path}{ending}")) if f.is_file()),
                path.with_suffix(ending),
            )
        shared = {name: path.with_name(name) for name in ("card.json", "README.md", PEFT_CONFIG)} if is_alone else {}
        texts = {n: f for n, f in (*shared.items(), *beside.items()) if f.is_file()}
        tokens = embedding_beside(path)
        return [(path.name, path), *((file.name, file) for file in tokens), *sorted(texts.items())], []
    if not path.is_dir():
        raise RepositoryError(f"{path}: must be a checkpoint folder or file, got nothing there; check the path")
    return _list_folder(path)


def _list_folder(path: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    files, pickles = [], []
    twins, states = twins_in(path), training_states(path)
    for number, file in enumerate(_walk(path)):
        if number >= MAX_FILES:
            raise RepositoryError(
                f"{path}: must hold at most {MAX_FILES} files, got more; add one checkpoint folder at a time"
            )
        name = file.relative_to(path).as_posix()
        if name.split("/")[0] in states or file in twins:
            continue
        if file.suffix in PICKLES:
            pickles.append(file)
        elif file.suffix.lower() in _KEPT and not any(part.startswith(".") for part in Path(name).parts):
            files.append((name, file))
    if not any(name.endswith(".safetensors") for name, _ in files):
        if pickles:
            raise pickle_refusal(pickles[0])
        raise RepositoryError(
            f"{path}: must hold safetensors weights, got none; add a card without weights with --cards"
        )
    _check_shards(path, {name for name, _ in files})
    if needed := needed_pickles(path, [*pickles, *(file for _, file in files)]):
        raise pickle_refusal(*needed)
    return sorted(files), [
        *(f"left out {file.name}: a pickle" for file in pickles if not is_trainer_file(file)),
        *(f"left out {file.name}: the same LoRA in another spelling" for file in twins),
        *(f"left out {name}/: training state" for name in states),
    ]


def _walk(path: Path) -> Iterator[Path]:
    root = path.resolve()
    for folder, folders, names in os.walk(path):
        for entry in (Path(folder) / name for name in sorted(folders + names)):
            if entry.is_symlink() and not entry.resolve().is_relative_to(root):
                raise RepositoryError(
                    f"{entry}: must not be a link that leaves its folder; copy it with its content first (cp -rL)"
                )
        yield from (Path(folder) / name for name in sorted(names) if (Path(folder) / name).is_file())


def _check_shards(path: Path, names: set[str]) -> None:
    for index in sorted(name for name in names if name.endswith(".safetensors.index.json")):
        weight_map = _read_json(path / index, f"{path / index}").get("weight_map")
        shards = {s for s in weight_map.values() if isinstance(s, str)} if isinstance(weight_map, dict) else set()
        for shard in sorted(shards):
            if (Path(index).parent / shard).as_posix() not in names:
                raise RepositoryError(
                    f"{path / index}: must list files that are there, got {shard[:80]!r} missing; fetch it again"
                )


def _kind(path: Path, headers: Mapping[str, Header]) -> str:
    """Tell the kind from tensor names; full or UNet-only diffusers folders are dreambooth."""
    kinds = {name: "model" if is_model(name) else file_kind(header.shapes) for name, header in headers.items()}
    if [*kinds.values()] == ["original"]:
        return "dreambooth"
    for delta in ("custom_diffusion", "lora"):
        if delta in kinds.values():
            return delta
    if any(name.startswith("unet/") for name in headers):
        if (path / "model_index.json").is_file():
            check_pipeline(path, headers)
        return "dreambooth"
    if kinds and set(kinds.values()) == {"textual_inversion"}:
        return "textual_inversion"
    keys = sorted(key for header in headers.values() for key in header.shapes)
    raise RepositoryError(
        f"{path}: must be a diffusers folder, a LoRA, a Custom-Diffusion delta or learned embeddings, "
        f"got weights such as {keys[:1]}; only these can be added"
    )


def check_pipeline(path: Path, weights: Collection[str]) -> None:
    """Raise RepositoryError unless every component that model_index.json names has its weights."""
    index = _read_json(path / "model_index.json", str(path / "model_index.json"))
    for component in REQUIRED:
        if component in index and not any(name.startswith(f"{component}/") for name in weights):
            raise RepositoryError(
                f"{path}: must hold {component}/*.safetensors, got none; save it with safe_serialization=True"
            )


def _gather(path: Path, files: Mapping[str, Path], headers: Mapping[str, Header], kind: str) -> Found:
    """Merge what card.json, README.md, the headers and the file names say; the first that knows a field wins."""
    found: Found = {}
    for reader in (_from_card, _from_sidecars, _from_readme, _from_hub_files):
        _merge(found, reader(files))
    _merge(found, _from_headers(headers, kind))
    return found


def _merge(found: Found, more: Found) -> None:
    for field, value in more.items():
        if value[0] and field not in found:
            found[field] = value


def _from_card(files: Mapping[str, Path]) -> Found:
    file = files.get("card.json")
    if file is None:
        return {}
    data = _read_json(file, str(file))
    if (foreign := read_sidecar(data, where=file.name)) is not None:
        return foreign
    if "base_model" in data and not data.get("base"):
        data["base"] = data["base_model"]
    return {str(field): (value, "card.json", 1.0) for field, value in data.items() if value}


def _refuse_unwanted(path: Path, files: Mapping[str, Path]) -> None:
    for name in (n for n in files if n.endswith((".civitai.info", ".metadata.json"))):
        data = json_object(_read_text(files[name]))
        inner = data.get("civitai")
        why = unwanted(data) or (unwanted(inner) if isinstance(inner, Mapping) else "")
        if why:
            raise RepositoryError(f"{path}: left out, {files[name].name} says it is {why}; take it in with --adult")


def _from_sidecars(files: Mapping[str, Path]) -> Found:
    """Read what other tools left: .civitai.info first, it is what the author published."""
    found: Found = {}
    names = [n for ending in (".civitai.info", ".metadata.json") for n in sorted(files) if n.endswith(ending)]
    for name in names:
        _merge(found, read_sidecar(json_object(_read_text(files[name])), where=files[name].name) or {})
    found.pop("kind", None)  # the weights say it
    return found


def _from_readme(files: Mapping[str, Path]) -> Found:
    return read_readme(_read_text(files["README.md"])) if "README.md" in files else {}


def _from_hub_files(files: Mapping[str, Path]) -> Found:
    token = _read_text(files["token_identifier.txt"]).strip() if "token_identifier.txt" in files else ""
    concept = _read_text(files["type_of_concept.txt"]).strip() if "type_of_concept.txt" in files else ""
    noun = "style" if concept == "style" else ""
    return {
        "trigger": ([token] if token else [], "token_identifier.txt", 0.8),
        "class_noun": (noun, "type_of_concept.txt", 0.8),
    }


def _from_headers(headers: Mapping[str, Header], kind: str) -> Found:
    return _HEADER_READERS[kind](headers) if kind in _HEADER_READERS else {}


def _from_tokens(headers: Mapping[str, Header]) -> Found:
    tokens = added_tokens({name: header.shapes for name, header in headers.items()})
    return {"trigger": (tokens[:8], "learned embedding key", 0.95)}


def _from_lora_metadata(headers: Mapping[str, Header]) -> Found:
    meta = {key: value for header in headers.values() for key, value in header.metadata.items()}
    found: Found = {}
    for key, field, sure in _LORA_KEYS:
        if value := meta.get(key, "").strip():
            found.setdefault(field, ([value] if field == "trigger" else value, f"safetensors {key}", sure))
    if comment := re.search(
        r"trigger(?: ?words?)?\s*[:=]\s*(.{2,120})", meta.get("ss_training_comment", ""), re.IGNORECASE
    ):
        found.setdefault("trigger", ([comment.group(1).strip()], "safetensors ss_training_comment", 0.7))
    if tags := [t.strip() for t in meta.get("modelspec.tags", "").split(",") if t.strip()]:
        found["tags"] = (tags, "safetensors modelspec.tags", 0.7)
    folders = json_object(meta.get("ss_dataset_dirs", "")) or json_object(meta.get("ss_tag_frequency", ""))
    for folder in folders:
        # kohya names a data set '<repeats>_<trigger> <class>'
        match = re.match(r"\d+_(\S+)(?:\s+(.+))?$", folder)
        if match is not None:
            found.setdefault("trigger", ([match.group(1)], "safetensors data set name", 0.6))
            found.setdefault("class_noun", (match.group(2) or "", "safetensors data set name", 0.6))
    return found


_LORA_KEYS = (
    ("modelspec.trigger_phrase", "trigger", 0.95),
    ("ss_trigger_words", "trigger", 0.9),
    ("ss_activation_text", "trigger", 0.85),
    ("trigger_words", "trigger", 0.85),
    ("modelspec.title", "name", 0.8),
    ("ss_output_name", "name", 0.6),
    ("modelspec.description", "description", 0.8),
    ("ss_sd_model_name", "base", 0.5),
    ("ss_base_model_version", "base", 0.5),
)
_HEADER_READERS: dict[str, Callable[[Mapping[str, Header]], Found]] = {
    "lora": _from_lora_metadata,
    "textual_inversion": _from_tokens,
    "custom_diffusion": _from_tokens,
}


def _read_json(file: Path, where: str) -> dict[str, Any]:
    text = _read_text(file)
    data = json_object(text)
    if not data and text.strip() != "{}":
        raise CardError(f"{where}: must be a JSON object, got text that does not parse; fix the file")
    return data


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_CARD_BYTES + 1)
    except OSError as error:
        raise RepositoryError(f"{file}: must be readable, got '{error.strerror}'; check permissions") from error
    if len(data) > MAX_CARD_BYTES:
        raise CardError(f"{file}: must be at most {MAX_CARD_BYTES >> 20} MB of text, got more; shorten it")
    return data.decode("utf-8", errors="replace")


def plain_id(path: Path) -> str:
    """The id that a file's or folder's name gives: letters, digits, dots and dashes."""
    name = path.stem if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "checkpoint"
