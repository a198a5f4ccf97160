"""Which bundle and engine serve a checkpoint on a target: a table walk over a repository's bundles, never a build.

It reads manifests; it does not open graphs.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personalq.adapters import AdapterManifest
from personalq.bundle import MANIFEST, Manifest, read_manifest
from personalq.errors import EngineError
from personalq.repository.remote import Remote

from .cache import CACHE, BundleCache
from .targets import FALLBACK, TARGETS, TITLES, misfit, missing

BUNDLES = "bundles"
REFERENCE_POLICIES = ("fp32", "fp16")  # unquantised bundles: served only when nothing smaller exists

# Two changes of a folder within one tick of the file system's clock look like one, so a table that recent is not kept.
_CLOCK_TICK_S = 0.05


@dataclass(frozen=True)
class Found:
    """Where a checkpoint's pictures come from: its own bundle, or its base's and its adapter's beside it.

    fallback_reason: '' or why the engine is not the one asked for.
    """

    bundle: Path
    engine_name: str
    fallback_reason: str = ""
    adapter: Path | None = None

    @property
    def form(self) -> str:
        """'attached' or 'merged'."""
        return "merged" if self.adapter is None else "attached"


@dataclass(frozen=True)
class _Engine:
    """A bundle with graphs: its rank among others (quantised before unquantised, then the latest), and which weights it is of."""

    rank: tuple[bool, int, str]
    bundle: Path
    weights: str
    is_base: bool

    @property
    def is_reference(self) -> bool:
        return not self.rank[0]


@dataclass(frozen=True)
class _Adapter:
    """An adapter's bundle; made_at in ns; weights: of the base that it was made for."""

    made_at: int
    bundle: Path
    weights: str


@dataclass(frozen=True)
class _Table:
    """What the bundles are, each list best first; a line for each folder that could not be read."""

    mtime_ns: int
    is_settled: bool
    engines: dict[str, list[_Engine]] = field(default_factory=dict)  # by checkpoint or base
    adapters: dict[str, list[_Adapter]] = field(default_factory=dict)  # by checkpoint
    unreadable: list[str] = field(default_factory=list)

    def bases(self, weights: str) -> list[_Engine]:
        """The engines of a base, by its weights."""
        return [one for engines in self.engines.values() for one in engines if one.is_base and one.weights == weights]

    def forms(self, checkpoint_id: str) -> list[tuple[_Engine, Path | None]]:
        """What can draw a checkpoint, best first: quantised before unquantised, then the form that was exported last."""
        ranked = [(one.rank, one, None) for one in self.engines.get(checkpoint_id, ())]
        found: list[tuple[tuple[bool, int, str], _Engine, Path | None]] = [*ranked]
        for adapter in self.adapters.get(checkpoint_id, ())[:1]:
            for base in self.bases(adapter.weights):
                found.append(((base.rank[0], adapter.made_at, base.bundle.name), base, adapter.bundle))
        best = sorted(found, key=lambda one: (one[0], one[1].rank), reverse=True)
        return [(engine, bundle) for _, engine, bundle in best]


class Store:
    """The bundles of one repository. The table is read again when a bundle was added or removed."""

    def __init__(self, repository: Path, cache: BundleCache | None = None) -> None:
        self.folder = repository / BUNDLES
        self._cache = cache
        self._table: _Table | None = None

    def bundles(self, checkpoint_id: str) -> list[Path]:
        """Every bundle with graphs of a checkpoint or base, best first: quantised before unquantised, then the latest."""
        return [one.bundle for one in self._current().engines.get(checkpoint_id, ())]

    def find(self, checkpoint_id: str, target: str = "onnxruntime") -> Found:
        """The best bundle and engine for (checkpoint, target). Raises EngineError when there is no bundle."""
        _check_target(target)
        table = self._current()
        forms = [(engine.bundle, adapter) for engine, adapter in table.forms(checkpoint_id)] or self._remote(
            checkpoint_id
        )
        if not forms:
            raise EngineError(_none_of(checkpoint_id, table))
        return _on_target(*forms[0], target)

    def on_base(self, base_id: str, target: str = "onnxruntime") -> Found:
        """The best engine of a base, to which adapters are attached. Raises EngineError when there is none."""
        _check_target(target)
        engines = [one for one in self._current().engines.get(base_id, ()) if one.is_base]
        if not engines:
            how = f"run 'personalq calibrate --base {base_id}' and 'personalq export --base {base_id}'"
            raise EngineError(f"base {base_id}: must have an engine, got none: {how}")
        return _on_target(engines[0].bundle, None, target)

    def adapter(self, checkpoint_id: str) -> Path | None:
        """The checkpoint's latest adapter; None when it has none."""
        found = self._current().adapters.get(checkpoint_id, ())
        return found[0].bundle if found else None

    def reference(self, checkpoint_id: str) -> Found:
        """The checkpoint's unquantised form, to compare with. Raises EngineError when there is none."""
        found = [one for one in self._current().forms(checkpoint_id) if one[0].is_reference]
        if not found:
            raise EngineError(
                f"{checkpoint_id}: must have an unquantised bundle to compare with, got none: run 'personalq calibrate "
                f"{checkpoint_id} --policy fp32' and 'personalq export {checkpoint_id} --spec' with its fp32 spec"
            )
        return Found(found[0][0].bundle, FALLBACK, adapter=found[0][1])

    def drawable(self) -> dict[str, bool]:
        """Every checkpoint that has a bundle -> whether it also has an unquantised one."""
        table = self._current()
        ids = [name for name, engines in table.engines.items() if not all(one.is_base for one in engines)]
        forms = {name: table.forms(name) for name in {*ids, *table.adapters}}
        here = {name: any(one.is_reference for one, _ in found) for name, found in forms.items() if found}
        return {**dict.fromkeys(self._cache.ids(), False), **here} if self._cache is not None else here

    def manifest(self, bundle: Path) -> Manifest:
        """A found bundle's manifest, also of one that is not fetched yet."""
        is_remote = self._cache is not None and self._cache.holds(bundle)
        return self._cache.manifest(bundle) if is_remote and self._cache else read_manifest(bundle)

    def ensure(self, *bundles: Path) -> None:
        """Have the files of found bundles here, all at once: fetched from the store now when they are not."""
        held = [bundle for bundle in bundles if self._cache is not None and self._cache.holds(bundle)]
        if held and self._cache is not None:
            self._cache.ensure(*held)

    def _remote(self, checkpoint_id: str) -> list[tuple[Path, Path | None]]:
        """What a remote store has of a checkpoint: its own engine, or its adapter and its base's engine, here or there."""
        found = None if self._cache is None else self._cache.find(checkpoint_id)
        if found is None or self._cache is None:
            return []
        manifest = self._cache.any_manifest(found)
        if not isinstance(manifest, AdapterManifest):
            return [(found, None)]
        here = self._current().bases(manifest.base_sha256)
        base = here[0].bundle if here else self._cache.find_base(manifest.base_sha256)
        return [] if base is None else [(base, found)]

    def _current(self) -> _Table:
        """A bundle is renamed into the folder whole, so the folder's modification time says whether the table is current."""
        mtime_ns = self.folder.stat().st_mtime_ns if self.folder.is_dir() else 0
        table = self._table
        if table is None or table.mtime_ns != mtime_ns or not table.is_settled:
            table = _read_table(self.folder, mtime_ns)
            self._table = table
        return table


def open_store(repository: Path, url: str = "", cache_mb: float = 0.0) -> Store:
    """The bundles of a repository and, with a URL, those of a remote store, kept in a cache of so many megabytes."""
    cache = BundleCache(Remote(url), repository / CACHE, round(cache_mb * 1e6)) if url else None
    return Store(repository, cache)


def find(repository: Path, checkpoint_id: str, target: str = "onnxruntime") -> Found:
    """One look-up in a repository; keep a Store for many."""
    return Store(repository).find(checkpoint_id, target)


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise EngineError(f"target: must be one of {', '.join(TARGETS)}, got {target!r}; choose one of them")


def _none_of(checkpoint_id: str, table: _Table) -> str:
    """Why a checkpoint cannot be drawn, and what to run."""
    unread = f" ({'; '.join(table.unreadable)})" if table.unreadable else ""
    if checkpoint_id in table.adapters:
        return (
            f"{checkpoint_id}: its base must have an engine to attach it to, got none{unread}: run 'personalq calibrate "
            "--base BASE' and 'personalq export --base BASE', or 'personalq export ID --form merged'"
        )
    return f"{checkpoint_id}: must have a bundle, got none{unread}: run 'personalq export {checkpoint_id}'"


def _on_target(bundle: Path, adapter: Path | None, target: str) -> Found:
    lack = "" if target == FALLBACK else missing(target) or misfit(bundle, target, adapter)
    if lack:
        return Found(bundle, FALLBACK, f"{lack}; running {TITLES[FALLBACK]} on the CPU", adapter)
    return Found(bundle, target, adapter=adapter)


def _read_table(folder: Path, mtime_ns: int) -> _Table:
    table = _Table(mtime_ns=mtime_ns, is_settled=time.time() - mtime_ns / 1e9 > _CLOCK_TICK_S)
    for file in sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []:
        if file.parent.name.startswith("."):
            continue  # being written, or left behind by a process that was killed
        try:
            _enter(table, file, json.loads(file.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            table.unreadable.append(f"bundle {file.parent.name[:12]} cannot be read: {type(error).__name__}")
    for engines in table.engines.values():
        engines.sort(key=lambda one: one.rank, reverse=True)
    for adapters in table.adapters.values():
        adapters.sort(key=lambda one: (one.made_at, one.bundle.name), reverse=True)
    return table


def _enter(table: _Table, file: Path, content: Mapping[str, Any]) -> None:
    """Put one bundle into the table."""
    bundle, made_at, owner = file.parent, file.stat().st_mtime_ns, str(content["checkpoint"]["id"])
    if content.get("kind") == "adapter":
        table.adapters.setdefault(owner, []).append(_Adapter(made_at, bundle, str(content["base_sha256"])))
        return
    rank = (str(content["spec"]["policy"]) not in REFERENCE_POLICIES, made_at, bundle.name)
    engine = _Engine(rank, bundle, str(content.get("key_parts", {}).get("weights", "")), content.get("kind") == "base")
    table.engines.setdefault(owner, []).append(engine)
