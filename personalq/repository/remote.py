"""Bundles at a URL (s3://, gs://, az://, file://): each is published once and whole, and fetched with every byte checked.

    files/<sha256>          one object for equal files of all bundles
    bundles/<key>.json      the manifest: put last, and only if it is not there yet (a conditional put)
    checkpoints/<id>.json   the card, and which bundle is the best one: an engine of its own, or an adapter
    bases/<sha256>.json     by the hash of a base's weights: which engine its adapters are best attached to

It knows objects and hashes, not who draws with them. Credentials come from the environment, as the cloud's own tools take them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..adapters import AdapterManifest, parse_any, read_any
from ..bundle import MANIFEST, FileEntry, Manifest, bundle_key, file_sha256
from ..cards.card import Card, folder_name, id_from_folder, parse_card
from ..errors import BundleError, FleetError, MissingExtraError, RepositoryError
from .atomic import atomic_directory, named_failure
from .bundles import REFERENCES

ATTACHED = "attached"  # in place of a policy: an adapter, which has none
_PIECE = 4 << 20
_RETRIES: dict[str, Any] = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
Known = Callable[[str], Path | None]


@dataclass(frozen=True)
class Listed:
    """A checkpoint or base in a store: its card as JSON text, its best bundle and its policy ('attached': an adapter)."""

    card: str
    key: str
    policy: str


class Remote:
    """One store. Raises FleetError when it does not answer, BundleError for what is not there or not as it was published."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise MissingExtraError("obstore", "store") from error
        self.url, self._objects = url.rstrip("/"), obstore
        more: dict[str, Any] = {"mkdir": True} if url.startswith("file:") else {"retry_config": _RETRIES}
        with self._named("the store"):
            self._store: Any = from_url(url, **more)

    def publish(self, bundle: Path, card: Card) -> bool:
        """Put a bundle's files, then its manifest; False when it was there already. Safe to do twice, by two at a time.

        card: the checkpoint's; of a base's engine any that has the base's id.
        """
        manifest = read_any(bundle)
        for name, entry in manifest.files.items():
            self._put_file(bundle / name, entry)
        is_new = self._put(f"bundles/{manifest.key}.json", (bundle / MANIFEST).read_bytes(), mode="create")
        if isinstance(manifest, AdapterManifest):
            self._point(_checkpoint(card.id), manifest.key, ATTACHED, card)
        elif manifest.kind == "base":
            self._point(_base(manifest.key_parts["weights"]), manifest.key, manifest.spec.policy, card)
        else:
            self._point(_checkpoint(card.id), manifest.key, manifest.spec.policy, card)
        return is_new

    def has(self, key: str) -> bool:
        """Whether a bundle was published, whole."""
        return self._size(f"bundles/{key}.json") is not None

    def manifest(self, key: str) -> tuple[Manifest | AdapterManifest, bytes]:
        """A published bundle's manifest and its bytes. Raises BundleError for one that does not fit its key."""
        where = f"bundles/{key}.json"
        data = self._read(where)
        cure = "publish the bundle again"
        try:
            manifest = parse_any(data)
        except ValidationError as error:
            raise BundleError(f"{self.url}/{where}: must be a manifest, got another file; {cure}") from error
        if manifest.key != key or bundle_key(manifest.key_parts) != key:
            raise BundleError(f"{self.url}/{where}: must be of the key in its name, got another; {cure}")
        odd = next((name for name in manifest.files if Path(name).name != name or name.startswith(".")), None)
        if odd is not None:
            raise BundleError(f"{self.url}/{where}: file names must be plain, got {odd[:80]!r}; {cure}")
        return manifest, data

    def ids(self) -> list[str]:
        """Every checkpoint with a bundle, from one listing."""
        with self._named("checkpoints/"):
            pages = self._objects.list(self._store, "checkpoints")
            return sorted(id_from_folder(Path(one["path"]).stem) for page in pages for one in page)

    def listed(self, checkpoint_id: str) -> Listed | None:
        """A checkpoint's card and best bundle; None when it was never published."""
        return self._listed(_checkpoint(checkpoint_id))

    def base(self, base_sha256: str) -> Listed | None:
        """The best engine of a base, by the hash of its weights; None when none was published."""
        return self._listed(_base(base_sha256))

    def card(self, checkpoint_id: str) -> Card:
        """A published checkpoint's card, read like any card from outside."""
        found = self.listed(checkpoint_id)
        if found is None:
            raise BundleError(
                f"{self.url}: must hold {checkpoint_id[:80]!r}, got nothing; publish it with 'export --store'"
            )
        return parse_card(found.card, where=f"{self.url}: {checkpoint_id[:80]}")[0]

    def fetch(self, key: str, folder: Path, known: Known = lambda _: None) -> int:
        """Bring a bundle to `folder`, whole or not at all; returns the bytes that came over the network.

        known: sha256 -> a file here that should have these bytes; it is linked when it has.
        """
        manifest, data = self.manifest(key)
        fetched = 0
        with atomic_directory(folder) as place:
            for name, entry in manifest.files.items():
                other = known(entry.sha256)
                if other is not None and _link(other, place / name, entry):
                    continue
                self._download(entry, place / name)
                fetched += entry.bytes
            (place / MANIFEST).write_bytes(data)
        return fetched

    # inside

    def _listed(self, where: str) -> Listed | None:
        if self._size(where) is None:
            return None
        try:
            found = json.loads(self._read(where))
            return Listed(card=str(found["card"]), key=str(found["key"]), policy=str(found["policy"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{self.url}/{where}: must name a card and a bundle, got {error}; publish again"
            ) from error

    def _point(self, where: str, key: str, policy: str, card: Card) -> None:
        """Say that this bundle is the best one, unless it is a reference and there is a better one."""
        before = self._listed(where)
        if before is not None and policy in REFERENCES and before.policy not in REFERENCES:
            key, policy = before.key, before.policy
        told = {"card": card.model_dump_json(exclude_defaults=True), "key": key, "policy": policy}
        self._put(where, json.dumps(told, sort_keys=True).encode())

    def _put_file(self, file: Path, entry: FileEntry) -> None:
        """Put a file under its hash; one that is there with its size was put whole (puts are atomic)."""
        where = f"files/{entry.sha256}"
        if self._size(where) == entry.bytes:
            return
        if file_sha256(file) != entry.sha256:
            raise BundleError(f"{file}: bytes differ from the manifest's sha256; export the checkpoint again")
        with self._named(where):
            self._objects.put(self._store, where, file)

    def _put(self, where: str, data: bytes, *, mode: Literal["create", "overwrite"] = "overwrite") -> bool:
        with self._named(where):
            try:
                self._objects.put(self._store, where, data, mode=mode)
            except FileExistsError:
                return False
            except self._objects.exceptions.AlreadyExistsError:
                return False
        return True

    def _size(self, where: str) -> int | None:
        with self._named(where):
            try:
                return int(self._objects.head(self._store, where)["size"])
            except FileNotFoundError:
                return None

    def _read(self, where: str) -> bytes:
        with self._named(where):
            return bytes(self._objects.get(self._store, where).bytes())

    def _download(self, entry: FileEntry, file: Path) -> None:
        where, digest, n_bytes = f"files/{entry.sha256}", hashlib.sha256(), 0
        with self._named(where):
            pieces = self._objects.get(self._store, where).stream(min_chunk_size=_PIECE)
            with named_failure(file), file.open("wb") as out:
                for piece in pieces:
                    digest.update(piece)
                    n_bytes += out.write(piece)
        if digest.hexdigest() != entry.sha256:
            raise BundleError(
                f"{self.url}/{where}: must have the bytes of its name, got {n_bytes} others; remove it and publish again"
            )

    @contextlib.contextmanager
    def _named(self, where: str) -> Iterator[None]:
        """Turn the library's failures into one line."""
        try:
            yield
        except FileNotFoundError as error:
            raise BundleError(
                f"{self.url}: must hold {where}, got nothing; publish it with 'export --store'"
            ) from error
        except (self._objects.exceptions.BaseError, OSError, ValueError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise FleetError(
                f"{self.url}: must be a store that answers, got '{line}'; check URL and credentials"
            ) from error


def _checkpoint(checkpoint_id: str) -> str:
    return f"checkpoints/{folder_name(checkpoint_id)}.json"


def _base(base_sha256: str) -> str:
    return f"bases/{base_sha256}.json"


def _link(other: Path, place: Path, entry: FileEntry) -> bool:
    """A second name of a file here, when it has the bytes; a copy on another file system."""
    if file_sha256(other) != entry.sha256:
        return False
    with named_failure(place):
        try:
            os.link(other, place)
        except OSError:
            shutil.copyfile(other, place)
    return True


def is_there(error: RepositoryError, folder: Path) -> bool:
    """Whether a fetch failed only because another process had brought the same bundle first."""
    return folder.is_dir() and "must not exist yet" in str(error)
