"""Cards as other people's lists hold them: Civitai models, StylusDocs, LoRA galleries, CustomConcept101. Hints, no errors.

A reader turns one entry into the fields of its cards; what it cannot use comes back as the reason, in one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .kinds import known_kind
from .readme import Found, trigger_from_prompt
from .sidecars import from_civitai_version, plain_text, trigger_groups

Reader = Callable[[Mapping[str, Any]], Iterator[Found | str]]


def reader_of(entry: Mapping[str, Any]) -> Reader | None:
    """The reader of an entry, by the key that only its format has; None for our own cards and for unknown entries."""
    return None if "kind" in entry else next((reader for key, reader in FORMATS.items() if key in entry), None)


def listed(entry: Mapping[str, Any], key: str) -> list[Any]:
    """The list in a field; empty when it holds anything else."""
    value = entry.get(key)
    return value if isinstance(value, list) else []


def _civitai_model(entry: Mapping[str, Any]) -> Iterator[Found | str]:
    """Yield one card per version: the versions of a model have different triggers and bases."""
    versions = listed(entry, "modelVersions")
    if not versions:
        yield "must have a version, got none in modelVersions"
    model = {key: value for key, value in entry.items() if key != "modelVersions"}
    for number, version in enumerate(versions, 1):
        if isinstance(version, Mapping):
            yield _version({"modelId": entry.get("id"), **version, "model": model}, "civitai model")
        else:
            yield f"version {number} must be a JSON object, got {type(version).__name__}"


def _civitai_version(entry: Mapping[str, Any]) -> Iterator[Found | str]:
    yield _version(entry, "civitai version")


def _version(entry: Mapping[str, Any], where: str) -> Found | str:
    ids = [entry.get("modelId"), entry.get("id")]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) and one != "" for one in ids):
        shown = " and ".join(repr(one)[:40] if isinstance(one, str | int) else type(one).__name__ for one in ids)
        return f"must have the ids of its model and its version, got {shown.replace('NoneType', 'none')}"
    found = from_civitai_version(entry, where=where)
    return {**found, "id": ("civitai-{}-{}".format(*ids), where, 1.0)}


def _stylus(entry: Mapping[str, Any]) -> Iterator[Found | str]:
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


def _gallery(entry: Mapping[str, Any]) -> Iterator[Found | str]:
    where, repo = "gallery list", str(entry.get("repo") or entry.get("title") or "")
    if not repo:
        yield "must have a repo or a title, got neither"
        return
    yield {
        "id": (_slug(repo), where, 1.0),
        "kind": ("lora", where, 0.9),
        "name": (plain_text(entry.get("title")), where, 0.9),
        "trigger": (trigger_groups([entry.get("trigger_word")]), where, 0.9),
        "description": (plain_text(entry.get("description")), where, 0.6),
        "example_prompts": ([p for p in listed(entry, "prompts") if isinstance(p, str)][:8], where, 0.6),
        "source": (repo, where, 1.0),
    }


def _custom_concept(entry: Mapping[str, Any]) -> Iterator[Found | str]:
    where, prompt = "CustomConcept101", str(entry.get("instance_prompt") or "").replace("{}", "<new1>")
    name = str(entry.get("instance_data_dir") or "").rstrip("/").rsplit("/", 1)[-1] or _slug(prompt)
    trigger, noun = trigger_from_prompt(prompt[:_MAX_PROMPT])
    yield {
        "id": (_slug(name), where, 1.0),
        "kind": (known_kind(str(entry.get("type", ""))) or "custom_diffusion", where, 0.8),
        "name": (name, where, 0.9),
        "trigger": ([trigger] if trigger else [], where, 0.9),
        "class_noun": (str(entry.get("class_prompt") or "") or noun, where, 0.9),
        "example_prompts": ([prompt] if prompt else [], where, 0.9),
    }


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text[:_MAX_PROMPT]).strip("-.")[:120] or "checkpoint"


_MAX_PROMPT = 4000
FORMATS: dict[str, Reader] = {
    "modelVersions": _civitai_model,
    "trainedWords": _civitai_version,
    "adapter_id": _stylus,
    "trigger_word": _gallery,
    "instance_prompt": _custom_concept,
}
