"""ONNX Runtime on the CPU: the embedded default."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.bundle import ADDED_ROWS, ADDED_VECTORS, read_manifest
from personalq.errors import EngineError
from personalq.rows import Ids

from .attached import PLAIN, Attached
from .engine import (
    LOWERING,
    ROWS_OUTPUTS,
    WIDE,
    Array,
    Conditioning,
    Denoiser,
    TextEmbeds,
    adapter_inputs,
    check_bytes,
    unet_feed,
    unet_file,
    unet_inputs,
)
from .sessions import Opened, Session, import_onnxruntime, one_line, open_prepared, open_shared


class OrtEngine:
    """ONNX Runtime on the CPU. The files are checked against the manifest, then all graphs are opened."""

    name = "onnxruntime"

    def __init__(self, bundle: Path, threads: int | None = None) -> None:
        """Open a bundle. `threads`: for one operator; None lets ONNX Runtime use every core.

        Raises BundleError when a file is not what was exported, EngineError when one is missing or cannot be opened.
        """
        self.bundle = bundle
        self.manifest = read_manifest(bundle)
        check_bytes(bundle, self.manifest.files)
        graphs, form = self.manifest.graphs, self.manifest.rows.form
        self._threads = threads
        self._opened: list[Opened] = []
        self._wide: Session | None = None
        self._opening = threading.Lock()
        self._encoder = self._share(graphs.text_encoder, self._text_inputs("text_encoder"), ["last_hidden_state"])
        self._second = None
        if graphs.text_encoder_2:
            inputs = self._text_inputs("text_encoder_2")
            self._second = self._share(graphs.text_encoder_2, inputs, ["last_hidden_state", "text_embeds"])
        self._decoder = self._share(graphs.vae_decoder, ["latent"], ["image"])
        rows_inputs = ["text_embeds", "kept_index"] if form == "split" else ["text_embeds"]
        rows_inputs += [ADDED_ROWS] if self.manifest.adapters else []
        with ThreadPoolExecutor(1) as beside:
            # Run once per prompt: its weights stay memory-mapped, which opens sooner and takes no extra memory.
            rows = beside.submit(self._prepare, graphs.text_rows, rows_inputs, ROWS_OUTPUTS[form], is_packed=False)
            self._unet = self._open_unet()
            self._rows = rows.result()

    def _open_unet(self) -> Session:
        return self._prepare_unet(is_wide=False)

    def _prepare_unet(self, *, is_wide: bool) -> Session:
        file = unet_file(self.manifest, WIDE if is_wide else LOWERING)
        inputs = ["sample", "timestep", *unet_inputs(self.manifest)]
        inputs += adapter_inputs(self.manifest, "unet", is_wide=is_wide)
        return self._prepare(file, inputs, ["noise_pred"])

    def _text_inputs(self, graph: str) -> list[str]:
        return ["input_ids", *adapter_inputs(self.manifest, graph)]

    def _unet_of(self, attached: Attached) -> Session:
        """The UNet's session; the one with a branch at every layer is opened when an adapter first needs it."""
        if not attached.is_wide:
            return self._unet
        with self._opening:
            if self._wide is None:
                self._wide = self._prepare_unet(is_wide=True)
        return self._wide

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

    @property
    def takes_chunks(self) -> bool:
        return self.manifest.rows.is_open

    def is_whole(self) -> bool:
        return all(opened.is_whole() for opened in self._opened)

    def encode(self, ids: Ids, second: Ids | None = None, attached: Attached = PLAIN) -> TextEmbeds:
        feed = self._text_feed("text_encoder", self._encoder, ids, attached)
        states = np.asarray(_run(self._encoder, ["last_hidden_state"], feed)[0], dtype=np.float32)
        if self._second is None or second is None:
            return TextEmbeds(states)
        feed = self._text_feed("text_encoder_2", self._second, second, attached)
        more, pooled = _run(self._second, ["last_hidden_state", "text_embeds"], feed)
        both = np.concatenate([states, more], axis=-1, dtype=np.float32)
        return TextEmbeds(both, np.asarray(pooled, np.float32), states.shape[-1])

    def _text_feed(self, graph: str, session: Session, ids: Ids, attached: Attached) -> dict[str, npt.NDArray[Any]]:
        width = next((value.shape[1] for value in session.get_inputs() if value.name == ADDED_VECTORS), 0)
        return {"input_ids": ids, **attached.feed(self.manifest.adapters, graph, width)}

    def text_rows(self, text_embeds: Array, kept_index: Ids, attached: Attached = PLAIN) -> dict[str, npt.NDArray[Any]]:
        form = self.manifest.rows.form
        feed: dict[str, npt.NDArray[Any]] = {"text_embeds": text_embeds, "kept_index": kept_index}
        if form == "full":
            del feed["kept_index"]
        if self.manifest.adapters:
            feed[ADDED_ROWS] = attached.added_rows(text_embeds, self.manifest.rows.layers)
        return dict(zip(ROWS_OUTPUTS[form], _run(self._rows, ROWS_OUTPUTS[form], feed), strict=True))

    def denoiser(self, conditioning: Conditioning, height: int, width: int, attached: Attached = PLAIN) -> Denoiser:
        batch = len(next(iter(conditioning.values())))
        shape = (batch, self.manifest.latent.channels, height, width)
        matrices = attached.feed(self.manifest.adapters, "unet", is_wide=attached.is_wide)
        feed = {**unet_feed(self.manifest, conditioning, height, width), **matrices}
        return _BoundUnet(self._unet_of(attached), feed, shape)

    def decode(self, latent: Array) -> Array:
        return np.asarray(_run(self._decoder, ["image"], {"latent": latent})[0], dtype=np.float32)


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
