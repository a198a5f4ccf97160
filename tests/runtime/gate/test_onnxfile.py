"""The small reader sees what onnx sees, and what it adds to a graph runs."""

from pathlib import Path

import numpy as np
import pytest

from personalq.errors import BundleError
from runtime.gate.onnxfile import (
    appended,
    cut_off,
    encode_varint,
    new_initializer,
    new_node,
    new_output,
    read_graph,
)
from runtime.sessions import open_session

onnx = pytest.importorskip("onnx", reason="onnx writes the graphs that are read here: pip install 'personalq[export]'")


def test_nodes_and_tensors_are_those_that_onnx_reads(bundle: Path) -> None:
    for name in ("unet.ort.onnx", "text_rows.onnx", "text_encoder.onnx", "vae_decoder.onnx"):
        model, graph = onnx.load(bundle / name), read_graph(bundle / name)
        for theirs, mine in zip(model.graph.node, graph.nodes, strict=True):
            assert (theirs.name, theirs.op_type) == (mine.name, mine.op)
            assert (tuple(theirs.input), tuple(theirs.output)) == (mine.inputs, mine.outputs)
            assert {a.name: a.i for a in theirs.attribute if a.type == onnx.AttributeProto.INT} == mine.attributes
        for tensor in model.graph.initializer:
            np.testing.assert_array_equal(graph.tensors[tensor.name].read(), onnx.numpy_helper.to_array(tensor))
        assert [value.name for value in model.graph.input] == list(graph.inputs)
        assert [value.name for value in model.graph.output] == list(graph.outputs)


@pytest.mark.parametrize("shape", [(8,), (1, 300, 2), (0, 3), ()], ids=str)
def test_shapes_are_read_packed_or_not(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    tensor = onnx.numpy_helper.from_array(array, "x")
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "g.onnx")
    np.testing.assert_array_equal(read_graph(tmp_path / "g.onnx").tensors["x"].read(), array)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**40, -1])
def test_varints_are_protobufs(value: int) -> None:
    tensor = onnx.TensorProto(dims=[value])
    assert tensor.SerializeToString().endswith(encode_varint(value))


def test_a_value_can_be_tapped_and_given_another_producer(bundle: Path) -> None:
    """The UNet's `noise_pred` doubled: its node is cut off, and a new one makes the value of that name."""
    file = bundle / "unet.ort.onnx"
    graph, data = read_graph(file), bytearray(file.read_bytes())
    last = graph.producers["noise_pred"]
    cut_off(data, last, "noise_pred", 7)
    parts = [new_node("Add", list(last.inputs), "once"), new_initializer("two", np.array(2, np.float32))]
    parts += [new_node("Mul", ["once", "two"], "noise_pred"), new_output("once")]
    session = open_session(file, 1, model=appended(bytes(data), parts))
    feed = {value.name: _zeros(value) for value in session.get_inputs()}
    doubled, once = session.run(["noise_pred", "once"], feed)
    np.testing.assert_array_equal(doubled, 2 * once)
    assert [value.name for value in session.get_outputs()] == ["noise_pred", "once"]


def _zeros(value: object) -> np.ndarray:
    kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(float16)": np.float16}
    shape = [side if isinstance(side, int) else {"h": 8, "w": 8}.get(side, 1) for side in value.shape]  # type: ignore[attr-defined]
    return np.ones(shape, kinds.get(value.type, np.int64))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "content", [b"", b"not a graph", b"\x3a\xff\xff\xff\x7f", b"\x08"], ids=["empty", "text", "long", "cut"]
)
def test_what_is_no_graph_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"^x.onnx: must be an ONNX graph, got .*; export the checkpoint again$"):
        read_graph(tmp_path / "x.onnx")


def test_a_tensor_whose_bytes_are_missing_is_one_line(bundle: Path, tmp_path: Path) -> None:
    graph = read_graph(bundle / "unet.ort.onnx")
    tensor = graph.tensors["block.conv2.weight"]
    broken = type(tensor)(**{**vars(tensor), "length": tensor.length - 1})
    with pytest.raises(
        BundleError, match=r"block.conv2.weight: must be 144 values of int8 in unet.ort.onnx, got 143 bytes"
    ):
        broken.read()
