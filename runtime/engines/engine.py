"""A bundle's four graphs, ready to run: what every engine offers, what each needs of a bundle, and which there are.

It knows tensors and files, not prompts, samplers or which rows deserve to be kept.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from personalq.bundle import FileEntry, Manifest, file_sha256, inside
from personalq.errors import BundleError, EngineError
from personalq.rows import Ids

from .attached import PLAIN, Attached

Array = npt.NDArray[np.float32]
# The UNet's inputs for the prompts of a batch, by input name. Form 'split': rest int8 (B,77,R), rest_scale
# float32 (B,77,2L), kept float16 (B,S,R), row_index int64 (B,77). Form 'full': rows float32 (B,77,R). A prompt of n chunks
# has 77n rows in place of 77, where the engine takes them.
Conditioning = Mapping[str, npt.NDArray[Any]]
# (sample (B,4,h,w) float32, time step) -> noise_pred (B,4,h,w) float32, in a buffer that the next call overwrites.
Denoiser = Callable[[Array, float], Array]

SIZE_INPUTS = ("text_embeds", "time_ids")  # SDXL's UNet also takes the pooled text (B,P) and the picture's size (B,6)
UNET_INPUTS = {"split": ("rest", "rest_scale", "kept", "row_index"), "full": ("rows",)}
ROWS_OUTPUTS = {"split": ("rows", "rest", "rest_scale", "kept"), "full": ("rows",)}
LOWERING, WIDE = "ort", "ort_wide"
TOKENIZER = "tokenizer.json"
SECOND_TOKENIZER = "tokenizer_2.json"  # SDXL: pads with another token, which also splits words differently


@dataclass(frozen=True)
class TextEmbeds:
    """Prompts as the text encoders give them: states (B,77,C) float32; pooled (B,P) float32 for SDXL, else None.

    first: how many of the C columns are the first encoder's; None: all of them.
    """

    states: Array
    pooled: Array | None = None
    first: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """The columns of each text encoder."""
        width = self.states.shape[-1]
        return (width,) if self.first is None else (self.first, width - self.first)

    def zeros(self) -> "TextEmbeds":
        """The same shapes, all zero: what SDXL takes for a prompt that was not given."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return TextEmbeds(np.zeros_like(self.states), pooled, self.first)


class Engine(Protocol):
    """A bundle prepared for one target."""

    @property
    def name(self) -> str: ...

    @property
    def bundle(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def takes_chunks(self) -> bool:
        """Whether a prompt may have any number of chunks; else it has one."""

    def encode(self, ids: Ids, second: Ids | None = None, attached: Attached = PLAIN) -> TextEmbeds:
        """ids (B,77) int64 -> text embeddings (B,77,C) float32, and SDXL's pooled text (B,P).

        second (B,77): the same prompts as SDXL's second tokenizer gives them; needed when the bundle has one.
        """

    def text_rows(self, text_embeds: Array, kept_index: Ids, attached: Attached = PLAIN) -> dict[str, npt.NDArray[Any]]:
        """text_embeds (B,77n,C), kept_index (B,S) -> rows float32 (B,77n,R) and, form 'split', rest, rest_scale, kept."""

    def denoiser(self, conditioning: Conditioning, height: int, width: int, attached: Attached = PLAIN) -> Denoiser:
        """Bind the prompts of a batch, and what is attached, once -> the UNet as a function, for latents (B,4,height,width)."""

    def decode(self, latent: Array) -> Array:
        """latent (B,4,h,w) float32, already divided by scaling_factor -> image (B,3,H,W) in -1..1."""

    def is_whole(self) -> bool:
        """Whether the files that it reads while it draws are still what they were when it opened them."""


def unet_inputs(manifest: Manifest) -> tuple[str, ...]:
    """The names of the UNet's inputs besides latents, time step and adapters."""
    return UNET_INPUTS[manifest.rows.form] + (SIZE_INPUTS if manifest.graphs.text_encoder_2 else ())


def adapter_inputs(manifest: Manifest, graph: str, *, is_wide: bool = False) -> tuple[str, ...]:
    """The names of a graph's inputs for adapters; none where the bundle is of one checkpoint."""
    return tuple(PLAIN.feed(manifest.adapters, graph, is_wide=is_wide))


def unet_feed(manifest: Manifest, conditioning: Conditioning, height: int, width: int) -> Conditioning:
    """The UNet's inputs for a batch of prompts and latents of (height, width).

    time_ids (SDXL, Podell et al. 2023, section 2.2): original size, crop corner (none) and target size, in pixels.
    """
    if manifest.graphs.text_encoder_2:
        size = [height * manifest.latent.scale, width * manifest.latent.scale]
        batch = len(next(iter(conditioning.values())))
        conditioning = {**conditioning, "time_ids": np.tile(np.array([*size, 0, 0, *size], np.float32), (batch, 1))}
    return {name: conditioning[name] for name in unet_inputs(manifest)}


# Engine -> the module and class that open it; each module imports its own package when a bundle is opened.
ENGINES = {
    "onnxruntime": (".ort", "OrtEngine"),
    "openvino": (".openvino", "OpenVinoEngine"),
    "tensorrt": (".tensorrt", "TensorRtEngine"),
    "tensorrt-rtx": (".tensorrt", "TensorRtRtxEngine"),
}


def open_engine(name: str, bundle: Path, threads: int | None = None) -> Engine:
    """Open a bundle with the engine of that name. Raises EngineError for one this version does not have."""
    if name not in ENGINES:
        raise EngineError(f"engine: must be one of {', '.join(ENGINES)}, got {name!r}; choose another target")
    module, kind = ENGINES[name]
    engine: Engine = getattr(import_module(module, __package__), kind)(bundle, threads)
    return engine


def unet_file(manifest: Manifest, lowering: str = LOWERING) -> str:
    """The UNet graph for ONNX Runtime. Raises EngineError when the bundle was exported without it."""
    if lowering not in manifest.graphs.unet:
        have = ", ".join(sorted(manifest.graphs.unet)) or "none"
        raise EngineError(
            f"bundle {manifest.key[:12]}: must hold a UNet for '{lowering}', got {have}; "
            f"run 'personalq export {manifest.checkpoint.id} --target onnxruntime'"
        )
    return manifest.graphs.unet[lowering]


_checked: set[tuple[str, int, int, str]] = set()
_checked_lock = threading.Lock()


def check_bytes(bundle: Path, files: Mapping[str, FileEntry]) -> None:
    """Check the size of every file of a manifest, and its sha256 once per process (again when the file was touched).

    Raises EngineError when a file is missing, BundleError when its bytes are not those that were exported.
    """
    for name, entry in files.items():
        file = inside(bundle, name)
        if not file.is_file():
            raise EngineError(f"{name}: missing from bundle {bundle.name[:12]}; export the checkpoint again")
        stat = file.stat()
        if stat.st_size != entry.bytes:
            raise BundleError(
                f"{name}: must be {entry.bytes} bytes in bundle {bundle.name[:12]}, got {stat.st_size}; "
                "export the checkpoint again"
            )
        seen = (str(file.resolve()), stat.st_mtime_ns, stat.st_ino, entry.sha256)
        if seen in _checked:
            continue
        if file_sha256(file) != entry.sha256:
            raise BundleError(
                f"{name}: bytes differ from the sha256 in the manifest of bundle {bundle.name[:12]}; "
                "export the checkpoint again"
            )
        with _checked_lock:
            _checked.add(seen)
