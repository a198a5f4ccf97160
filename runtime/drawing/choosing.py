"""Which engine and which adapters an order means: ids, files and strengths in, an engine's bundle and adapters out.

It looks up and reads; it opens no graph.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from personalq.errors import EngineError, RepositoryError
from personalq.prompts import named_adapters, read_prompt
from personalq.repository import Repository

from ..store import Found, Store
from .attaching import Chosen, Opened, open_adapter
from .unexported import of_checkpoint, of_file

SUFFIX = ".safetensors"
_STRENGTH = re.compile(r"(?P<name>.+):(?P<strength>[+-]?(?:\d+\.?\d*|\.\d+))")
LARGEST = 10.0


@dataclass(frozen=True)
class Asked:
    """One adapter that was asked for: a checkpoint's id, or a file; text_strength None: the same as strength."""

    name: str
    strength: float = 1.0
    text_strength: float | None = None

    @property
    def is_file(self) -> bool:
        return self.name.endswith(SUFFIX)


@dataclass(frozen=True)
class Drawn:
    """What draws: a bundle for an engine, and the adapters attached to it; none: the bundle is the checkpoint's own."""

    found: Found
    chosen: tuple[Chosen, ...] = ()
    on_any_base: bool = False

    @property
    def form(self) -> str:
        return "attached" if self.chosen else "merged"


def read_asked(text: str) -> Asked:
    """'ID', 'FILE', 'ID:0.7' or 'FILE:0.7'. Raises EngineError for a strength that is out of range."""
    match = _STRENGTH.fullmatch(text)
    if match is None:
        return Asked(text)
    if abs(float(match["strength"])) > LARGEST:
        raise EngineError(
            f"--adapter {text}: strength must be within -10 and 10, got {match['strength']}; 0 to 1 is usual"
        )
    return Asked(match["name"], float(match["strength"]))


def with_tags(asked: Sequence[Asked], prompt: str, names: Mapping[str, str]) -> list[Asked]:
    """The adapters with what a prompt's <lora:NAME:STRENGTH> say: new ones are added, known ones take the tag's strengths.

    names: casefolded name -> id, of everything that a tag may mean; a tag of something else is left to whoever draws.
    """
    found = {one.name: one for one in asked}
    for name, tag in named_adapters(read_prompt(prompt)).items():
        if name in names:
            found[names[name]] = Asked(names[name], tag.unet, tag.text_encoder)
    return list(found.values())


def what_draws(
    repository: Repository, store: Store, asked: Sequence[Asked], on: str = "", target: str = "onnxruntime"
) -> Drawn:
    """An engine for what was asked, the first one the checkpoint itself. on: a base of its family, in place of its own.

    A checkpoint that has a form of its own and is alone is drawn as it was exported. Raises EngineError, RepositoryError.
    """
    alone = len(asked) == 1 and not on and not asked[0].is_file
    if alone and _is_whole(asked[0]) and (store.adapter(asked[0].name) or store.bundles(asked[0].name)):
        found = store.find(asked[0].name, target)
        opened = () if found.adapter is None else (Chosen(open_adapter(found.adapter)),)
        return Drawn(found, opened)
    base = on or _base_of(repository, asked)
    if alone and not _has_engine(store, base):
        return Drawn(
            store.find(asked[0].name, target)
        )  # its own engine, or what to run; another strength is refused there
    found = store.on_base(base, target)
    chosen = tuple(Chosen(_opened(repository, store, one, base), one.strength, one.text_strength) for one in asked)
    return Drawn(found, chosen, on_any_base=bool(on))


def _is_whole(one: Asked) -> bool:
    return one.strength == 1 and one.text_strength in (None, 1)


def _has_engine(store: Store, base: str) -> bool:
    try:
        store.on_base(base)
    except EngineError:
        return False
    return True


def _base_of(repository: Repository, asked: Sequence[Asked]) -> str:
    """The base of the first checkpoint that has one; a repository's only base for files alone."""
    bases = [card.base for one in asked if not one.is_file and (card := repository.card(one.name)).base]
    known = repository.bases()
    if not bases and len(known) != 1:
        raise RepositoryError(
            f"{asked[0].name if asked else 'adapter'}: must have a base here, got {', '.join(known) or 'none'}; "
            "name one with --on BASE"
        )
    return bases[0] if bases else known[0]


def _opened(repository: Repository, store: Store, one: Asked, base: str) -> Opened:
    """An adapter as it was exported, or made now of the checkpoint's or the file's delta."""
    if one.is_file:
        return of_file(repository, Path(one.name), base)
    exported = store.adapter(repository.card(one.name).id)
    if exported is not None:
        return open_adapter(exported)
    return of_checkpoint(repository, one.name)
