"""An adapter's narrow matrices beside a graph's layers, as inputs: y -> y + s (x down) up (arXiv 2106.09685, eq. 3).

Inputs of a layer L (A: 1, or an adapter for each picture; r: any rank, 0 for none):
Linear: L.down (A,K,r), L.up (A,r,N); 1x1 Conv: L.down (A,r,C), L.up (A,N,r); larger Conv: L.down (r,C,kh,kw), one adapter
for the whole batch, L.up (A,N,r). `adapter_strength` (A,) is s. Done after quantisation: integers and kernels stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from personalq.bundle import DOWN, STRENGTH, UP, BranchPlace

from .layers import LayerNode
from .nodes import Builder, add_input

ADAPTERS = "adapters"
# What most adapters change; the rest of a UNet's layers cost a step more than they are asked for.
NARROW = ".attentions."
_TO_CHANNELS, _TO_TOKENS, _TURN = (0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1)
_ALL = 1 << 40  # pixels: more than any picture has
_PATH = {"Cast", "Unsqueeze"}  # what a bias may pass through


@dataclass(frozen=True)
class Branches:
    """is_wide: every layer has a branch, else those of NARROW. rank: of all of them; None: each its own, known at run time.

    is_dequantised: a branch reads what the integer product reads, not the float input before its quantiser: in TensorRT that
    keeps attention one kernel (docs/tensorrt.md).
    """

    is_wide: bool = False
    rank: int | None = None
    is_dequantised: bool = False

    def places(self, layers: Mapping[str, LayerNode]) -> dict[str, BranchPlace]:
        """The layers that get one. Call it before they are quantised: their weights' shapes are the checkpoint's."""
        found = {}
        for name, layer in layers.items():
            shape, is_wide = tuple(int(side) for side in layer.weight.shape.numpy()), NARROW not in name
            if self.is_wide or not is_wide:
                found[name] = BranchPlace(op="conv" if layer.op == "conv" else "linear", weight=shape, is_wide=is_wide)
        return found


def add_branches(
    model: ir.Model,
    layers: Mapping[str, LayerNode],
    places: Mapping[str, BranchPlace],
    branches: Branches,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> None:
    """Give the layers at `places` a branch each, and the graph its inputs, of `dtype`. Edits `model`, whose outputs stay.

    Requires: layers quantised or not, no Gemm. Each rank has a name of its own: equal names mean equal sizes to ONNX Runtime.
    """
    if not places:
        return
    build = Builder(model.graph, "adapter")
    strength = add_input(model.graph, STRENGTH, dtype, (ADAPTERS,))
    factor = build("Unsqueeze", strength, build.constant(np.array([1, 2], np.int64)))
    for name, place in places.items():
        _Branch(layers[name], place, branches, factor, dtype).add()
    model.graph.sort()


@dataclass(frozen=True)
class _Reduced:
    """x down of a Conv: (B,r,pixels), or (B,pixels,r) where is_turned. source: of its pixels, (B,.,h,w) or (B,h,w,.)."""

    value: ir.Value
    is_turned: bool
    source: ir.Value


class _Branch:
    """One layer's branch while it is being added. factor: the strength (A,1,1)."""

    def __init__(
        self, layer: LayerNode, place: BranchPlace, branches: Branches, factor: ir.Value, dtype: ir.DataType
    ) -> None:
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        self.graph, self.build = graph, Builder(graph, f"{layer.name}.branch")
        self.layer, self.place, self.branches = layer, place, branches
        self.factor, self.dtype = factor, dtype

    def add(self) -> None:
        """Add the branch to what the layer gives, its output's quantiser included; where it has a bias, in its place.

        A bias is added either way, so that the branch costs no Add more, and at rank 0, where it is one row, nothing large.
        """
        result = self._result()
        bias = result.producer()
        if self.place.op == "linear" and self.branches.rank is None and bias is not None and self._is_bias(bias):
            index = next(i for i, value in enumerate(bias.inputs) if value is not None and self._is_bias_value(value))
            bias.replace_input_with(index, self._linear(bias.inputs[index]))
            return
        if self.place.op == "conv" and (turned := _only_reader(result, _TO_TOKENS)) is not None:
            result = turned.outputs[0]
        readers = [(use.node, use.idx) for use in result.uses()]
        branch = self._linear(None) if self.place.op == "linear" else self._convolution(result)
        total = self.build("Add", result, branch)
        total.type, total.shape = result.type, result.shape
        for reader, index in readers:
            reader.replace_input_with(index, total)
        if result in self.graph.outputs:
            total.name, result.name = result.name, f"{result.name}_plain"
            self.graph.outputs[list(self.graph.outputs).index(result)] = total

    def _linear(self, bias: ir.Value | None) -> ir.Value:
        """s (x down) up, and the bias: one more row of `up`, beside one more column of ones."""
        n, k = self.place.weight
        down, up = self._inputs((ADAPTERS, k, self._rank()), (ADAPTERS, self._rank(), n))
        x, sides = self._read()
        axis, end = self._vector(1), self._end(up, 1) if sides == 3 else None
        rows = x if sides == 3 else self.build("Unsqueeze", x, axis)
        narrow = self._few(self._scaled(self.build("MatMul", rows, down)), end)
        if bias is not None:
            one = self.build.constant(np.ones((), self.dtype.numpy()))
            narrow = self.build("Pad", narrow, self._vector(0, 0, 0, 0, 0, 1), one)
            each = self.build("Concat", self.build("Shape", up, start=0, end=1), self._vector(1, n), axis=0)
            up = self.build("Concat", up, self.build("Expand", bias, each), axis=1)
        wide = self.build("MatMul", narrow, up)
        return wide if sides == 3 else self.build("Squeeze", wide, axis)

    def _end(self, up: ir.Value, axis: int) -> ir.Value | None:
        """How many pixels the branch gives, at most: 1 at rank 0, else all; None: all, whatever the rank is."""
        if self.branches.rank is not None:
            return None
        rank = self.build("Shape", up, start=axis, end=axis + 1)
        return self.build("Add", self.build("Mul", rank, self._vector(_ALL)), self._vector(1))

    def _few(self, narrow: ir.Value, end: ir.Value | None) -> ir.Value:
        """x down (B,pixels,r) before it is widened: of nothing but zeros one row is enough, and Add repeats it."""
        return narrow if end is None else self.build("Slice", narrow, self._vector(0), end, self._vector(1))

    def _convolution(self, result: ir.Value) -> ir.Value:
        """1x1: products over channels, on whichever side of a Transpose the pixels are: none is turned for the branch's sake.

        Beside a quantised Conv the sum is made with channels last, as ONNX Runtime's kernel computes: it moves the Transpose
        that is written here behind the Add, where it meets others and goes. With channels first the kernel's own output is
        turned, and quantised twice.
        """
        n, c, *kernel = self.place.weight
        rank, producer = self._rank(), result.producer()
        is_1x1, is_turned = kernel == [1, 1], producer is not None and _turns(producer, _TO_TOKENS)
        to_tokens = is_turned or (producer is not None and producer.op_type == "DequantizeLinear")
        down, up = self._inputs((ADAPTERS, rank, c) if is_1x1 else (rank, c, *kernel), (ADAPTERS, n, rank))
        reduced = self._reduce(down, c) if is_1x1 else self._reduce_kernel(down)
        narrow, end = self._scaled(reduced.value), self._end(up, 2) if to_tokens else None
        if reduced.is_turned != to_tokens:
            narrow = self.build("Transpose", narrow, perm=_TURN)
        factors = (self._few(narrow, end), self.build("Transpose", up, perm=_TURN)) if to_tokens else (up, narrow)
        wide = self.build("Reshape", self.build("MatMul", *factors), self._sides(reduced, n, end, to_tokens))
        return self.build("Transpose", wide, perm=_TO_CHANNELS) if to_tokens and not is_turned else wide

    def _reduce(self, down: ir.Value, c: int) -> "_Reduced":
        x, _ = self._read()
        producer = x.producer()
        if producer is not None and _turns(producer, _TO_CHANNELS) and producer.inputs[0] is not None:
            source = producer.inputs[0]
            tokens = self.build("Reshape", source, self._vector(0, -1, c))
            return _Reduced(self.build("MatMul", tokens, self.build("Transpose", down, perm=_TURN)), True, source)
        flat = self.build("Reshape", x, self._vector(0, c, -1))
        return _Reduced(self.build("MatMul", down, flat), False, x)

    def _reduce_kernel(self, down: ir.Value) -> "_Reduced":
        """The layer's own Conv with r kernels. The number of pixels is said, because -1 needs r > 0."""
        kept = ("strides", "pads", "dilations", "auto_pad", "kernel_shape")
        attributes = {name: self.layer.node.attributes[name] for name in kept if name in self.layer.node.attributes}
        small = self.build("Conv", self._read()[0], down, **{name: one.value for name, one in attributes.items()})
        pixels = self.build("ReduceProd", self.build("Shape", small, start=2, end=4), keepdims=1)
        # by a product: ONNX Runtime makes -1 of the one unknown side in a Concat
        shape = self.build("Mul", self._vector(0, 0, 1), pixels)
        return _Reduced(self.build("Reshape", small, shape), False, small)

    def _sides(self, reduced: "_Reduced", n: int, end: ir.Value | None, to_tokens: bool) -> ir.Value:
        """The result's shape: (0,n,h,w), or (0,h,w,n) for `to_tokens`; 0 is the batch; h and w are `end` at most.

        From the branch's own source: a Shape of the result would be one more reader of a quantised Conv, whose kernel then
        has to dequantise twice.
        """
        height, width = (1, 2) if reduced.is_turned else (2, 3)
        order = (0, height, width, 0) if to_tokens else (0, 0, height, width)
        is_side, side = ((0, 1, 1, 0), (0, 0, 0, n)) if to_tokens else ((0, 0, 1, 1), (0, n, 0, 0))
        sides = self.build("Gather", self.build("Shape", reduced.source), self._vector(*order), axis=0)
        sides = sides if end is None else self.build("Min", sides, end)
        return self.build("Add", self.build("Mul", sides, self._vector(*is_side)), self._vector(*side))

    def _inputs(self, *shapes: tuple[int | str, ...]) -> list[ir.Value]:
        names = (f"{self.layer.name}{part}" for part in (DOWN, UP))
        return [add_input(self.graph, name, self.dtype, shape) for name, shape in zip(names, shapes, strict=True)]

    def _rank(self) -> int | str:
        return f"rank.{self.layer.name}" if self.branches.rank is None else self.branches.rank

    def _scaled(self, reduced: ir.Value) -> ir.Value:
        return self.build("Mul", reduced, self.factor)

    def _vector(self, *numbers: int) -> ir.Value:
        return self.build.constant(np.array(numbers, np.int64))

    def _read(self) -> tuple[ir.Value, int]:
        """What the branch reads, and how many axes it has. A balanced input is multiplied back, or read before it is divided."""
        value = self.layer.node.inputs[0]
        assert value is not None
        dequantise = _made_by(value, "DequantizeLinear")
        quantise = _made_by(dequantise.inputs[0], "QuantizeLinear") if dequantise else None
        before = quantise.inputs[0] if quantise else value
        assert before is not None
        balance = _made_by(before, "Mul")
        plain = balance.inputs[0] if balance is not None and self._is_own(balance) else before
        assert plain is not None and (plain.shape is not None or self.place.op == "conv"), self.layer.name
        sides = len(plain.shape) if plain.shape is not None else 4
        if not (self.branches.is_dequantised and quantise):
            return plain, sides
        if plain is not before and balance is not None:
            inverse = balance.inputs[1].const_value.numpy().astype(np.float32)
            value = self.build("Mul", value, self.build.constant((1 / inverse).astype(self.dtype.numpy())))
        return value, sides

    def _result(self) -> ir.Value:
        """The last value of the layer: behind a channel factor, a low-rank part of the spec, the bias, an output's quantiser."""
        value = self.layer.node.outputs[0]
        while len(uses := list(value.uses())) == 1 and (self._is_own(uses[0].node) or self._is_bias(uses[0].node)):
            value = uses[0].node.outputs[0]
        return value

    def _is_own(self, node: ir.Node) -> bool:
        return (node.name or "").startswith(f"{self.layer.name}_")

    def _is_bias(self, node: ir.Node) -> bool:
        return node.op_type == "Add" and any(self._is_bias_value(value) for value in node.inputs if value is not None)

    def _is_bias_value(self, value: ir.Value) -> bool:
        return _source(value).name == f"{self.layer.name}.bias"


def _source(value: ir.Value) -> ir.Value:
    while (producer := value.producer()) is not None and producer.op_type in _PATH and producer.inputs[0] is not None:
        value = producer.inputs[0]
    return value


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def _only_reader(value: ir.Value, perm: tuple[int, ...]) -> ir.Node | None:
    """The Transpose by `perm` that alone reads a value."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and _turns(uses[0].node, perm) else None


def _turns(node: ir.Node, perm: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == perm
