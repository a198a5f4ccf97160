"""Which bundle and engine serve a checkpoint on a target: a table walk over a repository's bundles, never a build.

It reads manifests; it does not open graphs.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

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
    """Where a checkpoint's pictures come from. fallback_reason: '' or why the engine is not the one asked for."""

    bundle: Path
    engine_name: str
    fallback_reason: str = ""


@dataclass(frozen=True)
class _Table:
    """Bundles by checkpoint id, best first; a line for each folder that could not be read."""

    mtime_ns: int
    is_settled: bool
    bundles: dict[str, list[Path]] = field(default_factory=dict)
    references: set[Path] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)


class Store:
    """The bundles of one repository. The table is read again when a bundle was added or removed."""

    def __init__(self, repository: Path, cache: BundleCache | None = None) -> None:
        self.folder = repository / BUNDLES
        self._cache = cache
        self._table: _Table | None = None

    def bundles(self, checkpoint_id: str) -> list[Path]:
        """Every bundle of a checkpoint, best first: quantised before unquantised, then the latest."""
        return list(self._current().bundles.get(checkpoint_id, ()))

    def find(self, checkpoint_id: str, target: str = "onnxruntime") -> Found:
        """The best bundle and engine for (checkpoint, target). Raises EngineError when there is no bundle."""
        if target not in TARGETS:
            raise EngineError(f"target: must be one of {', '.join(TARGETS)}, got {target!r}; choose one of them")
        table = self._current()
        bundles = table.bundles.get(checkpoint_id) or self._remote(checkpoint_id)
        if not bundles:
            unread = f" ({'; '.join(table.unreadable)})" if table.unreadable else ""
            raise EngineError(
                f"{checkpoint_id}: must have a bundle, got none{unread}: run 'personalq export {checkpoint_id}'"
            )
        lack = "" if target == FALLBACK else missing(target) or misfit(bundles[0], target)
        if lack:
            return Found(bundles[0], FALLBACK, f"{lack}; running {TITLES[FALLBACK]} on the CPU")
        return Found(bundles[0], target)

    def reference(self, checkpoint_id: str) -> Path:
        """The checkpoint's unquantised bundle, to compare with. Raises EngineError when there is none."""
        table = self._current()
        found = [bundle for bundle in table.bundles.get(checkpoint_id, ()) if bundle in table.references]
        if not found:
            raise EngineError(
                f"{checkpoint_id}: must have an unquantised bundle to compare with, got none: run 'personalq calibrate "
                f"{checkpoint_id} --policy fp32' and 'personalq export {checkpoint_id} --spec' with its fp32 spec"
            )
        return found[0]

    def drawable(self) -> dict[str, bool]:
        """Every checkpoint that has a bundle -> whether it also has an unquantised one."""
        table = self._current()
        here = {name: any(one in table.references for one in bundles) for name, bundles in table.bundles.items()}
        return {**dict.fromkeys(self._cache.ids(), False), **here} if self._cache is not None else here

    def manifest(self, bundle: Path) -> Manifest:
        """A found bundle's manifest, also of one that is not fetched yet."""
        is_remote = self._cache is not None and self._cache.holds(bundle)
        return self._cache.manifest(bundle) if is_remote and self._cache else read_manifest(bundle)

    def ensure(self, bundle: Path) -> None:
        """Have a found bundle's files here: fetched from the store now when they are not."""
        if self._cache is not None and self._cache.holds(bundle):
            self._cache.ensure(bundle)

    def _remote(self, checkpoint_id: str) -> list[Path]:
        found = None if self._cache is None else self._cache.find(checkpoint_id)
        return [] if found is None else [found]

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


def _read_table(folder: Path, mtime_ns: int) -> _Table:
    table = _Table(mtime_ns=mtime_ns, is_settled=time.time() - mtime_ns / 1e9 > _CLOCK_TICK_S)
    ranked: dict[str, list[tuple[bool, int, str, Path]]] = {}
    files = sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    for file in files:
        if file.parent.name.startswith("."):
            continue  # being written, or left behind by a process that was killed
        try:
            content = json.loads(file.read_text())
            owner, policy = str(content["checkpoint"]["id"]), str(content["spec"]["policy"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            table.unreadable.append(f"bundle {file.parent.name[:12]} cannot be read: {type(error).__name__}")
            continue
        if policy in REFERENCE_POLICIES:
            table.references.add(file.parent)
        rank = (policy not in REFERENCE_POLICIES, file.stat().st_mtime_ns, file.parent.name, file.parent)
        ranked.setdefault(owner, []).append(rank)
    for owner, ranks in ranked.items():
        table.bundles[owner] = [rank[-1] for rank in sorted(ranks, reverse=True)]
    return table
