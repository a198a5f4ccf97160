"""The bundle manifest: what one immutable, content-addressed export holds and what went into its key.

Read by the runtime, the gate and the repository; written only by the exporters. JSON, no pickle, every file hashed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import BundleError
from .rows import KeptTokens, RowLayer

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
SPEC = "spec.json"
HASHED_AT_ONCE = 4  # files; more would wait for the disk
# What a base's graphs call their adapter inputs; the matrices and vectors have the same names in adapter.safetensors.
STRENGTH, DOWN, UP = "adapter_strength", ".down", ".up"
ADDED_VECTORS, ADDED_ROWS = "added_vectors", "added_rows"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Kind = TypeVar("Kind", bound=Frozen)


class FileEntry(Frozen):
    sha256: str
    bytes: int


class CheckpointEntry(Frozen):
    """The card's facts that a runtime needs, and the hash of the weights (base and delta)."""

    id: str
    name: str
    kind: str
    base: str
    trigger: tuple[str, ...] = ()
    class_noun: str = ""
    sha256: str
    files: tuple[str, ...] = Field((), description="stems of its own weight files: what <lora:STEM:1> may call it")


class SpecEntry(Frozen):
    name: str
    policy: str
    bits: str
    sha256: str
    storage: str


class BranchPlace(Frozen):
    """A layer whose graph takes an adapter's matrices. weight: the layer's (N, K) or (N, C, kh, kw).

    is_wide: only the graph 'ort_wide' takes it; the others of a bundle have no input for it.
    """

    op: Literal["linear", "conv"]
    weight: tuple[int, ...]
    is_wide: bool = False


class AdapterInputs(Frozen):
    """What the graphs of a base's bundle take of an adapter (docs/adapters.md), beside its strength.

    branches: graph ('unet', 'text_encoder', 'text_encoder_2') -> layer -> place: inputs `<layer>.down`, `<layer>.up` and
    `adapter_strength`. first_added_id: tokens from here on have their vectors in the text encoders' `added_vectors`.
    text_rows.onnx takes `added_rows`: what adapters change in K and V of the text.
    """

    branches: dict[str, dict[str, BranchPlace]]
    first_added_id: int


class Graphs(Frozen):
    """File names inside the bundle. unet: one file per lowering ('ort', 'trt'; of a base also 'ort_wide', 'trt_rank16', ...)."""

    unet: dict[str, str]
    text_rows: str
    text_encoder: str
    text_encoder_2: str = Field("", description="SDXL's second text encoder; '' for every other base")
    vae_decoder: str


class Rows(Frozen):
    """How text rows enter the UNet.

    form 'split': inputs rest int8 (B,77,R), rest_scale float32 (B,77,2L), kept float16 (B,S,R), row_index int64 (B,77).
    form 'full' (reference bundles): one input rows float32 (B,77,R).
    text_rows.onnx: text_embeds float32 (B,77,C), kept_index int64 (B,S) -> rows float32, rest, rest_scale, kept.
    is_open: the graphs take any number of rows in place of 77 (the `trt` lowering never does).
    """

    form: Literal["split", "full"]
    width: int
    layers: tuple[RowLayer, ...]
    kept: KeptTokens
    is_open: bool = False


class Text(Frozen):
    """Tokenizer facts. expansions: a multi-vector trigger '<tok>' -> '<tok> <tok>_1', done before tokenising."""

    length: int = 77
    bos_id: int
    eos_id: int
    pad_id: int
    second_pad_id: int | None = Field(None, description="SDXL: the pad of tokenizer_2.json; its other ids are the same")
    is_empty_zero: bool = Field(False, description="SDXL: no negative prompt means embeddings of zeros, not of ''")
    expansions: dict[str, str] = {}


class Latent(Frozen):
    """Latent space of the base: image side = latent side * scale; latents are divided by scaling_factor before decoding."""

    channels: int = 4
    height: int
    width: int
    scale: int
    scaling_factor: float
    shift_factor: float = 0.0


class Sizes(Frozen):
    """Bytes of the UNet on disk: unet graph + its weights + text_rows graph and weights. fp16/fp32: the same, unquantised."""

    unet: int
    unet_fp16: int
    unet_fp32: int


class Manifest(Frozen):
    """kind: an engine of one checkpoint, its delta merged, or of a base, to which adapters are attached.

    adapters: None where the graphs take none. weights_sha256 of a base alone, for which adapters are made, is
    key_parts['weights'].
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["merged", "base"] = "merged"
    key: str
    key_parts: dict[str, str]
    checkpoint: CheckpointEntry
    family: str
    exporter_version: str
    spec: SpecEntry
    graphs: Graphs
    rows: Rows
    text: Text
    latent: Latent
    scheduler: dict[str, Any] = Field(description="scheduler_config.json, in clear: the checkpoint's own or the base's")
    sources: dict[str, str] = Field({}, description="where scheduler, tokenizers and configs come from")
    steps: int = 25
    guidance: float = 7.5
    sizes: Sizes
    census: dict[str, int] = Field(description="layers by 'op weight/activation', e.g. 'conv int8/int8': 40")
    unquantised: dict[str, str] = Field({}, description="layer -> why it stays float")
    adapters: AdapterInputs | None = None
    versions: dict[str, str] = {}
    files: dict[str, FileEntry] = {}

    @property
    def weight_kinds(self) -> set[str]:
        """What the UNet's layers hold, by the census: 'int8', 'int7', 'int6', 'int4', 'float'."""
        return {kind.split()[-1].partition("/")[0] for kind, count in self.census.items() if count}


def bundle_key(parts: dict[str, str]) -> str:
    """sha256 over the named parts (weight bytes of base and delta, spec content, exporter version, family)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """file_sha256 of each, several at once: hashing leaves the interpreter's lock."""
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return list(pool.map(file_sha256, paths))


def inside(folder: Path, name: str) -> Path:
    """folder/name, refused when it would leave the folder ('..', absolute paths, links)."""
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        raise BundleError(f"{folder.name}: file names must stay inside the bundle, got {name!r}; export it again")
    return path


def read_manifest(bundle: Path) -> Manifest:
    """Read and validate `bundle`/manifest.json. Raises BundleError naming the field."""
    manifest = parse_manifest(bundle, Manifest, "a bundle folder")
    graphs = manifest.graphs
    encoders = [graphs.text_encoder, *([graphs.text_encoder_2] if graphs.text_encoder_2 else [])]
    for name in [*manifest.files, *graphs.unet.values(), graphs.text_rows, *encoders, graphs.vae_decoder]:
        inside(bundle, name)
    return manifest


def parse_manifest(bundle: Path, kind: type[Kind], what: str) -> Kind:
    """`bundle`/manifest.json as a manifest of one kind; its file names are still to be checked. what: for the error without one.

    Raises BundleError naming the field.
    """
    file = bundle / MANIFEST
    try:
        return kind.model_validate(json.loads(file.read_text()))
    except FileNotFoundError:
        raise BundleError(f"{bundle}: must be {what} with {MANIFEST}, got none; run 'personalq export'") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{file}: {field}: {first['msg']}; export the checkpoint again") from error
    except (ValueError, OSError) as error:
        raise BundleError(f"{file}: must be JSON, got {error}; export the checkpoint again") from error


def own_bytes(bundle: Path) -> int:
    """Of a bundle's own files, without what engines made of them."""
    return sum(file.stat().st_size for file in bundle.iterdir() if file.is_file())


def manifest_bytes(manifest: Frozen) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


class Listing(Protocol):
    """A manifest of any kind: what files the bundle has."""

    @property
    def files(self) -> Mapping[str, FileEntry]: ...


def check_files(bundle: Path, manifest: Listing) -> list[str]:
    """One line per file that is missing or not what was exported (hash mismatch); empty = intact."""
    problems = []
    for name, entry in manifest.files.items():
        path = inside(bundle, name)
        if not path.is_file():
            problems.append(f"{name}: missing from bundle {bundle.name[:12]}; export the checkpoint again")
        elif path.stat().st_size != entry.bytes or file_sha256(path) != entry.sha256:
            problems.append(f"{name}: bytes differ from the manifest's sha256; export the checkpoint again")
    return problems
