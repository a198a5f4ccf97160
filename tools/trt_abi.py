"""The TensorRT-for-RTX builder library through ctypes: its C++ objects, driven by their virtual tables.

Standard library only: no headers, no compiler, no CUDA, no driver. x86-64 Linux (Itanium C++ ABI). The table positions
hold for TensorRT for RTX 1.6 and 1.7; each was found by reading the library's own caller, and is checked by setting a
value through one position and reading it back through another (`trt_aot.py --self-check`), or by use.
"""

from __future__ import annotations

import ctypes as C
import glob
import mmap
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

I32, I64, U32, SIZE, BOOL = C.c_int32, C.c_int64, C.c_uint32, C.c_size_t, C.c_bool
POINTER, TEXT = C.c_void_p, C.c_char_p

# API objects hold [0] a table that is not used here and [8] a pointer to the implementation, whose table has the methods
# (0 and 1 are destructors).
TABLES: dict[str, dict[str, int]] = {
    "builder": {
        "createBuilderConfig": 5,
        "createNetworkV2": 6,
        "createOptimizationProfile": 7,
        "buildSerializedNetwork": 11,
        "setMaxThreads": 14,
        "getMaxThreads": 15,
    },
    "network": {"getNbLayers": 12, "getLayer": 13, "getNbInputs": 14, "getInput": 15},
    "layer": {"getType": 2, "getName": 4},
    "tensor": {"getName": 3, "getDimensions": 5, "getType": 6},
    "config": {
        "setFlag": 9,
        "getFlag": 10,
        "addOptimizationProfile": 23,
        "setProfilingVerbosity": 25,
        "getProfilingVerbosity": 26,
        "setMemoryPoolLimit": 32,
        "getMemoryPoolLimit": 33,
        "setBuilderOptimizationLevel": 36,
        "getBuilderOptimizationLevel": 37,
        "setNbComputeCapabilities": 55,
        "getNbComputeCapabilities": 56,
        "setComputeCapability": 57,
        "getComputeCapability": 58,
    },
    "profile": {"setDimensions": 2},
    "memory": {"data": 2, "size": 3},
    # These two are used directly: no pointer to an implementation.
    "parser": {"parseFromFile": 1, "supportsOperator": 2, "getNbErrors": 3, "getError": 4},
    "error": {"code": 0, "desc": 1, "node": 5, "nodeName": 6, "nodeOperator": 7},
}
DIRECT = {"parser", "error"}
PARSER_VERSION = 200  # what createNvOnnxParser_INTERNAL wants
KNOWN_VERSIONS = (106, 107)  # major * 100 + minor
STRONGLY_TYPED = 1
WORKSPACE = 0
FLAG_STRIP_PLAN, FLAG_REFIT_IDENTICAL, FLAG_WEIGHT_STREAMING = 18, 19, 20
DETAILED = 2
DTYPES = ("fp32", "fp16", "int8", "int32", "bool", "uint8", "fp8", "bf16", "int64", "int4", "fp4", "e8m0")
SEVERITIES = ("internal", "error", "warning", "info", "verbose")
NO_DRIVER = "cudaError 35"  # follows every error of the API where there is no driver, and says nothing


class Dims(C.Structure):
    """nvinfer1::Dims64."""

    _fields_ = [("n", I32), ("d", I64 * 8)]

    @classmethod
    def of(cls, sides: list[int]) -> Dims:
        dims = cls()
        dims.n = len(sides)
        dims.d[: len(sides)] = sides
        return dims

    def sides(self) -> list[int]:
        return [self.d[i] for i in range(max(self.n, 0))]


class Object:
    """One C++ object; call(method, result type, (type, value)...) goes through its table."""

    def __init__(self, kind: str, pointer: int | None) -> None:
        if not pointer:
            raise RuntimeError(f"the library gave no {kind}")
        self.kind, self.pointer = kind, pointer
        self.this = pointer if kind in DIRECT else _read(pointer + 8)

    def call(self, method: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        function = _read(_read(self.this) + 8 * TABLES[self.kind][method])
        prototype = C.CFUNCTYPE(result, POINTER, *(kind for kind, _ in arguments))
        return prototype(function)(self.this, *(value for _, value in arguments))

    def text(self, method: str) -> str:
        return (self.call(method, TEXT) or b"").decode("utf-8", "replace")

    def make(self, kind: str, method: str, *arguments: tuple[Any, Any]) -> Object:
        return Object(kind, self.call(method, POINTER, *arguments))


def _read(address: int) -> int:
    return int(C.c_uint64.from_address(address).value)


class Logger:
    """A C++ ILogger made by hand: its table is language, interface info, destructors, log."""

    def __init__(self, sink: Callable[[int, str], None]) -> None:
        self._sink = sink
        self._kind = C.create_string_buffer(b"ILogger")
        # Interface info is a 16-byte struct returned in rax:rdx, which a ctypes callback cannot do, so it is machine
        # code: movabs rax, kind; mov edx, 1; ret (major 1, minor 0).
        code = b"\x48\xb8" + struct.pack("<Q", C.addressof(self._kind)) + b"\xba\x01\0\0\0\xc3"
        self._page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(code)
        info = C.addressof(C.c_char.from_buffer(self._page))
        plain, logs = C.CFUNCTYPE(I32, POINTER), C.CFUNCTYPE(None, POINTER, I32, TEXT)
        self._kept = [plain(lambda _: 0), plain(lambda _: 0), logs(self._log)]
        entries = [C.cast(one, POINTER).value for one in self._kept]
        self._table = (POINTER * 5)(entries[0], info, entries[1], entries[1], entries[2])
        self._object = (POINTER * 2)(C.addressof(self._table), 0)
        self.pointer = C.addressof(self._object)

    def _log(self, _this: int, severity: int, text: bytes | None) -> None:
        try:
            message = (text or b"").decode("utf-8", "replace")
            if not (NO_DRIVER in message and "\n" not in message):
                self._sink(severity, message)
        except Exception as error:  # none may escape into C++
            sys.stderr.write(f"log callback: {error!r}\n")


class Library:
    """The two libraries of the wheel, opened. version: e.g. (1, 7, 1)."""

    def __init__(self, folder: str = "") -> None:
        core, parser = find_libraries(folder)
        self.core, self.onnx = C.CDLL(core, C.RTLD_GLOBAL), C.CDLL(parser, C.RTLD_GLOBAL)
        self.number = int(self.core.getInferLibVersion())
        self.version = (self.number // 10000, self.number // 100 % 100, self.number % 100)
        self.core.createInferBuilder_INTERNAL.restype = POINTER
        self.core.createInferBuilder_INTERNAL.argtypes = [POINTER, I32]
        self.onnx.createNvOnnxParser_INTERNAL.restype = POINTER
        self.onnx.createNvOnnxParser_INTERNAL.argtypes = [POINTER, POINTER, I32]

    @property
    def is_known(self) -> bool:
        return self.number // 100 in KNOWN_VERSIONS

    def builder(self, logger: Logger) -> Object:
        return Object("builder", self.core.createInferBuilder_INTERNAL(logger.pointer, self.number))

    def parser(self, network: Object, logger: Logger) -> Object:
        pointer = self.onnx.createNvOnnxParser_INTERNAL(network.pointer, logger.pointer, PARSER_VERSION)
        return Object("parser", pointer)


def find_libraries(folder: str) -> tuple[str, str]:
    """Builder and parser library: in `folder`, $TRT_RTX_DIR, or the wheel installed beside this Python.

    Raises FileNotFoundError in one line.
    """
    places = [folder] if folder else [os.environ.get("TRT_RTX_DIR", "")]
    if not folder:
        places += [os.path.join(place, "onnxruntime_ep_nv_tensorrt_rtx") for place in sys.path if place]
    for place in filter(None, places):
        core = sorted(glob.glob(os.path.join(place, "libtensorrt_rtx.so*")))
        parser = sorted(glob.glob(os.path.join(place, "libtensorrt_onnxparser_rtx.so*")))
        if core and parser:
            return core[0], parser[0]
    raise FileNotFoundError(
        "TensorRT for RTX: no libraries found; run: pip install --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0, "
        "or name their folder with --lib or $TRT_RTX_DIR"
    )


def tensor(pointer: int) -> dict[str, Any]:
    """name, dtype and dims of an ITensor."""
    one = Object("tensor", pointer)
    dtype = one.call("getType", I32)
    name = DTYPES[dtype] if 0 <= dtype < len(DTYPES) else str(dtype)
    return {"name": one.text("getName"), "dtype": name, "dims": one.call("getDimensions", Dims).sides()}


def self_check(library: Library, logger: Logger) -> list[str]:
    """What is wrong with the table positions for this library: one line each, empty when all hold."""
    builder = library.builder(logger)
    config = builder.make("config", "createBuilderConfig")
    wrong = [] if _round_trip(builder, "setMaxThreads", "getMaxThreads", 3) else ["builder threads"]
    for flag in (FLAG_STRIP_PLAN, FLAG_WEIGHT_STREAMING):
        before = [config.call("getFlag", BOOL, (I32, i)) for i in range(24)]
        config.call("setFlag", None, (I32, flag))
        after = [config.call("getFlag", BOOL, (I32, i)) for i in range(24)]
        if [i for i in range(24) if before[i] != after[i]] != [flag]:
            wrong.append(f"config flag {flag}")
    config.call("setMemoryPoolLimit", None, (I32, WORKSPACE), (SIZE, 123 << 20))
    if config.call("getMemoryPoolLimit", SIZE, (I32, WORKSPACE)) != 123 << 20:
        wrong.append("workspace limit")
    for what in ("BuilderOptimizationLevel", "ProfilingVerbosity"):
        if not _round_trip(config, f"set{what}", f"get{what}", 2):
            wrong.append(what)
    if not set_architectures(config, [86, 89, 120]) or set_architectures(config, [77]):
        wrong.append("compute capabilities")
    network = builder.make("network", "createNetworkV2", (U32, STRONGLY_TYPED))
    parser = library.parser(network, logger)
    for operator, known in (("Conv", True), ("QuantizeLinear", True), ("NoSuchOp", False)):
        if parser.call("supportsOperator", BOOL, (TEXT, operator.encode())) != known:
            wrong.append(f"parser knows {operator}")
    if network.call("getNbLayers", I32) != 0:
        wrong.append("an empty network has layers")
    return wrong


def _round_trip(one: Object, setter: str, getter: str, value: int) -> bool:
    one.call(setter, None, (I32, value))
    return bool(one.call(getter, I32) == value)


def set_architectures(config: Object, architectures: list[int]) -> bool:
    """Compile for these SM numbers (86, 89, 120 ...); False when the library refuses one."""
    if not config.call("setNbComputeCapabilities", BOOL, (I32, len(architectures))):
        return False
    for index, number in enumerate(architectures):
        if not config.call("setComputeCapability", BOOL, (I32, number), (I32, index)):
            return False
    count = config.call("getNbComputeCapabilities", I32)
    return [config.call("getComputeCapability", I32, (I32, i)) for i in range(count)] == architectures
