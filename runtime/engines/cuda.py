"""The few calls of the CUDA runtime that an engine needs, through ctypes: memory, copies, a stream, a captured graph.

No CUDA package is needed beside the runtime library that TensorRT itself brings. Written after the CUDA runtime's
headers; not run by this project's own tests without a GPU.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy.typing as npt

from personalq.errors import EngineError

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll", "cudart64_12.dll")
_TO_DEVICE, _TO_HOST = 1, 2
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, ...Minor
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: other threads may call CUDA meanwhile


@cache
def library() -> ctypes.CDLL:
    """The CUDA runtime: from the loader's path, or from NVIDIA's Python packages. Raises EngineError without one."""
    places = [Path(name) for name in _LIBRARIES]
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        places += [file for name in _LIBRARIES for file in sorted(Path(folder).glob(f"**/{name}"))]
    for place in places:
        try:
            return ctypes.CDLL(str(place))
        except OSError:
            continue
    raise EngineError(
        "CUDA: the runtime library must be here, got none; install NVIDIA's driver and 'personalq[tensorrt]'"
    )


def call(name: str, *arguments: Any) -> None:
    """Call one function of the runtime. Raises EngineError with what it says."""
    runtime = library()
    status = getattr(runtime, name)(*arguments)
    if status:
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        said = (runtime.cudaGetErrorString(status) or b"").decode(errors="replace")
        raise EngineError(f"CUDA: {name} must succeed, got error {status}: {said}")


def compute_capability(device: int = 0) -> str:
    """'sm89' of one GPU. Raises EngineError when there is none."""
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    return f"sm{numbers[0]}{numbers[1]}"


class Stream:
    """A separate stream, not the default one, so nothing else waits for it."""

    def __init__(self) -> None:
        self.pointer = ctypes.c_void_p()
        call("cudaStreamCreateWithFlags", ctypes.byref(self.pointer), 1)

    @property
    def handle(self) -> int:
        return self.pointer.value or 0

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self.pointer)

    def capture(self, work: Callable[[], None]) -> "Graph":
        """Capture what `work` puts on the stream as a CUDA graph, without running it."""
        call("cudaStreamBeginCapture", self.pointer, _RELAXED)
        recorded = ctypes.c_void_p()
        try:
            work()
        finally:
            call("cudaStreamEndCapture", self.pointer, ctypes.byref(recorded))
        return Graph(recorded)

    def __del__(self) -> None:
        if self.pointer.value:
            library().cudaStreamDestroy(self.pointer)


class Graph:
    """Recorded work, launched as one."""

    def __init__(self, recorded: ctypes.c_void_p) -> None:
        self._executable = ctypes.c_void_p()
        try:
            call("cudaGraphInstantiate", ctypes.byref(self._executable), recorded, ctypes.c_ulonglong(0))
        finally:
            library().cudaGraphDestroy(recorded)

    def launch(self, stream: Stream) -> None:
        call("cudaGraphLaunch", self._executable, stream.pointer)

    def __del__(self) -> None:
        if self._executable.value:
            library().cudaGraphExecDestroy(self._executable)


class Buffer:
    """Memory on the GPU for one array."""

    def __init__(self, n_bytes: int) -> None:
        self._pointer, self._n_bytes = ctypes.c_void_p(), n_bytes
        call("cudaMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(n_bytes))

    @property
    def address(self) -> int:
        return self._pointer.value or 0

    def upload(self, array: npt.NDArray[Any], stream: Stream) -> None:
        """array -> GPU, in the stream's order. The array must be contiguous, and live until the stream is synchronised."""
        self._copy(array, stream, _TO_DEVICE)

    def download(self, array: npt.NDArray[Any], stream: Stream) -> None:
        """GPU -> array, in the stream's order."""
        self._copy(array, stream, _TO_HOST)

    def _copy(self, array: npt.NDArray[Any], stream: Stream, kind: int) -> None:
        assert array.flags.c_contiguous and array.nbytes == self._n_bytes, f"{array.nbytes} of {self._n_bytes} bytes"
        host, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        ends = (self._pointer, host) if kind == _TO_DEVICE else (host, self._pointer)
        call("cudaMemcpyAsync", *ends, size, kind, stream.pointer)

    def __del__(self) -> None:
        if self._pointer.value:
            library().cudaFree(self._pointer)
