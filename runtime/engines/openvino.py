"""OpenVINO on the CPU: the `ort` graphs compiled, INT8 with bf16 around it where the CPU has it.

Compiling one SD1.5-size UNet takes seconds, so the compiled blob is kept with the bundle and read back next time. The
UNet is compiled for fixed shapes (twice as fast as a dynamic batch on a small UNet), one prompt or one guided pair at
a time; larger batches run in such slices.
"""

import logging
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from personalq.bundle import ADDED_ROWS, ADDED_VECTORS, STRENGTH, inside, read_manifest
from personalq.errors import EngineError, MissingExtraError, RepositoryError
from personalq.repository.engines import check_engine, engine_at, keep_engine
from personalq.rows import Ids

from .attached import PLAIN, Attached, Feed
from .engine import (
    ROWS_OUTPUTS,
    UNET_INPUTS,
    Array,
    Conditioning,
    Denoiser,
    TextEmbeds,
    adapter_inputs,
    check_bytes,
    unet_feed,
    unet_file,
)
from .sessions import graph_hashes, has_int8_dot_product, one_line

logger = logging.getLogger("personalq.runtime")

Compiled = Any  # openvino.CompiledModel: the package is imported when an engine is opened
Shapes = Mapping[str, Sequence[int]]
Key = TypeVar("Key")

SLICE = 2  # rows of a UNet batch: one guided pair
_COMPILED_UNETS = 2  # shapes that stay compiled: each holds its own copy of the weights
_COMPILED_ROWS = 4  # numbers of text rows for which the row encoder stays compiled
# What stays float32: kept rows must be exact roundings of the graph's own rows.
EXACT = "f32"


class OpenVinoEngine:
    """All four graphs on OpenVINO. The files are checked against the manifest, then each graph is compiled or read back."""

    name = "openvino"

    def __init__(self, bundle: Path, threads: int | None = None) -> None:
        """Open a bundle. `threads`: for one operator; None lets OpenVINO use every core.

        Raises MissingExtraError without openvino, BundleError or EngineError when a file is not what was exported.
        """
        self.bundle = bundle
        self.manifest = read_manifest(bundle)
        check_bytes(bundle, self.manifest.files)
        self._threads = threads or 0
        self._around = around_int8()
        self._lock = threading.Lock()
        self._unets: OrderedDict[tuple[int, ...], Compiled] = OrderedDict()
        self._row_encoders: OrderedDict[int, Compiled] = OrderedDict()
        graphs, length = self.manifest.graphs, self.manifest.text.length
        self._encoder = self._open_encoder("text_encoder", graphs.text_encoder, length)
        self._second = None
        if graphs.text_encoder_2:
            self._second = self._open_encoder("text_encoder_2", graphs.text_encoder_2, length)
        self._row_encoder(length)
        latent = self.manifest.latent
        self._decoder: tuple[tuple[int, ...], Compiled] | None = None
        self._unet((SLICE, latent.channels, latent.height, latent.width), length)

    @property
    def takes_chunks(self) -> bool:
        return self.manifest.rows.is_open

    def encode(self, ids: Ids, second: Ids | None = None, attached: Attached = PLAIN) -> TextEmbeds:
        feed = self._text_feed("text_encoder", self._encoder, attached)
        rows = [_infer(self._encoder, {"input_ids": one[None], **feed})["last_hidden_state"] for one in ids]
        states = np.concatenate(rows).astype(np.float32, copy=False)
        if self._second is None or second is None:
            return TextEmbeds(states)
        feed = self._text_feed("text_encoder_2", self._second, attached)
        made = [_infer(self._second, {"input_ids": one[None], **feed}) for one in second]
        more, pooled = (np.concatenate([one[name] for one in made]) for name in ("last_hidden_state", "text_embeds"))
        both = np.concatenate([states, more], axis=-1, dtype=np.float32)
        return TextEmbeds(both, pooled.astype(np.float32), states.shape[-1])

    def _text_feed(self, graph: str, compiled: Compiled, attached: Attached) -> Feed:
        if self.manifest.adapters is None:
            return {}
        width = compiled.input(ADDED_VECTORS).get_partial_shape()[1].get_length()
        return attached.feed(self.manifest.adapters, graph, width)

    def text_rows(self, text_embeds: Array, kept_index: Ids, attached: Attached = PLAIN) -> dict[str, npt.NDArray[Any]]:
        rows = self.manifest.rows
        names, encoder = ROWS_OUTPUTS[rows.form], self._row_encoder(text_embeds.shape[1])
        made = []
        for i in range(len(text_embeds)):
            feed: dict[str, npt.NDArray[Any]] = {"text_embeds": text_embeds[i : i + 1]}
            feed |= {"kept_index": kept_index[i : i + 1]} if len(names) > 1 else {}
            if self.manifest.adapters is not None:
                feed[ADDED_ROWS] = attached.added_rows(feed["text_embeds"], rows.layers)
            made.append(_infer(encoder, feed))
        return {name: np.concatenate([one[name] for one in made]) for name in names}

    def denoiser(self, conditioning: Conditioning, height: int, width: int, attached: Attached = PLAIN) -> Denoiser:
        batch = len(next(iter(conditioning.values())))
        channels = self.manifest.latent.channels
        inputs = unet_feed(self.manifest, conditioning, height, width)
        n_rows = conditioning[UNET_INPUTS[self.manifest.rows.form][0]].shape[1]
        if attached.is_wide:
            raise EngineError(
                "openvino: must be given adapters of attention layers, got one that changes others too, which OpenVINO has no "
                "convolution for; draw it with onnxruntime"
            )
        matrices = attached.feed(self.manifest.adapters, "unet")
        slices = []
        for start in range(0, batch, SLICE):
            part = {name: value[start : start + SLICE] for name, value in inputs.items()}
            part |= {name: _of_slice(name, value, start) for name, value in matrices.items()}
            shape = (min(SLICE, batch - start), channels, height, width)
            compiled = self._unet(shape, n_rows)
            slices.append((start, _BoundUnet(compiled, part, shape)))
        return _Sliced(slices, (batch, channels, height, width))

    def decode(self, latent: Array) -> Array:
        shape = (1, *latent.shape[1:])
        with self._lock:
            if self._decoder is None or self._decoder[0] != shape:
                graph = self.manifest.graphs.vae_decoder
                self._decoder = (shape, self._open(graph, self._around, {"latent": shape}))
            compiled = self._decoder[1]
        images = [_infer(compiled, {"latent": latent[i : i + 1]})["image"] for i in range(len(latent))]
        return np.concatenate(images).astype(np.float32, copy=False)

    def is_whole(self) -> bool:
        return True  # blobs are read whole; a graph that is compiled later is checked by its library

    def _row_encoder(self, n_rows: int) -> Compiled:
        """The row encoder compiled for one prompt of so many rows; text_embeds' width is the graph's own."""
        shapes: dict[str, Sequence[int]] = {"text_embeds": (1, n_rows, -1)}
        if self.manifest.rows.form == "split":
            shapes["kept_index"] = (1, self.manifest.rows.kept.slots)
        if self.manifest.adapters is not None:
            shapes[ADDED_ROWS] = (1, -1, -1)
        with self._lock:
            return _recent(
                self._row_encoders,
                n_rows,
                _COMPILED_ROWS,
                lambda: self._open(self.manifest.graphs.text_rows, EXACT, shapes),
            )

    def _open_encoder(self, graph: str, file: str, length: int) -> Compiled:
        """A text encoder for one chunk of text, and whatever is attached."""
        any_size = {name: () for name in adapter_inputs(self.manifest, graph)}
        return self._open(file, EXACT, {"input_ids": (1, length), **any_size})

    def _unet(self, shape: tuple[int, ...], n_rows: int) -> Compiled:
        """The UNet compiled for one latent shape and number of text rows, and for adapters of any rank."""
        shapes: dict[str, Sequence[int]] = {"sample": shape}
        if self.manifest.rows.is_open:
            shapes |= {name: (shape[0], n_rows, *sides) for name, sides in _ROW_SIDES[self.manifest.rows.form].items()}
        shapes |= dict.fromkeys(adapter_inputs(self.manifest, "unet"), ())
        with self._lock:
            return _recent(
                self._unets,
                (*shape, n_rows),
                _COMPILED_UNETS,
                lambda: self._open(unet_file(self.manifest), self._around, shapes),
            )

    def _open(self, file: str, precision: str, shapes: Shapes) -> Compiled:
        """Read a cached blob, or compile the graph and cache the blob if the bundle is writable."""
        graph = inside(self.bundle, file)
        properties = compile_properties(precision, self._threads)
        parts = {
            **{"target": self.name, "graph": file, "shapes": _shapes_text(shapes), "bundle": self.manifest.key},
            **{f"sha256 of {name}": sha256 for name, sha256 in graph_hashes(self.manifest, file).items()},
            **{"openvino": _core().get_versions("CPU")["CPU"].build_number, "device": device_name(), **properties},
        }
        compiled = self._read_back(parts, properties)
        if compiled is None:
            compiled = _compile(graph, shapes, properties)
            self._keep(parts, compiled)
        return compiled

    def _read_back(self, parts: Mapping[str, str], properties: Mapping[str, str]) -> Compiled | None:
        try:
            kept = engine_at(self.bundle, parts)
            if kept is None:
                return None
            check_engine(kept)
            # Read whole: OpenVINO goes on reading a mapped tensor, but does not keep it alive (measured: a crash).
            return _core().import_model(kept.path.read_bytes(), "CPU", dict(properties))
        except Exception as error:  # openvino raises RuntimeError; a blob that cannot be used is compiled anew
            logger.warning("%s; compiling again", one_line(error))
            return None

    def _keep(self, parts: Mapping[str, str], compiled: Compiled) -> None:
        try:
            keep_engine(self.bundle, parts, "compiled.blob", compiled.export_model().getbuffer())
        except RepositoryError as error:
            logger.warning("the compiled graph is not kept: %s", error)


# Every input of the UNet that has a side of text rows -> its sides after that one; -1: the graph's own.
_ROW_SIDES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "split": {"rest": (-1,), "rest_scale": (-1,), "row_index": ()},
    "full": {"rows": (-1,)},
}


def _recent(compiled: OrderedDict[Key, Compiled], key: Key, most: int, compile_: Callable[[], Compiled]) -> Compiled:
    """The compiled graph of a key; the one used longest ago is dropped when there are more than `most`."""
    if key not in compiled:
        compiled[key] = compile_()
        while len(compiled) > most:
            compiled.popitem(last=False)
    compiled.move_to_end(key)
    return compiled[key]


class _BoundUnet:
    """One compiled UNet with its buffers bound once: a step copies the latents in and reads the prediction in place."""

    def __init__(self, compiled: Compiled, conditioning: Conditioning, shape: tuple[int, ...]) -> None:
        ov = import_openvino()
        self._request = compiled.create_infer_request()
        self._sample, self._timestep = np.zeros(shape, np.float32), np.zeros(1, np.float32)
        inputs = {"sample": self._sample, "timestep": self._timestep}
        inputs |= {name: np.ascontiguousarray(value) for name, value in conditioning.items()}
        self._inputs = inputs  # shared with the request, so they must outlive it
        try:
            for name, value in inputs.items():
                self._request.set_tensor(name, ov.Tensor(value, shared_memory=True))
        except Exception as error:  # openvino raises RuntimeError
            raise EngineError(f"unet: cannot take rows for latents {shape}: {one_line(error)}") from error

    def __call__(self, sample: Array, timestep: float) -> Array:
        np.copyto(self._sample, sample)
        self._timestep[0] = timestep
        try:
            self._request.infer()
        except Exception as error:  # openvino raises RuntimeError
            raise EngineError(f"unet: cannot run on latents {sample.shape}: {one_line(error)}") from error
        return np.asarray(self._request.get_tensor("noise_pred").data, dtype=np.float32)


class _Sliced:
    """A batch as slices of at most one guided pair, gathered into one buffer."""

    def __init__(self, slices: Sequence[tuple[int, _BoundUnet]], shape: tuple[int, ...]) -> None:
        self._slices, self._noise_pred = slices, np.zeros(shape, np.float32)

    def __call__(self, sample: Array, timestep: float) -> Array:
        for start, unet in self._slices:
            rows = slice(start, start + SLICE)
            self._noise_pred[rows] = unet(sample[rows], timestep)
        return self._noise_pred


def import_openvino() -> Any:
    """The openvino module. Raises MissingExtraError when it is not installed."""
    try:
        return import_module("openvino")
    except ImportError:
        raise MissingExtraError("openvino", "openvino") from None


@cache
def _core() -> Any:
    return import_openvino().Core()


@cache
def around_int8() -> str:
    """The float type around INT8: 'bf16' where this CPU computes in it, else 'f32'."""
    return "bf16" if "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


@cache
def device_name() -> str:
    """What a blob depends on: the CPU's name, and the features that OpenVINO detected."""
    capabilities = " ".join(sorted(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
    return f"{platform.machine()} {_core().get_property('CPU', 'FULL_DEVICE_NAME')} {capabilities}"


def compile_properties(precision: str, threads: int = 0) -> dict[str, str]:
    """How a graph is compiled: its float type, for one request at a time; threads: 0 = every core.

    On an x86 CPU without VNNI, OpenVINO's u8 x s8 kernels add pairs of products in 16 bits, and saturate at 32767,
    silently (measured, 2026.4: a Linear gave 0.5 instead of 64). There, weights stay int8 and products are float.
    """
    properties = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    properties |= {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    return properties if has_int8_dot_product() else properties | {"LP_TRANSFORMS_MODE": "NO"}


def _compile(graph: Path, shapes: Shapes, properties: Mapping[str, str]) -> Compiled:
    ov = import_openvino()
    if not graph.is_file():
        raise EngineError(f"{graph}: must be a graph, got no file; export the checkpoint again")
    try:
        model = _core().read_model(graph)
        batch = next(iter(shapes.values()))[0]
        fixed = {}
        for value in model.inputs:
            sides = [side.get_length() if side.is_static else -1 for side in value.get_partial_shape()]
            sides[0] = batch if sides[0] == -1 else sides[0]
            wanted = shapes.get(value.any_name, sides)
            if value.any_name in shapes and not wanted:
                continue  # an adapter's matrix: as the graph has it
            fixed[value.any_name] = ov.PartialShape([w if w != -1 else s for w, s in zip(wanted, sides, strict=True)])
        model.reshape(fixed)
        return _core().compile_model(model, "CPU", dict(properties))
    except Exception as error:  # openvino raises RuntimeError
        raise EngineError(f"{graph}: cannot be compiled: {one_line(error)}; export the checkpoint again") from error


def _infer(compiled: Compiled, feed: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Run a graph once, in a request of its own so that threads do not share buffers."""
    try:
        made = compiled.create_infer_request().infer(dict(feed))
    except Exception as error:  # openvino raises RuntimeError
        shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
        raise EngineError(
            f"{compiled.outputs[0].any_name}: cannot be computed from {shapes}: {one_line(error)}"
        ) from error
    return {output.any_name: np.array(made[output]) for output in compiled.outputs}


def _of_slice(name: str, value: Array, start: int) -> Array:
    """What a slice of a batch gets of an adapter's input: its own pictures' matrices where each picture has some."""
    is_shared = len(value) == 1 or (name != STRENGTH and value.ndim != 3)
    return value if is_shared else value[start : start + SLICE]


def _shapes_text(shapes: Shapes) -> str:
    return "; ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
