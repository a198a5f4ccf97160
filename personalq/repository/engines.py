"""What a target needs beyond a bundle's ONNX graphs: compiled blobs and plans, kept under `<bundle>/engines/<key>/`.

Written by exporters or by a runtime that compiled one; read by runtimes. The key hashes everything the file depends on
(target, graph bytes, device, tool versions, shapes), so one that fits nothing here is never opened.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from ..bundle import MANIFEST, FileEntry, Frozen, file_sha256
from ..errors import EngineError
from .atomic import atomic_directory, is_temporary, named_failure

ENGINES = "engines"
_CHECKED: set[tuple[str, int, int, str]] = set()


class EngineManifest(Frozen):
    """One engine. parts: everything in its key, in clear; 'target' is always among them. others: files it needs beside `file`."""

    schema_version: int = 1
    key: str
    parts: dict[str, str]
    file: str
    sha256: str
    bytes: int
    others: Mapping[str, FileEntry] = Field(default_factory=dict)


@dataclass(frozen=True)
class KeptEngine:
    """An engine file on disk with its manifest."""

    path: Path
    manifest: EngineManifest

    def files(self) -> dict[Path, FileEntry]:
        """Every file that the engine needs."""
        own = FileEntry(sha256=self.manifest.sha256, bytes=self.manifest.bytes)
        return {self.path: own, **{self.path.parent / name: entry for name, entry in self.manifest.others.items()}}


def engine_key(parts: Mapping[str, str]) -> str:
    """'<target>-<first 32 digits of the sha256 over the named parts>': the engine's folder."""
    digest = hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()
    return f"{parts['target']}-{digest[:32]}"


def engine_at(bundle: Path, parts: Mapping[str, str]) -> KeptEngine | None:
    """The engine that was kept for exactly these parts; None when there is none."""
    folder = bundle / ENGINES / engine_key(parts)
    return read_engine(folder) if (folder / MANIFEST).is_file() else None


def engines_of(bundle: Path, target: str) -> list[KeptEngine]:
    """Every engine of one target that was kept with a bundle, sorted by key. Raises EngineError for a broken one."""
    place = bundle / ENGINES
    folders = sorted(place.glob(f"{target}-*/{MANIFEST}")) if place.is_dir() else []
    kept = [read_engine(file.parent) for file in folders if not is_temporary(file.parent)]
    return [engine for engine in kept if engine.manifest.parts["target"] == target]


def read_engine(folder: Path) -> KeptEngine:
    """Read one engine's manifest. Raises EngineError when it is not understood."""
    cure = f"remove {folder} and it is made again"
    try:
        manifest = EngineManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise EngineError(
            f"{folder / MANIFEST}: must be an engine's manifest, got {type(error).__name__}; {cure}"
        ) from error
    names = (manifest.file, *manifest.others)
    if manifest.key != engine_key(manifest.parts) or any(Path(name).name != name or not name for name in names):
        raise EngineError(f"{folder / MANIFEST}: must fit its own key and file name, got another; {cure}")
    return KeptEngine(folder / manifest.file, manifest)


def check_engine(kept: KeptEngine) -> None:
    """Raise EngineError when a file's bytes are not those that were kept: a spoiled blob can crash its library.

    The sha256 is computed once per process, and again when the file was touched.
    """
    for path, entry in kept.files().items():
        _check_file(path, entry, f"remove {path.parent} and it is made again")


def _check_file(path: Path, entry: FileEntry, cure: str) -> None:
    try:
        stat = path.stat()
        seen = (str(path), stat.st_mtime_ns, stat.st_ino, entry.sha256)
        whole = stat.st_size == entry.bytes
        whole = whole and (seen in _CHECKED or file_sha256(path) == entry.sha256)
    except OSError as error:
        raise EngineError(f"{path}: must be readable, got '{error.strerror}'; {cure}") from error
    if not whole:
        raise EngineError(f"{path}: bytes differ from the sha256 in its manifest; {cure}")
    _CHECKED.add(seen)


def keep_engine(
    bundle: Path,
    parts: Mapping[str, str],
    name: str,
    data: bytes | memoryview,
    notes: Mapping[str, bytes] | None = None,
) -> KeptEngine:
    """Publish an engine file whole, in place of one that is there. Raises RepositoryError.

    notes: further files about it, by name; no engine needs them to run.
    """
    key = engine_key(parts)
    folder = bundle / ENGINES / key
    manifest = EngineManifest(
        key=key, parts=dict(parts), file=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)
    )
    with atomic_directory(folder, replace=True) as place:
        for file, content in {name: data, **(notes or {})}.items():
            _write(place / file, content)
        _write(place / MANIFEST, _as_json(manifest))
    return KeptEngine(folder / name, manifest)


@contextlib.contextmanager
def keeping_engine(bundle: Path, parts: Mapping[str, str], name: str) -> Iterator[Path]:
    """Yield an empty folder for the files of an engine, `name` and what it needs; publish them when the block ends.

    Nothing is left behind when it fails. Raises RepositoryError.
    """
    key = engine_key(parts)
    with atomic_directory(bundle / ENGINES / key, replace=True) as place:
        yield place
        with named_failure(place):
            entries = {
                file.name: FileEntry(sha256=file_sha256(file), bytes=file.stat().st_size) for file in place.iterdir()
            }
        own = entries.pop(name)
        manifest = EngineManifest(
            key=key, parts=dict(parts), file=name, sha256=own.sha256, bytes=own.bytes, others=entries
        )
        _write(place / MANIFEST, _as_json(manifest))


def _as_json(manifest: EngineManifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def _write(file: Path, data: bytes | memoryview) -> None:
    with named_failure(file), file.open("wb") as handle:
        handle.write(data)
