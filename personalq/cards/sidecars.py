"""Read what other tools keep beside weights: Civitai's .civitai.info, A1111's and Lora-Manager's JSON. Hints, no errors.

Formats as their writers write them: .civitai.info is Civitai's model-version answer; A1111/Forge keeps 'activation text';
Lora-Manager keeps a .metadata.json with Civitai's answer inside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

from .card import MAX_LINE, MAX_TEXT, clean_text
from .kinds import civitai_kind
from .readme import Found
from .triggers import without_syntax

_BLOCKS = frozenset({"p", "br", "div", "li", "ul", "ol", "h1", "h2", "h3", "h4", "tr", "td", "hr", "pre"})
_TAGS = frozenset(
    re.findall(
        r"\w+",
        """a abbr b big blockquote br center code col dd del details div dl dt em figcaption figure font h1 h2 h3 h4 h5 h6
        head hr html body i iframe img ins kbd li link mark meta noscript ol p pre q s script small source span strike
        strong style sub summary sup table tbody td template th thead tr tt u ul video""",
    )
)
_LOOKS_LIKE_TAG = re.compile(r"<(?!!--)/?([^\s<>/]*)")
_MAX_WORDS = 64 * MAX_LINE
_HIDDEN = frozenset({"script", "style", "template", "head", "noscript"})


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in _HIDDEN
        self.parts.append(" " if tag in _BLOCKS else "")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(self.hidden - (tag in _HIDDEN), 0)
        self.parts.append(" " if tag in _BLOCKS else "")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def plain_text(html: object) -> str:
    """Return the visible text of HTML; '<sks>' and other signs that are no HTML tags stay."""
    if not isinstance(html, str):
        return ""
    text = html[: 8 * MAX_TEXT]
    parser = _Text()
    try:
        parser.feed(_LOOKS_LIKE_TAG.sub(_kept_if_tag, text))
        parser.close()
    except (AssertionError, ValueError):
        return " ".join(re.sub(r"<[^<>]*>", " ", text).split())
    return " ".join("".join(parser.parts).split())


def _kept_if_tag(match: re.Match[str]) -> str:
    """Escape what only looks like a tag: tokens are written <sks>."""
    return match[0] if match[1].lower() in _TAGS else f"&lt;{match[0][1:]}"


def trigger_groups(value: object) -> list[str]:
    """Return groups of trigger words: a list of groups, or text with groups parted by '||'; loose commas go.

    What is prompt syntax and no word ('<lora:x:1>', the weight in '(sks dog:1.2)') goes too.
    """
    items = value if isinstance(value, list) else value[:_MAX_WORDS].split("||") if isinstance(value, str) else []
    words = (item for item in items[:64] if isinstance(item, str | int) and not isinstance(item, bool))
    texts = (clean_text(str(item), MAX_LINE) for item in words)
    groups = (without_syntax(re.sub(r" ?, ?", ", ", text).strip(" ,")) for text in texts)
    return list(dict.fromkeys(group for group in groups if group))


def unwanted(data: Mapping[str, Any]) -> str:
    """Return why a Civitai entry is left out unless asked for: 'a real person', 'adult content', or ''."""
    model = data.get("model")
    both = [data, model if isinstance(model, Mapping) else {}]
    if any(entry.get("poi") is True for entry in both):
        return "a real person (poi)"
    return "adult content (nsfw)" if any(entry.get("nsfw") is True for entry in both) else ""


def from_civitai_version(data: Mapping[str, Any], *, where: str) -> Found:
    """Read a model version (.civitai.info, or one of a model's modelVersions with its ``model`` beside it)."""
    model = data.get("model") if isinstance(data.get("model"), Mapping) else {}
    assert isinstance(model, Mapping)
    names = [n for n in (model.get("name"), data.get("name")) if isinstance(n, str) and n]
    images = [
        image for image in _list(data.get("images")) if isinstance(image, Mapping) and image.get("nsfw") is not True
    ]
    prompts = [m.get("prompt") for image in images if isinstance(m := image.get("meta"), Mapping)]
    about = plain_text(model.get("description")) or plain_text(data.get("description"))
    kind = civitai_kind(_text(model.get("type")))
    ids = (data.get("modelId"), data.get("id"))
    source = "civitai.com {}@{}".format(*ids) if all(isinstance(i, int) for i in ids) else ""
    return {
        "name": (" ".join(names), where, 0.9),
        "kind": (kind, where, 0.9),
        "base": (_text(data.get("baseModel")), where, 0.9),
        "trigger": (trigger_groups(data.get("trainedWords")), where, 0.95),
        "description": (about, where, 0.8),
        "tags": ([tag for tag in _list(model.get("tags")) if isinstance(tag, str)], where, 0.8),
        "example_prompts": ([p for p in prompts if isinstance(p, str)][:8], where, 0.6),
        "source": (source, where, 0.9),
    }


def from_a1111(data: Mapping[str, Any], *, where: str) -> Found:
    """Read A1111's or Forge's user metadata; 'SD1', 'SDXL' and 'Unknown' are its bases."""
    base = _text(data.get("sd version"))
    notes = " ".join(filter(None, (plain_text(data.get("description")), plain_text(data.get("notes")))))
    return {
        "trigger": (trigger_groups(data.get("activation text")), where, 0.9),
        "base": ("" if base == "Unknown" else base, where, 0.6),
        "description": (notes, where, 0.7),
    }


def from_lora_manager(data: Mapping[str, Any], *, where: str) -> Found:
    """Read Lora-Manager's .metadata.json; Civitai's answer inside it knows the trigger."""
    civitai = data.get("civitai")
    found = from_civitai_version(civitai, where=where) if isinstance(civitai, Mapping) else {}
    own: Found = {
        "name": (_text(data.get("model_name")), where, 0.8),
        "base": (_text(data.get("base_model")), where, 0.8),
        "description": (plain_text(data.get("modelDescription")), where, 0.8),
        "tags": ([tag for tag in _list(data.get("tags")) if isinstance(tag, str)], where, 0.7),
    }
    return {field: value for field, value in {**found, **{f: v for f, v in own.items() if v[0]}}.items() if value[0]}


def read_sidecar(data: Mapping[str, Any], *, where: str) -> Found | None:
    """Return the fields of a JSON object by the keys it has, or None when it is our own card.json or unknown."""
    if "activation text" in data or "sd version" in data:
        return from_a1111(data, where=where)
    if isinstance(data.get("civitai"), Mapping) or "modelDescription" in data or "preview_nsfw_level" in data:
        return from_lora_manager(data, where=where)
    if "trainedWords" in data or ("baseModel" in data and "modelId" in data):
        return from_civitai_version(data, where=where)
    return None


def json_object(text: str) -> dict[str, Any]:
    """Return a JSON object, or {} for anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
