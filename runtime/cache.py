"""Bundles of a remote store in a local folder: fetched when an engine is loaded, evicted when least recently used.

`<repository>/cache/` looks like a repository (bundles/, shared/). One process at a time removes from it.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from personalq.adapters import AdapterManifest, read_any
from personalq.bundle import MANIFEST, Manifest
from personalq.errors import BundleError, EngineError, PersonalQError, RepositoryError
from personalq.repository import Repository
from personalq.repository.atomic import remove, temporary_beside
from personalq.repository.remote import Listed, Remote, is_there
from personalq.repository.sharing import forget_dangling, note_shared, shared_file

logger = logging.getLogger("personalq.runtime")
CACHE, USED = "cache", "used"
_REMEMBERED_S = 30.0  # how long the store's answer about the newest bundle is cached


class BundleCache:
    """What a store holds, and what of it is here. limit_bytes: of all bundles here; the one in use may pass it alone."""

    def __init__(self, remote: Remote, root: Path, limit_bytes: int) -> None:
        self.remote, self.root, self.limit_bytes = remote, root, limit_bytes
        self.fetched_bytes = 0
        self._keys: dict[tuple[str, str], tuple[float, str]] = {}
        self._ids: tuple[float, list[str]] = (0.0, [])
        self._manifests: dict[str, Manifest | AdapterManifest] = {}
        self._changing = threading.Lock()

    def find(self, checkpoint_id: str) -> Path | None:
        """Where a checkpoint's best bundle is, or will be when it was fetched, an engine or an adapter; None: there is none."""
        return self._find(("checkpoint", checkpoint_id), self.remote.listed)

    def find_base(self, base_sha256: str) -> Path | None:
        """Where the best engine for adapters of a base is, or will be; None when the store has none."""
        return self._find(("base", base_sha256), self.remote.base)

    def _find(self, what: tuple[str, str], listed: Callable[[str], Listed | None]) -> Path | None:
        asked, key = self._keys.get(what, (0.0, ""))
        if not asked or time.monotonic() - asked > _REMEMBERED_S:
            found = listed(what[1])
            key = "" if found is None else found.key
            self._keys[what] = (time.monotonic(), key)
        if not key:
            return None
        bundle = self.root / "bundles" / key
        if bundle.is_dir():
            self._touch(bundle)
        return bundle

    def ids(self) -> list[str]:
        """Every checkpoint in the store."""
        asked, ids = self._ids
        if not asked or time.monotonic() - asked > _REMEMBERED_S:
            ids = self.remote.ids()
            self._ids = (time.monotonic(), ids)
        return ids

    def holds(self, bundle: Path) -> bool:
        """Whether a folder is one of this cache's."""
        return bundle.parent == self.root / "bundles"

    def manifest(self, bundle: Path) -> Manifest:
        """An engine's manifest, from here or from the store. Raises BundleError for an adapter."""
        found = self.any_manifest(bundle)
        if isinstance(found, AdapterManifest):
            raise BundleError(f"bundle {bundle.name[:12]}: must be an engine, got an adapter; attach it to its base's")
        return found

    def any_manifest(self, bundle: Path) -> Manifest | AdapterManifest:
        """The manifest of an engine or an adapter, from here or from the store."""
        if (bundle / MANIFEST).is_file():
            return read_any(bundle)
        if bundle.name not in self._manifests:
            self._manifests[bundle.name] = self.remote.manifest(bundle.name)[0]
        return self._manifests[bundle.name]

    def ensure(self, *bundles: Path) -> None:
        """Fetch bundles that are not here, then remove what passes the limit but these: an adapter needs its base's engine.

        Raises EngineError for one that cannot ever fit.
        """
        with self._changing:
            for bundle in bundles:
                if not bundle.is_dir():
                    self._fetch(bundle)
                self._touch(bundle)
            self._evict(bundles)

    def _fetch(self, bundle: Path) -> None:
        size = sum(entry.bytes for entry in self.any_manifest(bundle).files.values())
        if size > self.limit_bytes:
            raise EngineError(
                f"cache: a bundle must fit the limit of {self.limit_bytes / 1e6:.0f} MB, got one of {size / 1e6:.0f} MB; "
                "raise --cache-mb"
            )
        try:
            self.fetched_bytes += self.remote.fetch(bundle.name, bundle, lambda digest: shared_file(self.root, digest))
        except RepositoryError as error:
            if not is_there(error, bundle):
                raise
        files = read_any(bundle).files
        note_shared(self.root, bundle, {name: entry.sha256 for name, entry in files.items()})

    def _evict(self, kept: Sequence[Path]) -> None:
        others = sorted((b for b in self._bundles() if b not in kept), key=self._used)
        while others and self.used_bytes() > self.limit_bytes:
            bundle = others.pop(0)
            gone = temporary_beside(bundle)
            os.rename(bundle, gone)  # no reader meets half of it; what is mapped stays with its engine
            remove(gone)
            remove(self.root / USED / bundle.name)
            logger.warning("cache: bundle %s removed, it was not used for longest", bundle.name[:12])
        forget_dangling(self.root)

    def used_bytes(self) -> int:
        """Bytes on disk of all bundles here, shared files once."""
        sizes = {}
        for bundle in self._bundles():
            for file in bundle.rglob("*"):
                if file.is_file():
                    stat = file.stat()
                    sizes[stat.st_dev, stat.st_ino] = stat.st_size
        return sum(sizes.values())

    def _bundles(self) -> list[Path]:
        return sorted((self.root / "bundles").glob("[!.]*"))

    def _touch(self, bundle: Path) -> None:
        note = self.root / USED / bundle.name
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()

    def _used(self, bundle: Path) -> int:
        note = self.root / USED / bundle.name
        return note.stat().st_mtime_ns if note.is_file() else 0


def take_cards(repository: Repository, remote: Remote) -> int:
    """Import the store's cards that the repository does not have, so that Check-in knows them; return how many."""
    known = {card.id for card in repository.cards()}

    def read(checkpoint_id: str) -> dict[str, Any] | None:
        try:
            return remote.card(checkpoint_id).model_dump(mode="json", exclude_defaults=True)
        except PersonalQError as error:
            logger.warning("%s", error)
            return None

    with ThreadPoolExecutor(16) as pool:
        cards = [card for card in pool.map(read, [one for one in remote.ids() if one not in known]) if card]
    if not cards:
        return 0
    file = temporary_beside(repository.root / "cards.jsonl")
    try:
        file.write_text("".join(json.dumps(card) + "\n" for card in cards))
        return len(repository.add_cards(file, adult=True).added)
    finally:
        remove(file)
