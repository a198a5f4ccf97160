"""The reader sees what onnx sees, and what is added to a graph runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personalq.errors import BundleError, PersonalQError
from runtime.engines.onnxfile import Edited, read_graph
from runtime.engines.sessions import open_session

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


def test_what_is_not_changed_stays_byte_for_byte(bundle: Path) -> None:
    file = bundle / "unet.ort.onnx"
    assert onnx.load_from_string(Edited(read_graph(file)).serialized()) == onnx.load(file, load_external_data=False)


def test_a_value_can_be_tapped_and_given_another_producer(bundle: Path) -> None:
    """The UNet's `noise_pred` doubled: its node is cut off, and a new one makes the value of that name."""
    graph = read_graph(bundle / "unet.ort.onnx")
    edited, last = Edited(graph), graph.producers["noise_pred"]
    edited.cut_off("noise_pred")
    edited.add_node("Add", last.inputs, "once")
    edited.add_constant("two", np.array(2, np.float32))
    edited.add_node("Mul", ["once", "two"], "noise_pred")
    edited.add_node("Transpose", ["once"], "turned", perm=[0, 1, 3, 2])
    for name in ("once", "turned"):
        edited.add_output(name)
    session = open_session(graph.path, 1, model=edited.serialized())
    feed = {value.name: _zeros(value) for value in session.get_inputs()}
    doubled, once, turned = session.run(["noise_pred", "once", "turned"], feed)
    np.testing.assert_array_equal(doubled, 2 * once)
    np.testing.assert_array_equal(turned, once.swapaxes(2, 3))
    assert [value.name for value in session.get_outputs()] == ["noise_pred", "once", "turned"]


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


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_spoiled_file_is_a_graph_or_one_line(data: st.DataObject, made_bundles: Any, tmp_path_factory: Any) -> None:
    content = bytearray((made_bundles["split"] / "text_rows.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "spoiled.onnx"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        graph = read_graph(file)
        for tensor in graph.tensors.values():
            tensor.read()
    except PersonalQError as error:
        assert len(str(error).splitlines()) == 1


def test_a_tensor_whose_bytes_are_missing_is_one_line(bundle: Path, tmp_path: Path) -> None:
    graph = read_graph(bundle / "unet.ort.onnx")
    tensor = graph.tensors["block.conv2.weight"]
    broken = replace(tensor, raw=tensor.read_bytes()[:-1])
    with pytest.raises(
        BundleError, match=r"block.conv2.weight: must be 144 values of int8 in unet.ort.onnx, got 143 bytes"
    ):
        broken.read()


def test_a_dtype_that_no_bundle_has_is_one_line(bundle: Path) -> None:
    tensor = read_graph(bundle / "unet.ort.onnx").tensors["block.conv2.weight"]
    with pytest.raises(BundleError, match=r"^block.conv2.weight: must be float32, .* or int4, got type 16; export"):
        replace(tensor, dtype=16).read()
