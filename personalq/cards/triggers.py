"""Trigger words as they are meant: prompt syntax that people paste beside them is taken off. Knows text only."""

from __future__ import annotations

import re
from collections.abc import Iterable

# '<lora:x:1>' asks A1111 for a file; no text encoder ever sees it. An unclosed one at the end was cut off.
_TAG = re.compile(r"<\s*(?:lora|lyco|lycoris|locon|hypernet|hypernetwork)\s*:[^<>]*(?:>|$)", re.IGNORECASE)
# '(sks dog:1.2)' weighs words, '((sks dog))' too; '\(' is a bracket that belongs to the words.
_INSIDE = r"((?:\\.|[^()\\])*?)"
_WEIGHT = re.compile(rf"(?<!\\)\({_INSIDE}\s*:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\)")
_WRAPPED = re.compile(rf"(\(+){_INSIDE}(\)+)")
_SHOWN, _MAX_CHARS = 3, 80


def without_syntax(text: str) -> str:
    """Return a group of trigger words without '<lora:...>' tags and '(...:1.2)' weights; '' when nothing else is there."""
    if "<" not in text and "(" not in text:
        return text.strip()
    before, found = "", text
    while found != before:  # what is taken off can leave another one behind
        before = found
        found = _WEIGHT.sub(r"\1", _TAG.sub(" ", found)).strip()
        wrapped = _WRAPPED.fullmatch(found)
        found = wrapped[2] if wrapped and len(wrapped[1]) == len(wrapped[3]) else found
    if found == text.strip():
        return found
    return ", ".join(words for part in found.split(",") if (words := " ".join(part.split())))


def meant(groups: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the groups of trigger words as they are meant, each once, and what to say about those that were changed."""
    read = {group: without_syntax(group) for group in groups}
    changed = [(group, rest) for group, rest in read.items() if rest != group.strip()]
    notes = [_note(group, rest) for group, rest in changed[:_SHOWN]]
    if len(changed) > _SHOWN:
        notes.append(f"{len(changed) - _SHOWN} more triggers hold prompt syntax, which was taken off")
    return tuple(dict.fromkeys(rest for rest in read.values() if rest)), tuple(notes)


def _note(group: str, rest: str) -> str:
    said = f"trigger {group[:_MAX_CHARS]!r} holds prompt syntax"
    return f"{said}: read as {rest[:_MAX_CHARS]!r}" if rest else f"{said} and no words: left out"
