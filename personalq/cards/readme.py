"""Read what a model card in README.md says: YAML front matter and the phrases that training scripts write.

Knows text only. Everything is a hint with a confidence; nothing here fails on a strange card, it just finds less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from .triggers import without_syntax

MAX_FRONT_BYTES = 64_000
MAX_BODY_CHARS = 200_000
Found = dict[str, tuple[Any, str, float]]
"""Field -> (value, where it was found, confidence 0..1)."""

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_TEMPLATE = re.compile(
    r"^(?:an?|the|my)?\s*(?:photo|picture|image|painting|drawing|rendering|pixel picture|portrait|close-?up)s?\s+of\s+"
    r"(?:an?\s+|the\s+|my\s+)?"
    r"|^(?:a |an )?(?:[\w ]{0,20} )?in the style of\s+|^(?:an?|the|my)\s+",
    re.IGNORECASE,
)
_CUES = (
    (re.compile(r"you should use\s+[`*\"']*(.{1,200}?)[`*\"']*\s+to trigger", re.IGNORECASE), 0.95),
    (re.compile(r"instance[_ ]prompt`?[\s:*`\"']{1,8}([^\n*`\"]{2,200})", re.IGNORECASE), 0.8),
    (re.compile(r"this is the\s+[`*\"']*(<[^>\n]{1,60}>)[`*\"']*\s+concept", re.IGNORECASE), 0.9),
    (re.compile(r"weights were trained on\s+[`*\"']*([^\n`*\"]{2,200}?)[`*\"']*\s+using", re.IGNORECASE), 0.7),
    (re.compile(r"trigger(?: words?| tokens?| phrases?)?\s*(?:is|are|:)\s*[`*\"']+([^`*\"\n]{1,200})", re.IGNORECASE), 0.7),
)  # fmt: skip
_PLACEHOLDERS = frozenset({"", "-", "null", "none", "n/a"})


def read_readme(text: str) -> Found:
    """Return the fields a README.md gives: base, trigger, class_noun, tags, example_prompts, description, name."""
    front, body = split_front_matter(text)
    found: Found = {}
    for field, value in _from_front(front).items():
        found[field] = (value, "README.md front matter", 0.95)
    for field, (value, sure) in _from_body(body).items():
        found.setdefault(field, (value, "README.md text", sure))
    return found


def split_front_matter(text: str) -> tuple[Mapping[str, Any], str]:
    """Split YAML front matter from the body; a broken or oversized block counts as empty."""
    match = _FRONT.match(text[: MAX_FRONT_BYTES + 200])
    if match is None:
        return {}, text[:MAX_BODY_CHARS]
    body = text[match.end() : match.end() + MAX_BODY_CHARS]
    try:
        data = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, LookupError):
        return {}, body
    return (data, body) if isinstance(data, dict) else ({}, body)


def trigger_from_prompt(prompt: str) -> tuple[str, str]:
    """Split an instance prompt into (trigger, class noun): 'a photo of sks dog' -> ('sks', 'dog').

    A prompt of nothing but syntax ('<lora:x:1>') gives ('', '').
    """
    phrase = _TEMPLATE.sub("", without_syntax(prompt).strip("`*\"'., "), count=1).strip()
    words = phrase.split()
    if 2 <= len(words) <= 3 and _is_token(words[0]):
        return words[0], " ".join(words[1:])
    return phrase, ""


def _is_token(word: str) -> bool:
    has_odd_sign = re.search(r"[<>\d_]", word) is not None or word.isupper()
    return has_odd_sign or len(word) <= 4 or re.search(r"[^aeiouy\W]{3,}", word.lower()) is not None


def _from_front(front: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in _strings(front.get("base_model")):
        found.setdefault("base", base)
    for prompt in _strings(front.get("instance_prompt")):
        trigger, noun = trigger_from_prompt(prompt)
        if trigger:
            found.setdefault("trigger", [trigger])
        if noun:
            found.setdefault("class_noun", noun)
    if tags := _strings(front.get("tags")):
        found["tags"] = tags
    widgets = front.get("widget")
    rows = [row for row in widgets if isinstance(row, Mapping)] if isinstance(widgets, list) else []
    if prompts := [text for row in rows for text in _strings(row.get("text"))]:
        found["example_prompts"] = prompts
    return found


def _strings(value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [s.strip() for s in items[:64] if isinstance(s, str) and s.strip().lower() not in _PLACEHOLDERS]


def _from_body(body: str) -> dict[str, tuple[Any, float]]:
    found: dict[str, tuple[Any, float]] = {}
    for cue, sure in _CUES:
        match = cue.search(body)
        if match is None or match.group(1).strip().lower() in _PLACEHOLDERS:
            continue
        trigger, noun = trigger_from_prompt(match.group(1))
        if trigger:
            found.setdefault("trigger", ([trigger], sure))
        if noun:
            found.setdefault("class_noun", (noun, sure))
    if title := re.search(r"^#\s+(.{1,200})$", body, re.MULTILINE):
        found["name"] = (re.sub(r"^.*?LoRA - |^DreamBooth - |<Gallery />", "", title.group(1)).strip(), 0.6)
    if description := _first_paragraph(body):
        found["description"] = (description, 0.6)
    return found


def _first_paragraph(body: str) -> str:
    for block in re.split(r"\r?\n\s*\r?\n", body):
        text = re.sub(r"<[A-Za-z/!][^<>]{0,300}>|!\[[^\]]*\]\([^)]*\)", "", block).strip()
        if len(text) >= 20 and text[0] not in "#-*|`>![<" and not text.startswith("---"):
            return re.sub(r"[*_`]{1,3}", "", text)
    return ""
