"""Put another checkpoint's weights into a refittable float16 plan, by name, and prove that the change can be reverted.

TensorRT names weights as the ONNX file does, and our graphs name them like torch parameters. Refitting quantised weights or
scales is documented nowhere, so quantised bundles are rebuilt. Built for TensorRT 10.12 to 11.4; not run without a GPU.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError, ParityError
from personalq.repository.engines import KeptEngine, engines_of

Feed = Mapping[str, npt.NDArray[Any]]
# Parts of an engine's key in which a donor may differ: whose weights it holds.
_OWN = ("unet.trt.onnx", "weights.data")


def find_donor(bundle: Path, parts: Mapping[str, str]) -> KeptEngine | None:
    """A plan of another checkpoint's bundle that differs from what `parts` asks for in nothing but its weights."""
    for folder in sorted(bundle.parent.glob("*/engines")):
        for kept in engines_of(folder.parent, parts["target"]):
            same = {k: v for k, v in kept.manifest.parts.items() if k not in _OWN}
            if same == {k: v for k, v in parts.items() if k not in _OWN}:
                return kept
    return None


def sample_feed(shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> Feed:
    """Seeded inputs of a float16 bundle's UNet (sample, rows, timestep) at the shapes the plan is best at."""
    random = np.random.default_rng(0)
    feed = {name: random.standard_normal(three[1]).astype(np.float32) for name, three in shapes.items()}
    return feed | {"timestep": np.array([500.0], np.float32)}


def refit_plan(trt: Any, plan: bytes, own: Path, other: Path, feed: Feed) -> bytes:
    """A plan built from `own` (unet.trt.onnx of checkpoint A) -> the plan of `other` (checkpoint B), refittable again.

    The check A -> B -> A: B's prediction differs from A's, and A's comes back bit for bit. Raises ParityError if not,
    EngineError when a weight of the plan is in neither graph.
    """
    backend = import_module("polygraphy.backend.trt")
    engine = backend.engine_from_bytes(plan)
    first = _predict(backend, engine, feed)
    _refit(trt, engine, other)
    changed = _predict(backend, engine, feed)
    made = _serialised(trt, engine)
    _refit(trt, engine, own)
    back = _predict(backend, engine, feed)
    if np.array_equal(first, changed):
        raise ParityError(
            "refit: the other checkpoint must change the prediction, got the same; build its plan instead"
        )
    if not np.array_equal(first, back):
        worst = float(np.abs(first - back).max())
        raise ParityError(
            f"refit: A -> B -> A must give A's prediction back, got a difference of {worst:.3g}; build the plan instead"
        )
    return made


def _refit(trt: Any, engine: Any, graph: Path) -> None:
    logger = trt.Logger(trt.Logger.WARNING)
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)):
        said = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise EngineError(f"{graph}: its weights do not fit the plan: {said}; build the plan instead")
    missing = list(refitter.get_missing_weights())
    if missing or not refitter.refit_cuda_engine():
        what = f"{len(missing)} weights are missing ({missing[0]})" if missing else "TensorRT refused the weights"
        raise EngineError(f"{graph}: {what}; build the plan instead")


def _predict(backend: Any, engine: Any, feed: Feed) -> npt.NDArray[np.float32]:
    with backend.TrtRunner(engine) as runner:
        return np.array(runner.infer(dict(feed))["noise_pred"], np.float32)


def _serialised(trt: Any, engine: Any) -> bytes:
    """The engine with its weights, refittable again."""
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return bytes(engine.serialize_with_config(config))
