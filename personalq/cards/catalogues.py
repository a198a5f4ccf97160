"""Read lists of cards without weights: our JSONL, Civitai models, StylusDocs, LoRA galleries, CustomConcept101, DreamBooth.

Each entry becomes the fields of one card, or the reason why it is left out. Knows formats, not repositories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CardError, RepositoryError
from .readme import Found, trigger_from_prompt
from .sidecars import from_civitai_version, known_kind, plain_text, trigger_groups, unwanted

MAX_CATALOGUE_BYTES = 512 << 20
_SUBJECT = re.compile(r"^([\w-]+),([\w -]+)$")


@dataclass(frozen=True)
class Row:
    """One entry of a catalogue: where it stands, and its JSON text (our own card format)."""

    where: str
    text: str


def read_rows(file: Path, *, adult: bool = False) -> Iterator[Row | CardError]:
    """Yield every entry of a catalogue file; entries left out are yielded as CardError. Raises RepositoryError.

    ``adult`` takes in what is marked as adult content or as a real person.
    """
    text = _read(file)
    data = _whole_json(text)
    if data is None:
        yield from _dreambooth(text, file) if _is_dreambooth(text) else _lines(text, file)
        return
    entries = data if isinstance(data, list) else _entries(data)
    for number, entry in enumerate(entries, 1):
        where = f"{file}:{number}"
        if not isinstance(entry, Mapping):
            yield CardError(f"{where}: must be a JSON object, got {type(entry).__name__}; fix the file")
        else:
            yield from _foreign(entry, where, adult=adult)


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_CATALOGUE_BYTES:
            raise RepositoryError(f"{file}: must be at most {MAX_CATALOGUE_BYTES >> 20} MB, got more; split it")
        return file.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise RepositoryError(f"{file}: must be a readable file, got '{error.strerror}'; check the path") from error


def _whole_json(text: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_own = isinstance(data, dict) and "kind" in data and "id" in data
    return None if is_own else data


def _lines(text: str, file: Path) -> Iterator[Row | CardError]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(f"{file}:{number}", line)


def _entries(data: Mapping[str, Any]) -> list[Any]:
    """Return the entries of one JSON object: a model, a list under 'items', or a dict of entries by id (StylusDocs)."""
    if isinstance(data.get("items"), list):
        return list(data["items"])
    if any(key in data for key in _FORMATS):
        return [data]
    rows = [(key, value) for key, value in data.items() if isinstance(value, Mapping)]
    return [{"adapter_id": key, **value} for key, value in rows] if rows else [data]


def _foreign(entry: Mapping[str, Any], where: str, *, adult: bool) -> Iterator[Row | CardError]:
    reader = next((reader for key, reader in _FORMATS.items() if key in entry), None)
    if "kind" in entry or reader is None:
        yield Row(where, json.dumps(entry))
        return
    why = "" if adult else unwanted(entry)
    if why:
        yield CardError(f"{where}: left out, it is {why}; take it in with --adult")
        return
    for found in reader(entry):
        fields = {name: value for name, (value, _, _) in found.items() if value}
        fields["provenance"] = {n: {"source": s, "confidence": c} for n, (v, s, c) in found.items() if v}
        yield Row(where, json.dumps(fields))


def listed(entry: Mapping[str, Any], key: str) -> list[Any]:
    """The list in a field; empty when it holds anything else."""
    value = entry.get(key)
    return value if isinstance(value, list) else []


def _civitai_model(entry: Mapping[str, Any]) -> Iterator[Found]:
    """Yield one card per version: the versions of a model have different triggers and bases."""
    versions = [v for v in listed(entry, "modelVersions") if isinstance(v, Mapping)]
    for version in versions:
        whole = {
            "modelId": entry.get("id"),
            **version,
            "model": {k: v for k, v in entry.items() if k != "modelVersions"},
        }
        found = from_civitai_version(whole, where="civitai model")
        yield {**found, "id": (f"civitai-{entry.get('id')}-{version.get('id')}", "civitai model", 1.0)}


def _civitai_version(entry: Mapping[str, Any]) -> Iterator[Found]:
    found = from_civitai_version(entry, where="civitai version")
    yield {**found, "id": (f"civitai-{entry.get('modelId')}-{entry.get('id')}", "civitai version", 1.0)}


def _stylus(entry: Mapping[str, Any]) -> Iterator[Found]:
    where, text = "StylusDocs", {key: plain_text(value) for key, value in entry.items() if isinstance(value, str)}
    prompts = [p for p in listed(entry, "image_prompts") if isinstance(p, str)]
    yield {
        "id": (f"stylus-{_slug(str(entry.get('adapter_id')))}", where, 1.0),
        "kind": ("lora", where, 0.9),
        "name": (text.get("title") or text.get("alias"), where, 0.9),
        "base": (text.get("base_model"), where, 0.8),
        "trigger": (trigger_groups(entry.get("trigger_words")), where, 0.9),
        "description": (text.get("llm_description") or text.get("description"), where, 0.7),
        "tags": ([t for t in listed(entry, "tags") if isinstance(t, str)], where, 0.8),
        "example_prompts": (prompts[:8], where, 0.6),
    }


def _gallery(entry: Mapping[str, Any]) -> Iterator[Found]:
    where, repo = "gallery list", str(entry.get("repo") or entry.get("title") or "")
    yield {
        "id": (_slug(repo), where, 1.0),
        "kind": ("lora", where, 0.9),
        "name": (plain_text(entry.get("title")), where, 0.9),
        "trigger": (trigger_groups([entry.get("trigger_word")]), where, 0.9),
        "description": (plain_text(entry.get("description")), where, 0.6),
        "example_prompts": ([p for p in listed(entry, "prompts") if isinstance(p, str)][:8], where, 0.6),
        "source": (repo, where, 1.0),
    }


def _custom_concept(entry: Mapping[str, Any]) -> Iterator[Found]:
    where, prompt = "CustomConcept101", str(entry.get("instance_prompt") or "").replace("{}", "<new1>")
    name = str(entry.get("instance_data_dir") or "").rstrip("/").rsplit("/", 1)[-1] or _slug(prompt)
    trigger, noun = trigger_from_prompt(prompt)
    yield {
        "id": (_slug(name), where, 1.0),
        "kind": (known_kind(str(entry.get("type", ""))) or "custom_diffusion", where, 0.8),
        "name": (name, where, 0.9),
        "trigger": ([trigger] if trigger else [], where, 0.9),
        "class_noun": (str(entry.get("class_prompt") or "") or noun, where, 0.9),
        "example_prompts": ([prompt] if prompt else [], where, 0.9),
    }


def _is_dreambooth(text: str) -> bool:
    return text.lstrip()[:200].lower().startswith(("classes", "subject_name,class", "live subjects", "object"))


def _dreambooth(text: str, file: Path) -> Iterator[Row | CardError]:
    """Read google/dreambooth's prompts_and_classes.txt: 'subject_name,class' lines; the prompts after them are scenes."""
    for number, line in enumerate(text.splitlines(), 1):
        match = _SUBJECT.match(line.strip())
        if match is None or match[1] == "subject_name":
            continue
        noun = match[2].strip()
        where = {"source": "google/dreambooth prompts_and_classes.txt", "confidence": 0.9}
        fields = {
            "id": match[1],
            "name": match[1],
            "kind": "dreambooth",
            "class_noun": noun,
            "provenance": {"card": where},
        }
        yield Row(f"{file}:{number}", json.dumps(fields))


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:120] or "checkpoint"


_FORMATS: dict[str, Callable[[Mapping[str, Any]], Iterator[Found]]] = {
    "modelVersions": _civitai_model,
    "trainedWords": _civitai_version,
    "adapter_id": _stylus,
    "trigger_word": _gallery,
    "instance_prompt": _custom_concept,
}
