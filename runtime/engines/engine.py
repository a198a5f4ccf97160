"""A bundle's four graphs, ready to run: the Engine protocol and ONNX Runtime on the CPU.

It knows tensors and files, not prompts, samplers or which rows deserve to be kept.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from personalq.bundle import Manifest, file_sha256, inside, read_manifest
from personalq.errors import BundleError, EngineError
from personalq.rows import Ids

from .sessions import Opened, Session, import_onnxruntime, one_line, open_prepared, open_shared

Array = npt.NDArray[np.float32]
# What the UNet needs to know about the prompts of a batch, by input name. Form 'split': rest int8 (B,77,R), rest_scale
# float32 (B,77,2L), kept float16 (B,S,R), row_index int64 (B,77). Form 'full': rows float32 (B,77,R).
Conditioning = Mapping[str, npt.NDArray[Any]]
# (sample (B,4,h,w) float32, time step) -> noise_pred (B,4,h,w) float32, in a buffer that the next call overwrites.
Denoiser = Callable[[Array, float], Array]

SIZE_INPUTS = ("text_embeds", "time_ids")  # SDXL's UNet is told the pooled text (B,P) and the picture's size (B,6) too
UNET_INPUTS = {"split": ("rest", "rest_scale", "kept", "row_index"), "full": ("rows",)}
ROWS_OUTPUTS = {"split": ("rows", "rest", "rest_scale", "kept"), "full": ("rows",)}
LOWERING = "ort"
TOKENIZER = "tokenizer.json"
SECOND_TOKENIZER = "tokenizer_2.json"  # SDXL: pads with another token, which also splits words differently


@dataclass(frozen=True)
class TextEmbeds:
    """Prompts as the text encoders give them: states (B,77,C) float32; pooled (B,P) float32 for SDXL, else None."""

    states: Array
    pooled: Array | None = None

    def zeros(self) -> "TextEmbeds":
        """The same shapes, all zero: what SDXL takes for a prompt that was not given."""
        return TextEmbeds(np.zeros_like(self.states), None if self.pooled is None else np.zeros_like(self.pooled))


class Engine(Protocol):
    """A bundle prepared for one target."""

    @property
    def name(self) -> str: ...

    @property
    def bundle(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...

    def encode(self, ids: Ids, second: Ids | None = None) -> TextEmbeds:
        """ids (B,77) int64 -> text embeddings (B,77,C) float32, and SDXL's pooled text (B,P).

        second (B,77): the same prompts as SDXL's second tokenizer gives them; needed when the bundle has one.
        """

    def text_rows(self, text_embeds: Array, kept_index: Ids) -> dict[str, npt.NDArray[Any]]:
        """text_embeds (B,77,C), kept_index (B,S) -> rows float32 (B,77,R) and, form 'split', rest, rest_scale, kept."""

    def denoiser(self, conditioning: Conditioning, height: int, width: int) -> Denoiser:
        """Bind the prompts of a batch once -> the UNet as a function, for latents (B,4,height,width)."""

    def decode(self, latent: Array) -> Array:
        """latent (B,4,h,w) float32, already divided by scaling_factor -> image (B,3,H,W) in -1..1."""

    def is_whole(self) -> bool:
        """Whether the files that it reads while it draws are still what they were when it opened them."""


class OrtEngine:
    """ONNX Runtime on the CPU. The files are checked against the manifest, then all graphs are opened."""

    name = "onnxruntime"

    def __init__(self, bundle: Path, threads: int | None = None) -> None:
        """Open a bundle. `threads`: for one operator; None lets ONNX Runtime use every core.

        Raises BundleError when a file is not what was exported, EngineError when one is missing or cannot be opened.
        """
        self.bundle = bundle
        self.manifest = read_manifest(bundle)
        check_bytes(bundle, self.manifest)
        graphs, form = self.manifest.graphs, self.manifest.rows.form
        self._threads = threads
        self._opened: list[Opened] = []
        self._encoder = self._share(graphs.text_encoder, ["input_ids"], ["last_hidden_state"])
        self._second = None
        if graphs.text_encoder_2:
            self._second = self._share(graphs.text_encoder_2, ["input_ids"], ["last_hidden_state", "text_embeds"])
        self._decoder = self._share(graphs.vae_decoder, ["latent"], ["image"])
        rows_inputs = ["text_embeds", "kept_index"] if form == "split" else ["text_embeds"]
        with ThreadPoolExecutor(1) as beside:
            # Run once a prompt: its weights stay mapped, which opens sooner and takes no memory of its own.
            rows = beside.submit(self._prepare, graphs.text_rows, rows_inputs, ROWS_OUTPUTS[form], is_packed=False)
            self._unet = self._open_unet()
            self._rows = rows.result()

    def _open_unet(self) -> Session:
        inputs = ["sample", "timestep", *unet_inputs(self.manifest)]
        return self._prepare(unet_file(self.manifest), inputs, ["noise_pred"])

    def _share(self, file: str, inputs: Sequence[str], outputs: Sequence[str]) -> Session:
        return self._take(open_shared(self.bundle, self.manifest, file, self._threads), file, inputs, outputs)

    def _prepare(self, file: str, inputs: Sequence[str], outputs: Sequence[str], *, is_packed: bool = True) -> Session:
        opened = open_prepared(self.bundle, self.manifest, file, self._threads, is_packed=is_packed)
        return self._take(opened, file, inputs, outputs)

    def _take(self, opened: Opened, file: str, inputs: Sequence[str], outputs: Sequence[str]) -> Session:
        session = opened.session
        _check_names(file, "inputs", [value.name for value in session.get_inputs()], inputs)
        _check_names(file, "outputs", [value.name for value in session.get_outputs()], outputs)
        self._opened.append(opened)
        return session

    def is_whole(self) -> bool:
        return all(opened.is_whole() for opened in self._opened)

    def encode(self, ids: Ids, second: Ids | None = None) -> TextEmbeds:
        states = np.asarray(_run(self._encoder, ["last_hidden_state"], {"input_ids": ids})[0], dtype=np.float32)
        if self._second is None:
            return TextEmbeds(states)
        more, pooled = _run(self._second, ["last_hidden_state", "text_embeds"], {"input_ids": second})
        return TextEmbeds(np.concatenate([states, more], axis=-1, dtype=np.float32), np.asarray(pooled, np.float32))

    def text_rows(self, text_embeds: Array, kept_index: Ids) -> dict[str, npt.NDArray[Any]]:
        form = self.manifest.rows.form
        feed = {"text_embeds": text_embeds, "kept_index": kept_index}
        if form == "full":
            del feed["kept_index"]
        return dict(zip(ROWS_OUTPUTS[form], _run(self._rows, ROWS_OUTPUTS[form], feed), strict=True))

    def denoiser(self, conditioning: Conditioning, height: int, width: int) -> Denoiser:
        batch = len(next(iter(conditioning.values())))
        shape = (batch, self.manifest.latent.channels, height, width)
        return _BoundUnet(self._unet, unet_feed(self.manifest, conditioning, height, width), shape)

    def decode(self, latent: Array) -> Array:
        return np.asarray(_run(self._decoder, ["image"], {"latent": latent})[0], dtype=np.float32)


def unet_inputs(manifest: Manifest) -> tuple[str, ...]:
    """What the UNet is told beside latents and time step."""
    return UNET_INPUTS[manifest.rows.form] + (SIZE_INPUTS if manifest.graphs.text_encoder_2 else ())


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
    "onnxruntime": (".engine", "OrtEngine"),
    "openvino": (".openvino_engine", "OpenVinoEngine"),
    "tensorrt": (".tensorrt_engine", "TensorRtEngine"),
    "tensorrt-rtx": (".tensorrt_engine", "TensorRtRtxEngine"),
}


def open_engine(name: str, bundle: Path, threads: int | None = None) -> Engine:
    """Open a bundle with the engine of that name. Raises EngineError for one this version does not have."""
    if name not in ENGINES:
        raise EngineError(f"engine: must be one of {', '.join(ENGINES)}, got {name!r}; choose another target")
    module, kind = ENGINES[name]
    engine: Engine = getattr(import_module(module, __package__), kind)(bundle, threads)
    return engine


class _BoundUnet:
    """The UNet with its buffers bound once: a step copies the latents in and reads the prediction where it lies."""

    def __init__(self, session: Session, conditioning: Conditioning, shape: tuple[int, ...]) -> None:
        ort = import_onnxruntime()
        self._session = session
        self._sample, self._noise_pred = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._timestep = np.zeros(1, np.float32)
        self._binding = session.io_binding()
        inputs = {"sample": self._sample, "timestep": self._timestep, **conditioning}
        # An OrtValue made from a contiguous array on the CPU is that array's memory; it must outlive the binding.
        self._values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()
        }
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._output = ort.OrtValue.ortvalue_from_numpy(self._noise_pred)
        self._binding.bind_ortvalue_output("noise_pred", self._output)

    def __call__(self, sample: Array, timestep: float) -> Array:
        np.copyto(self._sample, sample)
        self._timestep[0] = timestep
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises its own classes over RuntimeError
            raise EngineError(f"unet: cannot run on latents {sample.shape}: {one_line(error)}") from error
        return self._noise_pred


def unet_file(manifest: Manifest) -> str:
    """The UNet graph for ONNX Runtime. Raises EngineError when the bundle was exported without it."""
    if LOWERING not in manifest.graphs.unet:
        have = ", ".join(sorted(manifest.graphs.unet)) or "none"
        raise EngineError(
            f"bundle {manifest.key[:12]}: must hold a UNet for '{LOWERING}', got {have}; "
            f"run 'personalq export {manifest.checkpoint.id} --target onnxruntime'"
        )
    return manifest.graphs.unet[LOWERING]


_checked: set[tuple[str, int, int, str]] = set()
_checked_lock = threading.Lock()


def check_bytes(bundle: Path, manifest: Manifest) -> None:
    """Check every file's size, and its sha256 once per process (again when the file was touched).

    Raises EngineError when a file is missing, BundleError when its bytes are not those that were exported.
    """
    for name, entry in manifest.files.items():
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


def _run(session: Session, outputs: Sequence[str], feed: dict[str, Any]) -> Sequence[Any]:
    try:
        return list(session.run(list(outputs), feed))
    except Exception as error:  # onnxruntime raises its own classes over RuntimeError
        shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
        raise EngineError(f"{outputs[0]}: cannot be computed from {shapes}: {one_line(error)}") from error


def _check_names(file: str, what: str, found: Sequence[str], expected: Sequence[str]) -> None:
    if set(found) != set(expected):
        raise EngineError(
            f"{file}: {what} must be {', '.join(sorted(expected))}, got {', '.join(sorted(found))}; "
            "export the checkpoint again with this version"
        )
