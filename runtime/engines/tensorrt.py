"""TensorRT and TensorRT for RTX: the UNet as a compiled plan on the GPU, the small graphs on ONNX Runtime.

A plan has a stream of its own; once its buffers are bound, a step is recorded as a CUDA graph and launched as one.
Written after the API of TensorRT 10.12 to 11.4. BUILT BUT NOT RUN: this project has no GPU in its tests.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError, MissingExtraError
from personalq.repository.engines import check_engine

from . import cuda
from .attached import PLAIN, Attached
from .engine import Array, Conditioning, Denoiser, unet_feed
from .ort import OrtEngine
from .plans import check_shapes, find_plan

logger = logging.getLogger("personalq.runtime")


class TensorRtEngine(OrtEngine):
    """A bundle whose UNet is a plan for this GPU. Text encoder, rows and decoder are the bundle's ONNX graphs."""

    name = "tensorrt"
    module = "tensorrt"

    def _open_unet(self) -> Any:
        trt = import_tensorrt(self.module)
        kept = find_plan(self.bundle, self.name, cuda.compute_capability(), str(trt.__version__))
        check_engine(kept)
        self._parts = kept.manifest.parts
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        if self._parts.get("set.version_compatible") == "yes":
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(kept.path.read_bytes())
        if engine is None:
            raise EngineError(f"{kept.path}: TensorRT cannot read it; remove {kept.path.parent} and build it again")
        return engine

    @property
    def takes_chunks(self) -> bool:
        return False  # a plan is built for 77 rows

    def denoiser(self, conditioning: Conditioning, height: int, width: int, attached: Attached = PLAIN) -> Denoiser:
        batch = len(next(iter(conditioning.values())))
        inputs = unet_feed(self.manifest, conditioning, height, width)
        shape = (batch, self.manifest.latent.channels, height, width)
        check_shapes(self._parts, {"sample": shape, **{name: value.shape for name, value in inputs.items()}})
        return _BoundPlan(import_tensorrt(self.module), self._unet, inputs, shape)


class TensorRtRtxEngine(TensorRtEngine):
    """The same with TensorRT for RTX, which finishes compiling its plans on the user's GPU, just in time."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"


class _BoundPlan:
    """One execution context with its buffers bound: a step copies latents in, launches, and copies the prediction out."""

    def __init__(self, trt: Any, engine: Any, conditioning: Conditioning, shape: tuple[int, ...]) -> None:
        self._context = engine.create_execution_context()
        self._stream = cuda.Stream()
        self._graph: cuda.Graph | None = None
        self._runs = 0
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._buffers: dict[str, cuda.Buffer] = {}
        inputs = {"sample": np.zeros(shape, np.float32), "timestep": np.zeros(1, np.float32), **conditioning}
        for name, value in inputs.items():
            self._bind(trt, engine, name, value)
            if not self._context.set_input_shape(name, tuple(value.shape)):
                raise EngineError(f"{name}: shape {value.shape} is refused by the plan; build it for this shape")
        lacking = self._context.infer_shapes()
        if lacking:
            raise EngineError(
                f"plan: must know the shapes of all inputs, got none for {', '.join(lacking)}; export again"
            )
        self._bind(trt, engine, "noise_pred", np.zeros(tuple(self._context.get_tensor_shape("noise_pred")), np.float32))
        for name in conditioning:
            self._buffers[name].upload(self._host[name], self._stream)
        self._stream.synchronize()

    def _bind(self, trt: Any, engine: Any, name: str, value: npt.NDArray[Any]) -> None:
        """A host array in the plan's own type, and its memory on the GPU."""
        self._host[name] = np.ascontiguousarray(value, dtype=trt.nptype(engine.get_tensor_dtype(name)))
        self._buffers[name] = cuda.Buffer(self._host[name].nbytes)
        self._context.set_tensor_address(name, self._buffers[name].address)

    def __call__(self, sample: Array, timestep: float) -> Array:
        np.copyto(self._host["sample"], sample, casting="same_kind")
        self._host["timestep"][0] = timestep
        for name in ("sample", "timestep"):
            self._buffers[name].upload(self._host[name], self._stream)
        self._launch()
        self._buffers["noise_pred"].download(self._host["noise_pred"], self._stream)
        self._stream.synchronize()
        return np.asarray(self._host["noise_pred"], dtype=np.float32)

    def _launch(self) -> None:
        """The first step runs directly (it allocates), the second is captured, all later ones launch the captured graph."""
        self._runs += 1
        if self._runs == 2:
            self._stream.synchronize()
            try:
                self._graph = self._stream.capture(self._enqueue)
            except EngineError as error:
                logger.warning("the plan cannot be recorded as a CUDA graph, each step is enqueued: %s", error)
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch(self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineError("plan: cannot be run, TensorRT says why in the log; build it again")


def import_tensorrt(module: str) -> Any:
    """TensorRT's Python module. Raises MissingExtraError or EngineError when it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        if module == "tensorrt":
            raise MissingExtraError("tensorrt", "tensorrt") from None
        raise EngineError(f"{module} is not installed; install NVIDIA's {module} package") from None


def fits_here(bundle: Path, target: str) -> str:
    """Why no plan of a bundle can run on this machine; '' when one can. Opens no plan."""
    try:
        module = {"tensorrt": TensorRtEngine, "tensorrt-rtx": TensorRtRtxEngine}[target].module
        find_plan(bundle, target, cuda.compute_capability(), str(import_tensorrt(module).__version__))
    except (EngineError, MissingExtraError) as error:
        return str(error)
    return ""
