"""Bundle -> TensorRT or TensorRT-for-RTX plan, through Polygraphy, kept under the bundle's engines/.

TensorRT builds on the GPU that will run the plan. TensorRT for RTX compiles ahead of time for named architectures, on any
machine. Both take `unet.trt.onnx`: strongly typed, so that the data types in the graph are those of the plan; and of a base,
one graph more for each rank of adapters.
Built against the API of TensorRT 10.12 to 11.4 and Polygraphy 0.53; not run by this project's own tests without a GPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir

from personalq.bundle import STRENGTH, Manifest, read_manifest
from personalq.errors import EngineError, MissingExtraError
from personalq.repository.engines import KeptEngine, check_engine, engine_at, keep_engine

from ..graphs.census import layer_kinds
from ..manifest import RANKS
from .engine_layers import from_inspector, mismatches, table
from .refit import find_donor, refit_plan, sample_feed
from .settings import BuildSettings, Shapes, input_shapes

GRAPH, WEIGHTS, PLAN, LAYERS = "unet.trt.onnx", "weights.data", "unet.plan", "layers.json"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # read by Polygraphy when it is imported
Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuiltPlan:
    """The plan, whether it was there already, and layers that do not run as the spec says (None: not looked at)."""

    engine: KeptEngine
    reused: bool
    mismatches: tuple[str, ...] | None


def require(target: str) -> Any:
    """The target's own Python module. Raises MissingExtraError or EngineError in one line that says what to install."""
    module = MODULES[target]
    if not _is_there(module):
        if target == "tensorrt":
            raise MissingExtraError("tensorrt", "tensorrt")
        raise EngineError(
            "tensorrt_rtx is not installed; install NVIDIA's package 'tensorrt_rtx' (it compiles without a GPU too)"
        )
    if not _is_there("polygraphy"):
        raise MissingExtraError("polygraphy", "tensorrt")
    use_rtx = target == "tensorrt-rtx"
    loaded = sys.modules.get("polygraphy.config")
    if loaded is not None and bool(loaded.USE_TENSORRT_RTX) != use_rtx:
        raise EngineError(f"target {target}: one process builds for one of tensorrt and tensorrt-rtx; run it apart")
    os.environ[_RTX_SWITCH] = "1" if use_rtx else "0"
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # a package whose libraries are missing
        raise EngineError(f"{module} cannot be imported: {error}; install it again, with its libraries") from error


def ranks_of(bundle: Path, settings: BuildSettings) -> tuple[int, ...]:
    """The ranks of adapters that a bundle's plans are built for: those asked for, else 0, and of a base the smallest too."""
    if settings.rank:
        return settings.rank
    takes_adapters = read_manifest(bundle).adapters is not None and not settings.refit
    return (0, RANKS[0]) if takes_adapters else (0,)


def build_plan(
    bundle: Path,
    cache_dir: Path,
    target: str,
    settings: BuildSettings,
    progress: Progress = lambda _: None,
    *,
    rank: int = 0,
) -> BuiltPlan:
    """Build a bundle's UNet for 'tensorrt' or 'tensorrt-rtx'; an engine that is there under the same key is used again.

    cache_dir: where timing caches are kept, one per TensorRT version and GPU. rank: of the adapters that the plan takes.
    Raises EngineError or MissingExtraError.
    """
    trt = require(target)
    manifest = read_manifest(bundle)
    graph = graph_file(manifest, rank)
    if settings.refit and any("int" in kind for kind in manifest.census):
        raise EngineError(
            "--set refit: must be used with an unquantised (fp16) bundle, got a quantised one; leave it out"
        )
    parts = plan_parts(manifest, target, settings, trt.__version__, rank)
    kept = engine_at(bundle, parts)
    if kept is not None:
        return BuiltPlan(kept, True, _known_mismatches(kept))
    progress(f"building the {target} plan" + (f" of rank {rank}" if rank else ""))
    donor = find_donor(bundle, parts) if settings.refit else None
    if donor is not None:
        progress(f"refitting the {target} plan of another checkpoint")
        check_engine(donor)
        graphs = donor.path.parents[2] / GRAPH, bundle / GRAPH
        data = refit_plan(trt, donor.path.read_bytes(), *graphs, sample_feed(graph_shapes(bundle, settings)))
        return BuiltPlan(keep_engine(bundle, parts, PLAN, data), False, None)
    timing = cache_dir / f"{target}-{trt.__version__}-{parts['device']}.timing"
    shapes = graph_shapes(bundle, settings, graph)
    plan = _build(trt, bundle / graph, shapes, target, settings, timing)
    wrong: tuple[str, ...] | None = None
    extra: dict[str, bytes] = {}
    if target == "tensorrt" and not settings.strip:
        progress("reading back what the plan runs")
        wrong, extra[LAYERS] = inspect(trt, plan, bundle / graph)
    return BuiltPlan(keep_engine(bundle, parts, PLAN, memoryview(plan), extra), False, wrong)


def graph_file(manifest: Manifest, rank: int) -> str:
    """The graph that takes adapters of one rank. Raises EngineError for a bundle without it."""
    file = manifest.graphs.unet.get(f"trt_rank{rank}" if rank else "trt", "")
    if file not in manifest.files:
        told = f"a graph for TensorRT that takes adapters of rank {rank}" if rank else GRAPH
        raise EngineError(f"bundle {manifest.key[:12]}: must hold {told}, got none; export it again")
    return file


def plan_parts(manifest: Manifest, target: str, settings: BuildSettings, version: str, rank: int = 0) -> dict[str, str]:
    """Everything a plan depends on, in readable form: graph, weights, device, version, shapes, settings and rank.

    Of rank 0 the keys are those of plans that were built before there were ranks.
    """
    device = ",".join(settings.architectures) if target == "tensorrt-rtx" else compute_capability()
    files = {name: manifest.files[name].sha256 for name in (graph_file(manifest, rank), WEIGHTS)}
    shapes = {
        name: "/".join("x".join(map(str, one)) for one in three) for name, three in sorted_shapes(manifest, settings)
    }
    chosen = {f"set.{name}": value for name, value in settings.parts().items()}
    if rank:  # an adapter for each picture: as many as the batch
        shapes[f"shape.{STRENGTH}"], chosen["set.rank"] = "/".join(map(str, settings.batch)), str(rank)
    return {"target": target, "version": version, "device": device, **files, **shapes, **chosen}


def graph_shapes(bundle: Path, settings: BuildSettings, graph: str = GRAPH) -> Shapes:
    """(min, opt, max) of every input of one of a bundle's `trt` graphs that has open sides, whatever its architecture."""
    return with_other_inputs(input_shapes(read_manifest(bundle), settings), ir.load(bundle / graph), settings)


def with_other_inputs(shapes: Shapes, model: ir.Model, settings: BuildSettings) -> Shapes:
    """`shapes`, and those of inputs that only some graphs have: open in their batch.

    SDXL's text_embeds and time_ids, and an adapter's, of which each picture then has its own.
    Raises EngineError for an input whose other sides are open too.
    """
    found = dict(shapes)
    for value in model.graph.inputs:
        sides = list(value.shape or ())
        if value.name in shapes or all(isinstance(side, int) for side in sides):
            continue
        if not all(isinstance(side, int) for side in sides[1:]):
            raise EngineError(f"{value.name}: must be open in its batch only, got {sides}; export the checkpoint again")
        rest = tuple(int(side) for side in sides[1:])
        low, middle, high = settings.batch
        found[str(value.name)] = ((low, *rest), (middle, *rest), (high, *rest))
    return found


def sorted_shapes(manifest: Manifest, settings: BuildSettings) -> list[tuple[str, Any]]:
    return sorted((f"shape.{name}", three) for name, three in input_shapes(manifest, settings).items())


def compute_capability() -> str:
    """'sm89' of the first GPU. Raises EngineError when the driver shows none: TensorRT builds on the GPU it is for."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        lines = []
    if not lines:
        raise EngineError(
            "target tensorrt: needs an NVIDIA GPU to build on, got none; build on the machine that serves"
        )
    return f"sm{lines[0].replace('.', '')}"


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # in sys.modules without a spec: taken away, or a stand-in
        return False


def _build(trt: Any, graph: Path, shapes: Shapes, target: str, settings: BuildSettings, timing: Path) -> Any:
    """Parse and build; returns the plan as a buffer. Raises EngineError in one line with what the builder said."""
    backend = import_module("polygraphy.backend.trt")
    failure = import_module("polygraphy.exception").PolygraphyException
    timing.parent.mkdir(parents=True, exist_ok=True)
    try:
        network = backend.network_from_onnx_path(str(graph), strongly_typed=True)
        config = builder_config(trt, backend, shapes, target, settings, timing)
        return backend.engine_bytes_from_network(network, config=config, save_timing_cache=str(timing))
    except failure as error:
        said = (str(error).strip().splitlines() or ["nothing"])[-1]
        raise EngineError(
            f"{graph}: {target} refuses it: {said}; look with 'personalq export ID --lint trt'"
        ) from error


def builder_config(trt: Any, backend: Any, shapes: Shapes, target: str, settings: BuildSettings, timing: Path) -> Any:
    """The Polygraphy loader of the builder's config. No precision flag: the network is strongly typed."""
    profile = backend.Profile()
    for name, (low, middle, high) in shapes.items():
        profile.add(name, min=low, opt=middle, max=high)
    options: dict[str, Any] = {
        "profiles": [profile],
        "builder_optimization_level": settings.level,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "load_timing_cache": str(timing) if timing.is_file() else None,
        "strip_plan": settings.strip,
        "refittable": settings.refit,
        "version_compatible": settings.version_compatible,
        "exclude_lean_runtime": settings.exclude_lean_runtime,
        "weight_streaming": settings.weight_streaming,
    }
    if settings.workspace_mb:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: settings.workspace_mb << 20}
    if target == "tensorrt-rtx":
        numbers = [int(one.removeprefix("sm")) for one in settings.architectures]
        capabilities = [divmod(number, 10) for number in numbers]
        return import_module("polygraphy.backend.tensorrt_rtx").CreateConfigRTX(
            compute_capabilities=capabilities, **options
        )
    level = getattr(trt.HardwareCompatibilityLevel, settings.hardware.upper())
    return backend.CreateConfig(tf32=settings.tf32, hardware_compatibility_level=level, **options)


def inspect(trt: Any, plan: Any, graph: Path) -> tuple[tuple[str, ...], bytes]:
    """(layers that do not run as the graph says, layers.json). The plan is opened on this machine's GPU."""
    engine = import_module("polygraphy.backend.trt").engine_from_bytes(plan)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    wanted = layer_kinds(ir.load(graph))
    layers = from_inspector(text)
    wrong = tuple(mismatches(layers, wanted))
    found = {"layers": table(layers, wanted), "mismatches": wrong, "inspector": json.loads(text)}
    return wrong, (json.dumps(found, indent=1) + "\n").encode()


def _known_mismatches(kept: KeptEngine) -> tuple[str, ...] | None:
    file = kept.path.parent / LAYERS
    return tuple(json.loads(file.read_text())["mismatches"]) if file.is_file() else None
