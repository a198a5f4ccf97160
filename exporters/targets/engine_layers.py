"""Hold a compiled engine against its spec: which data types each layer of the UNet really runs in.

Reads the two reports there are: TensorRT's engine inspector (JSON), and what tools/trt_aot.py writes for TensorRT for
RTX. In both an engine layer names the ONNX nodes that were fused into it; in a `trt` graph the node of a layer of the
spec bears that layer's name.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from personalq.errors import EngineError

from ..graphs.census import LayerKind

# How the reports spell a data type -> ours. The inspector says 'Int8', 'INT8' or 'Row major linear INT8 format'.
_TYPES = (("int8", "int8"), ("int4", "int4"), ("fp8", "fp8"), ("half", "half"), ("fp16", "half"), ("bfloat16", "bf16"))
_TYPES += (("float", "float"), ("fp32", "float"), ("int32", "int32"), ("int64", "int64"), ("bool", "bool"))
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine: its type, the data types it reads and writes, the ONNX nodes in it."""

    name: str
    kind: str
    inputs: frozenset[str]
    constants: frozenset[str]
    nodes: tuple[str, ...]

    def runs(self) -> str:
        """The arithmetic a product is done in: int8 where integers meet integers, else float over int8, int4 or float."""
        if "int8" in self.inputs:
            return "int8"
        return next((f"float over {one}" for one in ("int4", "int8") if one in self.constants), "float")


def from_aot(report: Mapping[str, Any]) -> list[EngineLayer]:
    """The layers in a report of tools/trt_aot.py --json. Raises EngineError when it holds no engine."""
    if "engine" not in report:
        raise EngineError(
            f"engine report: must hold a built engine, got result {report.get('result')!r}; see its errors"
        )
    layers = []
    for one in report["engine"]:
        big = [dtype for dtype, dims in one["constants"] if _count(dims) >= 64]
        inputs = frozenset(_type(dtype) for dtype, _ in one["inputs"])
        constants = frozenset(_type(dtype) for dtype in big)
        layers.append(EngineLayer(one["name"], one["type"], inputs, constants, tuple(one["onnx"])))
    return layers


def from_inspector(text: str) -> list[EngineLayer]:
    """The layers in what IEngineInspector.get_engine_information(JSON) gives. Raises EngineError in one line.

    Needs ProfilingVerbosity.DETAILED when the engine was built; otherwise layers are bare names.
    """
    try:
        found = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"engine inspector: must give JSON with Layers, got {text[:60]!r}; build again") from error
    if any(not isinstance(one, dict) for one in found):
        raise EngineError("engine inspector: layers must be detailed, got bare names; build with detailed profiling")
    layers = []
    for one in found:
        inputs = frozenset(_type(str(value.get("Format/Datatype", ""))) for value in one.get("Inputs", ()))
        constants = frozenset(_type(str(value.get("Format/Datatype", ""))) for value in one.get("Constants", ()))
        for role in ("Weights", "Bias"):
            if isinstance(one.get(role), dict):
                constants |= {_type(str(one[role].get("Type", "")))}
        nodes = tuple(_NODE.findall(str(one.get("Metadata", ""))))
        layers.append(EngineLayer(str(one.get("Name", "")), str(one.get("LayerType", "")), inputs, constants, nodes))
    return layers


def precisions(layers: Sequence[EngineLayer], wanted: Mapping[str, LayerKind]) -> dict[str, str]:
    """layer of the spec -> 'int8', 'float', 'float over int4' ..., or 'not found' when no engine layer names it."""
    by_node: dict[str, EngineLayer] = {}
    for layer in layers:
        for node in layer.nodes:
            if node in wanted and (node not in by_node or "int8" in layer.inputs):
                by_node[node] = layer
    return {name: by_node[name].runs() if name in by_node else "not found" for name in wanted}


def mismatches(layers: Sequence[EngineLayer], wanted: Mapping[str, LayerKind]) -> list[str]:
    """One line per layer that does not run as the spec says; empty when the engine keeps the census."""
    wrong = []
    for name, runs in precisions(layers, wanted).items():
        kind = wanted[name]
        must = "int8" if kind.activation == "int8" else "float"
        if kind.activation != "int8" and kind.weight != "float":
            must = f"float over {kind.weight}"
        if runs != must and not (must == "float" and runs.startswith("float")):
            wrong.append(f"{name}: must run in {must} as the spec says ({kind}), got {runs}")
    return wrong


def table(layers: Sequence[EngineLayer], wanted: Mapping[str, LayerKind]) -> dict[str, int]:
    """'conv int8/int8 -> int8': how many layers of the spec run how."""
    found = precisions(layers, wanted)
    return dict(sorted(Counter(f"{wanted[name]} -> {runs}" for name, runs in found.items()).items()))


def _type(text: str) -> str:
    lowered = text.lower()
    return next((ours for theirs, ours in _TYPES if theirs in lowered), lowered or "unknown")


def _count(dims: Sequence[int]) -> int:
    count = 1
    for side in dims:
        count *= side
    return count
