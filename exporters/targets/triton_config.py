"""`config.pbtxt` of a Triton model, written and read with Triton's own message types.

`triton_model_config.binpb` is the compiled descriptor of Triton's model_config.proto as tritonclient 2.73.0 ships it
(BSD 3-clause, Copyright NVIDIA CORPORATION; the terms are in triton_model_config.LICENSE). A field that Triton does not
know cannot be written, and a text that Triton's parser would refuse is refused here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from personalq.errors import BundleError

DESCRIPTOR = Path(__file__).with_name("triton_model_config.binpb")
TYPES = {
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT64: "TYPE_INT64",
}
OPTIMISATION_OFF = 2  # of ONNX Runtime, as Triton's backend numbers it: the graph runs as it is written


@dataclass(frozen=True)
class Port:
    """An input or output: its ONNX type and its sides, -1 where it is open."""

    name: str
    dtype: ir.DataType
    dims: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of one model. backend 'onnxruntime' or 'tensorrt'; kind: KIND_AUTO, KIND_CPU, KIND_GPU."""

    name: str
    backend: str
    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kind: str = "KIND_AUTO"
    is_optimised: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)


def config_text(config: ModelConfig) -> str:
    """The text of config.pbtxt. The batch is an ordinary dynamic dimension: the caller batches guidance and requests."""
    from google.protobuf import text_format

    message = _message()()
    message.name, message.backend, message.default_model_filename = config.name, config.backend, config.file
    message.max_batch_size = 0
    for ports, field_ in ((config.inputs, message.input), (config.outputs, message.output)):
        for port in ports:
            told = field_.add()
            told.name, told.data_type = port.name, _value(told, "data_type", TYPES[port.dtype])
            told.dims.extend(port.dims)
    group = message.instance_group.add()
    group.count, group.kind = 1, _value(group, "kind", config.kind)
    if config.is_optimised:
        message.optimization.graph.level = OPTIMISATION_OFF
    for key, value in config.tags.items():
        message.metric_tags[key] = value
    return str(text_format.MessageToString(message))


def parse_config(text: str) -> Any:
    """config.pbtxt as Triton's message. Raises BundleError with the parser's line for what Triton would refuse."""
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, _message()())
    except text_format.ParseError as error:
        raise BundleError(f"config.pbtxt: must be Triton's ModelConfig, got {error}; export it again") from error


def ports_of(values: Sequence[ir.Value]) -> tuple[Port, ...]:
    """Inputs or outputs of a graph; a side that is not a number is open. Raises BundleError for a type without a name."""
    found = []
    for value in values:
        name, dtype, shape = str(value.name), value.dtype, value.shape
        if dtype not in TYPES or shape is None:
            known = ", ".join(one.name for one in TYPES)
            raise BundleError(f"{name}: must be of type {known} with a shape, got {dtype}; export the checkpoint again")
        dims = tuple(side if isinstance(side, int) else -1 for side in shape.dims)
        found.append(Port(name, dtype, dims))
    return tuple(found)


@cache
def _message() -> Any:
    """The class inference.ModelConfig."""
    from google.protobuf import descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(DESCRIPTOR.read_bytes())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def _value(message: Any, name: str, value: str) -> int:
    """The number of an enum's value by its name."""
    return int(message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_name[value].number)
