"""ONNX Runtime sessions: of a graph, of its copy optimised for this machine, or shared by bundles with equal files.

Optimising an SD1.5 UNet takes seconds (most of them to rewrite INT8 weights for a CPU without VNNI), so the optimised graph
is cached under `<bundle>/engines/` and read back. Text encoder and decoder are the base's in most checkpoints:
they are opened once for all bundles that hold the same bytes.
"""

import hashlib
import logging
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from personalq.bundle import Manifest, inside
from personalq.errors import EngineError, MissingExtraError, RepositoryError
from personalq.repository.engines import check_engine, engine_at, keeping_engine

from .memory import allocated_bytes

logger = logging.getLogger("personalq.runtime")

Session = Any  # onnxruntime.InferenceSession: the package has no types, and is imported when a session is opened
Stamp = tuple[int, int, int]  # bytes, time of change, inode

# MatMulAddFusion turns a quantised Linear with bias into a float Gemm (or, from opset 21, fails to load).
DISABLED_OPTIMIZERS = ["MatMulAddFusion"]
PREPARED, PREPARED_DATA = "prepared.onnx", "prepared.data"
_EXTERNAL_FROM = "1024"  # bytes; smaller tensors lie in the graph file


@dataclass(frozen=True)
class Opened:
    """A session, the files it may have mapped, and the memory that opening it took."""

    session: Session
    files: Mapping[Path, Stamp] = field(default_factory=dict)
    bytes: int = 0

    def is_whole(self) -> bool:
        """Whether every file is what it was when the session was opened."""
        return all(stamp_of(file) == stamp for file, stamp in self.files.items())


_shared: WeakValueDictionary[tuple[str, ...], Opened] = WeakValueDictionary()


def open_shared(bundle: Path, manifest: Manifest, file: str, threads: int | None) -> Opened:
    """The session of a graph, the same one for all bundles with equal files; it closes with its last user."""
    key = _sharing_key(manifest, file, threads)
    found = _shared.get(key)
    if found is None or not found.is_whole():
        before = allocated_bytes()
        session = open_session(inside(bundle, file), threads)
        found = Opened(session, _stamps(bundle, manifest, file), max(allocated_bytes() - before, 0))
        _shared[key] = found
    return found


def is_shared(manifest: Manifest, file: str, threads: int | None) -> bool:
    """Whether the session of a graph is open already."""
    return _sharing_key(manifest, file, threads) in _shared


def shared_bytes() -> int:
    """Memory of all sessions that `open_shared` holds open."""
    return sum(opened.bytes for opened in list(_shared.values()))


def _sharing_key(manifest: Manifest, file: str, threads: int | None) -> tuple[str, ...]:
    return (*graph_hashes(manifest, file).values(), str(threads))


def open_prepared(
    bundle: Path, manifest: Manifest, file: str, threads: int | None, *, is_packed: bool = True
) -> Opened:
    """A graph as ONNX Runtime optimised it on this machine: read back, or made now and kept where that can be written."""
    may_saturate = not has_int8_dot_product() and not has_narrow_weights(manifest)
    parts = {
        **{"target": "onnxruntime", "graph": file, "bundle": manifest.key},
        **{f"sha256 of {name}": sha256 for name, sha256 in graph_hashes(manifest, file).items()},
        **{"onnxruntime": version_of_onnxruntime(), "device": device_name()},
        "convolutions": "flat" if may_saturate else "as exported",
    }
    opens = partial(open_session, threads=threads, is_packed=is_packed, may_saturate=may_saturate)
    found = _read_back(bundle, parts, opens)
    if found is not None:
        return found
    graph = inside(bundle, file)
    try:
        with keeping_engine(bundle, parts, PREPARED) as folder:
            session = opens(graph, save=folder / PREPARED)
            if may_saturate:
                import_module(".flat_convs", __package__).flatten_convs(folder / PREPARED)
    except (RepositoryError, EngineError) as error:
        session = opens(graph)  # says what is wrong when it is the graph
        logger.warning("%s: not prepared for the next opening: %s", file, error)
    return Opened(session, _stamps(bundle, manifest, file))


def _read_back(bundle: Path, parts: Mapping[str, str], opens: Callable[..., Session]) -> Opened | None:
    try:
        kept = engine_at(bundle, parts)
        if kept is None:
            return None
        check_engine(kept)
        session = opens(kept.path, is_prepared=True)
    except EngineError as error:
        logger.warning("%s; preparing it again", error)
        return None
    return Opened(session, {file: stamp_of(file) for file in kept.files()})


def graph_hashes(manifest: Manifest, file: str) -> dict[str, str]:
    """The files of one graph, itself and its weights, by name -> sha256."""
    weights = "weights.data" if file.startswith("unet") else f"{Path(file).stem}.data"
    return {name: entry.sha256 for name, entry in sorted(manifest.files.items()) if name in (file, weights)}


def stamp_of(file: Path) -> Stamp:
    """What changes when a file does; (-1, 0, 0) when there is none."""
    try:
        stat = file.stat()
    except OSError:
        return (-1, 0, 0)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _stamps(bundle: Path, manifest: Manifest, file: str) -> dict[Path, Stamp]:
    return {bundle / name: stamp_of(bundle / name) for name in graph_hashes(manifest, file)}


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises MissingExtraError when it is not installed."""
    try:
        return import_module("onnxruntime")
    except ImportError:
        raise MissingExtraError("onnxruntime", "cpu") from None


def open_session(
    file: Path,
    threads: int | None,
    *,
    profile: Path | None = None,
    model: bytes | None = None,
    save: Path | None = None,
    is_prepared: bool = False,
    is_packed: bool = True,
    may_saturate: bool | None = None,
) -> Session:
    """Open one graph on the CPU; `profile`: where to write what every node did. Raises EngineError in one line.

    model: an edited copy of the graph, opened in place of `file` with the weights that lie beside it. save: where to write
    the optimised graph, its weights beside it; is_prepared: `file` is such a graph. is_packed: weights are prepacked at
    once into the order in which kernels read them; else at each run. may_saturate: whether the fast int8 kernels may saturate
    here, so that exact ones are used; None: decided by this CPU.
    """
    ort = import_onnxruntime()
    if not file.is_file():
        raise EngineError(f"{file}: must be a graph, got no file; export the checkpoint again")
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    if not has_int8_dot_product() if may_saturate is None else may_saturate:
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    if not is_packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if is_prepared:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
        external = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{external}_file_name", PREPARED_DATA)
        options.add_session_config_entry(f"{external}_min_size_in_bytes", _EXTERNAL_FROM)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if model is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    try:
        return ort.InferenceSession(
            model or str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
        )
    except Exception as error:  # onnxruntime raises its own classes over RuntimeError
        raise EngineError(f"{file}: cannot be opened: {one_line(error)}; export the checkpoint again") from error


@cache
def share_arena() -> None:
    """Let all sessions of this process take their working memory from one arena, which grows by exactly what is requested.

    A separate arena per session keeps what the session's largest batch took, rounded up to a power of two.
    """
    ort, native = import_onnxruntime(), import_module("onnxruntime.capi._pybind_state")
    memory = native.OrtMemoryInfo("Cpu", native.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, native.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, native.OrtArenaCfg({"arena_extend_strategy": 1}))


def has_int8_dot_product() -> bool:
    """False on an x86 CPU without VNNI (or where we cannot tell): its u8 x s8 kernels saturate at 16 bits, silently."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def has_narrow_weights(manifest: Manifest) -> bool:
    """Whether every integer weight of the UNet lies within -64..64: then no fast kernel saturates, with or without VNNI.

    Those kernels add two products of uint8 by int8 in 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127 does not.
    """
    return bool(manifest.weight_kinds) and "int8" not in manifest.weight_kinds


def version_of_onnxruntime() -> str:
    """The installed version, of whichever package brings the module."""
    return str(import_onnxruntime().__version__)


@cache
def device_name() -> str:
    """What a prepared graph depends on: the kind of CPU and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    said = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}) or lines[:1]
    return f"{platform.machine()} {hashlib.sha256('|'.join(said).encode()).hexdigest()[:16]}"


def one_line(error: BaseException) -> str:
    """The first line of an error, without the code and the path that onnxruntime puts before it."""
    lines = str(error).strip().splitlines()
    text = lines[0].split(" : ")[-1] if lines else type(error).__name__
    return re.sub(r"^Load model from .* failed:", "", text).strip().rstrip(".")
