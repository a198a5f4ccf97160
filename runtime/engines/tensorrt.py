"""TensorRT and TensorRT for RTX: the UNet as a compiled plan on the GPU, the small graphs on ONNX Runtime.

A plan has a stream of its own; once its buffers are bound, a step is recorded as a CUDA graph and launched as one.
A base has a plan for each of a few ranks of adapters; each is opened when a picture first needs it.
Written after the API of TensorRT 10.12 to 11.4. BUILT BUT NOT RUN: this project has no GPU in its tests.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.bundle import STRENGTH
from personalq.errors import EngineError, MissingExtraError
from personalq.repository.engines import KeptEngine, check_engine

from . import cuda
from .attached import PLAIN, Attached
from .engine import Array, Conditioning, Denoiser, unet_feed
from .ort import OrtEngine
from .plans import check_shapes, find_plan, rank_of

logger = logging.getLogger("personalq.runtime")


class TensorRtEngine(OrtEngine):
    """A bundle whose UNet is a plan for this GPU. Text encoders, rows and decoder are the bundle's ONNX graphs."""

    name = "tensorrt"
    module = "tensorrt"

    def _open_unet(self) -> Any:
        plans = _Plans(self.bundle, self.name, self.module)
        if self.manifest.adapters is None:
            plans.of(0)
        return plans

    @property
    def takes_chunks(self) -> bool:
        return False  # a plan is built for 77 rows

    def denoiser(self, conditioning: Conditioning, height: int, width: int, attached: Attached = PLAIN) -> Denoiser:
        if attached.is_wide:
            raise EngineError(
                f"{self.name}: must be given adapters of attention layers, got one that changes others too, which its plans take "
                "no matrices for; draw it with onnxruntime"
            )
        batch = len(next(iter(conditioning.values())))
        shape, taken = (batch, self.manifest.latent.channels, height, width), self.manifest.adapters
        plan = self._unet.of(0 if taken is None else attached.rank(taken))
        inputs = dict(unet_feed(self.manifest, conditioning, height, width))
        if taken is not None and plan.rank:
            inputs |= attached.padded(taken, plan.rank, batch, plan.type_of(STRENGTH))
        check_shapes(plan.parts, {"sample": shape, **{name: value.shape for name, value in inputs.items()}})
        return _BoundPlan(plan, inputs, shape)


class TensorRtRtxEngine(TensorRtEngine):
    """The same with TensorRT for RTX, which finishes compiling its plans on the user's GPU, just in time."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"


@dataclass(frozen=True)
class _Plan:
    """A plan on the GPU. trt: TensorRT's module; runtime, logger: must outlive the engine."""

    key: str
    parts: Mapping[str, str]
    trt: Any
    logger: Any
    runtime: Any
    engine: Any

    @property
    def rank(self) -> int:
        return rank_of(self.parts)

    def type_of(self, name: str) -> Any:
        """numpy's type of one of its inputs or outputs."""
        return self.trt.nptype(self.engine.get_tensor_dtype(name))


class _Plans:
    """A bundle's plans for this GPU, by the rank of adapters: opened when first needed, then kept. For any thread."""

    def __init__(self, bundle: Path, target: str, module: str) -> None:
        """Raises EngineError when no plan of the bundle runs here at all."""
        self._bundle, self._target, self._trt = bundle, target, import_tensorrt(module)
        self._device, self._opening = cuda.compute_capability(), threading.Lock()
        self._of_rank: dict[int, _Plan] = {}
        self._find(0)

    def of(self, rank: int) -> _Plan:
        """The plan for adapters of a rank. Raises EngineError when none takes so many, or it cannot be opened."""
        with self._opening:
            if rank not in self._of_rank:
                kept = self._find(rank)
                opened = (plan for plan in self._of_rank.values() if plan.key == kept.manifest.key)
                self._of_rank[rank] = next(opened, None) or self._open(kept)
            return self._of_rank[rank]

    def _find(self, rank: int) -> KeptEngine:
        try:
            return find_plan(self._bundle, self._target, self._device, str(self._trt.__version__), rank)
        except EngineError as error:
            if not rank:
                raise
            raise EngineError(f"{error}; build one with --set rank, or draw it with onnxruntime") from error

    def _open(self, kept: KeptEngine) -> _Plan:
        check_engine(kept)
        logger = self._trt.Logger(self._trt.Logger.WARNING)
        runtime, parts = self._trt.Runtime(logger), kept.manifest.parts
        if parts.get("set.version_compatible") == "yes":
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(kept.path.read_bytes())
        if engine is None:
            raise EngineError(f"{kept.path}: TensorRT cannot read it; remove {kept.path.parent} and build it again")
        return _Plan(kept.manifest.key, parts, self._trt, logger, runtime, engine)


class _BoundPlan:
    """One execution context with its buffers bound: a step copies latents in, launches, and copies the prediction out."""

    def __init__(self, plan: _Plan, conditioning: Conditioning, shape: tuple[int, ...]) -> None:
        self._plan = plan
        self._context = plan.engine.create_execution_context()
        self._stream = cuda.Stream()
        self._graph: cuda.Graph | None = None
        self._runs = 0
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._buffers: dict[str, cuda.Buffer] = {}
        inputs = {"sample": np.zeros(shape, np.float32), "timestep": np.zeros(1, np.float32), **conditioning}
        for name, value in inputs.items():
            self._bind(name, value)
            if not self._context.set_input_shape(name, tuple(value.shape)):
                raise EngineError(f"{name}: shape {value.shape} is refused by the plan; build it for this shape")
        lacking = self._context.infer_shapes()
        if lacking:
            raise EngineError(
                f"plan: must know the shapes of all inputs, got none for {', '.join(lacking)}; export again"
            )
        self._bind("noise_pred", np.zeros(tuple(self._context.get_tensor_shape("noise_pred")), np.float32))
        for name in conditioning:
            self._buffers[name].upload(self._host[name], self._stream)
        self._stream.synchronize()

    def _bind(self, name: str, value: npt.NDArray[Any]) -> None:
        """A host array in the plan's own type, and its memory on the GPU."""
        self._host[name] = np.ascontiguousarray(value, dtype=self._plan.type_of(name))
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


def fits_here(bundle: Path, target: str, rank: int = 0) -> str:
    """Why no plan of a bundle can run on this machine, with adapters of a rank; '' when one can. Opens no plan."""
    try:
        module = {"tensorrt": TensorRtEngine, "tensorrt-rtx": TensorRtRtxEngine}[target].module
        find_plan(bundle, target, cuda.compute_capability(), str(import_tensorrt(module).__version__), rank)
    except (EngineError, MissingExtraError) as error:
        return str(error)
    return ""
