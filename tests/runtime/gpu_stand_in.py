"""What a TensorRT engine touches, without a GPU: CUDA memory that is host memory, and plans that ONNX Runtime computes.

Copies happen when the stream is synchronised, as late as CUDA may do them, and in its order; recorded work does not run
while it is recorded. A plan's bytes are the path of the graph it computes, so results are compared with another engine's.
"""

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from runtime.engines import cuda

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int64)": np.int64,
}
_MAJOR = 75  # cudaDevAttrComputeCapabilityMajor


class HostCuda:
    """The calls of the CUDA runtime that runtime.engines.cuda makes; each returns 0 as CUDA does."""

    def __init__(self) -> None:
        self.launches = 0
        self._memory: dict[int, Any] = {}
        self._queued: list[Callable[[], None]] = []
        self._recorded: list[Callable[[], None]] | None = None
        self._graph: list[Callable[[], None]] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        (self._queued if self._recorded is None else self._recorded).append(work)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """The memory at an address as an array; KeyError where nothing was allocated, ValueError where too little was."""
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if n_bytes != len(self._memory[address]):
            raise ValueError(f"{len(self._memory[address])} bytes for {shape} {np.dtype(dtype)}")
        return np.frombuffer(self._memory[address], dtype).reshape(shape)

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = 8 if attribute == _MAJOR else 9
        return 0

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        memory = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(memory)
        self._memory[ctypes.addressof(memory)] = memory
        return 0

    def cudaFree(self, pointer: Any) -> int:
        del self._memory[pointer.value]
        return 0

    def cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: int, stream: Any) -> int:
        self.enqueue(lambda: ctypes.memmove(to, source, size.value))
        return 0

    def cudaStreamCreateWithFlags(self, pointer: Any, flags: int) -> int:
        pointer._obj.value = 1
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:
        while self._queued:
            self._queued.pop(0)()
        return 0

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> int:
        self._recorded = []
        return 0

    def cudaStreamEndCapture(self, stream: Any, recorded: Any) -> int:
        self._graph, self._recorded = self._recorded or [], None
        recorded._obj.value = 1
        return 0

    def cudaGraphInstantiate(self, executable: Any, recorded: Any, flags: Any) -> int:
        executable._obj.value = 1
        return 0

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> int:
        self.launches += 1
        self._queued += self._graph
        return 0

    def cudaGraphDestroy(self, recorded: Any) -> int:
        return 0

    cudaStreamDestroy = cudaGraphExecDestroy = cudaGraphDestroy


class HostPlan:
    """A deserialised plan (ICudaEngine) and its one execution context."""

    def __init__(self, host: HostCuda, graph: str) -> None:
        self._cuda = host
        self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self._types = {
            value.name: _TYPES[value.type] for value in [*self._session.get_inputs(), *self._session.get_outputs()]
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def get_tensor_dtype(self, name: str) -> Any:
        return self._types[name]

    def create_execution_context(self) -> "HostPlan":
        return self

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name in self._types

    def infer_shapes(self) -> list[str]:
        return [value.name for value in self._session.get_inputs() if value.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"]

    def execute_async_v3(self, stream: int) -> bool:
        self._cuda.enqueue(self._compute)
        return True

    def _compute(self) -> None:
        feed = {
            name: self._cuda.array(self._addresses[name], shape, self._types[name])
            for name, shape in self.shapes.items()
        }
        made = self._session.run(["noise_pred"], feed)[0]
        self._cuda.array(self._addresses["noise_pred"], made.shape, made.dtype)[:] = made


def stand_in(monkeypatch: pytest.MonkeyPatch) -> tuple[HostCuda, list[HostPlan]]:
    """Put both in the places of CUDA and TensorRT; return CUDA and the plans, as they are opened."""
    host, plans = HostCuda(), list[HostPlan]()
    monkeypatch.setattr(cuda, "library", lambda: host)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(host, plans))
    return host, plans


def tensorrt_module(host: HostCuda, plans: list[HostPlan]) -> Any:
    """A module 'tensorrt'; every plan that it deserialises is appended to `plans`."""

    def deserialize(data: bytes) -> HostPlan:
        plans.append(HostPlan(host, data.decode()))
        return plans[-1]

    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    return SimpleNamespace(__version__="11.4.0", Logger=logger, Runtime=lambda _: runtime, nptype=lambda dtype: dtype)
