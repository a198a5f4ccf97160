"""The trt lowering: the same integers as ort, strongly typed float16 around them, and what the spec says, layer by layer."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file

from exporters.external_data import write_graph
from exporters.graphs.census import count, layer_kinds, require_equal, spec_kinds
from exporters.graphs.family import open_family
from exporters.graphs.lower_ort import lower_unet
from exporters.graphs.lower_trt import lower_unet_trt
from exporters.lint import lint_trt
from exporters.share import write_sharing_graph
from exporters.targets.settings import BuildSettings
from exporters.targets.tensorrt import GRAPH, graph_shapes
from personalq.errors import SpecError
from personalq.numerics import INT4, INT8, absmax_scale, dequantize, quantize
from personalq.spec import SpecFile, read_spec
from personalq.weights.checkpoint import open_weights
from tests.exporters.rtx import require_compiles

W8A8, W4A8, FP16 = "taq-w8a8", "taq-w4a8", "fp16"


@pytest.fixture(scope="module")
def lowerings(exported, tmp_path_factory):
    """name -> (spec, folder with unet.ort.onnx, unet.trt.onnx, weights.data), for 8 bit, 4 bit and float16."""
    repository, _ = exported
    taq, weights = read_spec(spec_path(repository, W8A8)), unet_weights(repository)
    specs = {W8A8: taq, W4A8: four_bits(taq, weights)}
    float_spec = read_spec(spec_path(repository, "fp32")).spec
    specs[FP16] = SpecFile(float_spec.model_copy(update={"storage": "float16", "name": FP16}), {})
    made = {}
    for name, spec_file in specs.items():
        folder = tmp_path_factory.mktemp(name)
        write_both(spec_file, family(repository), weights, folder)
        made[name] = (spec_file, folder)
    return made


def write_both(spec_file: SpecFile, of, weights, folder: Path) -> None:
    """unet.ort.onnx, weights.data, unet.trt.onnx."""
    first, second = lower_unet(of.graph("unet"), spec_file), lower_unet_trt(of.graph("unet"), spec_file)
    write_graph(first.model, first.tensors, weights.read, folder / "unet.ort.onnx", "weights.data")
    write_sharing_graph(second.model, second.tensors, weights.read, folder / "unet.trt.onnx", first.model)


def spec_path(repository, name: str) -> Path:
    return repository.root / "specs" / "rex" / f"{name}.json"


def family(repository):
    return open_family(repository.root / "families", repository.base_dir(repository.card("rex")))


def unet_weights(repository):
    base = repository.base_dir(repository.card("rex"))
    return open_weights(base, repository.checkpoint_dir("rex"), "lora").component("unet")


def four_bits(spec_file: SpecFile, weights) -> SpecFile:
    """The same spec with 4-bit weights under the same 8-bit activations."""
    layers, tensors = dict(spec_file.spec.layers), dict(spec_file.tensors)
    for name, layer in layers.items():
        if layer.weight == "int8":
            layers[name] = layer.model_copy(update={"weight": "int4"})
            tensors[f"{name}.weight_scale"] = absmax_scale(np.asarray(weights.read(f"{name}.weight")), INT4, 0)
    return SpecFile(spec_file.spec.model_copy(update={"layers": layers, "name": W4A8, "bits": "w4a8"}), tensors)


def initializers(folder: Path, lowering: str) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / f"unet.{lowering}.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def session(file: Path) -> ort.InferenceSession:
    """The graph on ONNX Runtime's CPU provider, which widens float16 to float32: types and arithmetic, no speed."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI: kernels that do not saturate
    return ort.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )


def feed(bundle: Path, graph: ort.InferenceSession) -> dict[str, np.ndarray]:
    """The golden's first sample with its prompt, as the graph takes them."""
    golden = load_file(bundle / "golden.safetensors")
    rows = session(bundle / "text_rows.onnx")
    wanted = {value.name for value in graph.get_inputs()}
    given = {"text_embeds": golden["text_embeds"][golden["prompt"][:1]]}
    if "row_index" in wanted:  # the first eight rows are kept
        given["kept_index"] = np.arange(8, dtype=np.int64)[None]
    outputs = [value.name for value in rows.get_outputs()]
    made = dict(zip(outputs, rows.run(outputs, given), strict=True))
    made["row_index"] = np.concatenate([np.arange(77, 85), np.arange(8, 77)])[None]
    made |= {"sample": golden["sample"][:1], "timestep": golden["timestep"][:1]}
    return {name: value for name, value in made.items() if name in wanted}


@pytest.mark.parametrize("name", [W8A8, W4A8])
def test_integers_are_bit_equal_in_both_lowerings(lowerings, name):
    spec, folder = lowerings[name]
    first, second = initializers(folder, "ort"), initializers(folder, "trt")
    layers = [layer for layer, one in spec.spec.layers.items() if one.weight != "float"]
    assert layers
    for layer in layers:
        a, b = first[f"{layer}.weight"], second[f"{layer}.weight"]
        assert a.dtype == b.dtype and a.dtype.name in ("int8", "int4")
        np.testing.assert_array_equal(a.astype(np.int8), b.astype(np.int8), err_msg=layer)


def test_both_graphs_read_the_same_bytes_of_one_file(lowerings):
    _, folder = lowerings[W8A8]
    places = {}
    for lowering in ("ort", "trt"):
        graph = onnx.load(folder / f"unet.{lowering}.onnx", load_external_data=False).graph
        places[lowering] = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
        }
    shared = places["trt"]
    assert shared and shared.items() <= places["ort"].items()
    layers = lowerings[W8A8][0].spec.layers
    assert {f"{name}.weight" for name in layers} == set(shared)
    assert (folder / "unet.trt.onnx").stat().st_size < 0.5 * (folder / "weights.data").stat().st_size


@pytest.mark.parametrize("name", [W8A8, W4A8, FP16])
def test_the_graph_is_valid_and_keeps_the_specs_census(lowerings, name):
    spec, folder = lowerings[name]
    onnx.checker.check_model(str(folder / "unet.trt.onnx"), full_check=True)
    model = ir.load(folder / "unet.trt.onnx")
    assert model.graph.opset_imports[""] == 21
    kinds = layer_kinds(model)
    assert kinds == spec_kinds(spec.spec.layers)
    require_equal(model, spec.spec.layers, "trt")
    assert sum(count(kinds.values()).values()) == len(spec.spec.layers)


def test_the_lint_finds_nothing_in_trt_graphs_and_what_it_should_in_ort_graphs(lowerings):
    found = {name: lint_trt(folder / "unet.trt.onnx") for name, (_, folder) in lowerings.items()}
    assert found == {name: [] for name in lowerings}
    rules = {one.rule for one in lint_trt(lowerings[W8A8][1] / "unet.ort.onnx")}
    assert {"zero-point", "output-quantised", "attention-float32"} <= rules


def test_a_layer_that_lost_its_integers_is_named(lowerings):
    spec, folder = lowerings[W8A8]
    model = ir.load(folder / "unet.trt.onnx")
    name, node = next((n.name, n) for n in model.graph if n.op_type == "MatMul" and n.name in spec.spec.layers)
    node.replace_input_with(0, node.inputs[0].producer().inputs[0].producer().inputs[0])
    with pytest.raises(SpecError, match=rf"trt lowering: {name}: must be linear int8/int8 as the spec says, got"):
        require_equal(model, spec.spec.layers, "trt")


def test_every_node_of_a_layer_bears_its_name(lowerings):
    spec, folder = lowerings[W8A8]
    names = {node.name for node in onnx.load(folder / "unet.trt.onnx", load_external_data=False).graph.node}
    assert set(spec.spec.layers) <= names


def test_the_graph_is_strongly_typed_float16_except_the_time_embedding(lowerings):
    _, folder = lowerings[W8A8]
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / "unet.trt.onnx"), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    wide = [node for node in model.graph.node if types.get(node.output[0]) == TensorProto.FLOAT]
    assert {node.op_type for node in wide} <= {"Expand", "Unsqueeze", "Mul", "Sin", "Cos", "Concat", "Slice"}
    assert len([node for node in wide if node.op_type in ("Sin", "Cos")]) == 2
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    assert {types[node.output[0]] for node in products} == {TensorProto.FLOAT16}


def test_inputs_and_outputs_are_those_of_ort_but_for_77_text_rows(lowerings):
    for _, folder in lowerings.values():
        graphs = [onnx.load(folder / f"unet.{name}.onnx", load_external_data=False).graph for name in ("ort", "trt")]
        first, second = ([*graph.input, *graph.output] for graph in graphs)
        sides = [side for value in first for side in value.type.tensor_type.shape.dim if side.dim_param == "tokens"]
        assert sides
        for side in sides:
            side.dim_value = 77
        assert [v.SerializeToString() for v in first] == [v.SerializeToString() for v in second]


@pytest.mark.parametrize(("name", "db"), [(FP16, 45), (W8A8, 18), (W4A8, 8)])
def test_the_graph_computes_what_diffusers_computed(exported, lowerings, name, db):
    """Floors by bits: float16 rounding alone; 8-bit weights and activations; 4-bit weights of a random UNet."""
    _, folder = lowerings[name]
    bundle = exported[1]["fp32" if name == FP16 else "taq"].bundle
    graph = session(folder / "unet.trt.onnx")
    golden = load_file(bundle / "golden.safetensors")["noise_pred"][:1]
    found = graph.run(None, feed(bundle, graph))[0]
    assert found.dtype == np.float32
    assert decibels(golden, found) > db


def test_products_of_integers_fit_float16_whatever_the_input(lowerings):
    """|sum q_x q_w| * s_x * unit < 65504 for the worst input there is: the reason why the channel scale comes after."""
    spec, folder = lowerings[W8A8]
    graph, stored, worst = onnx.load(folder / "unet.trt.onnx").graph, initializers(folder, "trt"), 0.0
    made_by = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        layer = spec.spec.layers.get(node.name)
        if layer is not None and layer.activation == "int8":
            integers, unit, _ = (stored[name] for name in made_by[node.input[1]].input)
            q = np.abs(integers.astype(np.int64))
            largest = q.reshape(q.shape[0], -1).sum(1).max() if layer.op == "conv" else q.sum(0).max()
            worst = max(worst, 128 * float(largest) * float(spec.tensors[f"{node.name}.input_scale"]) * float(unit))
    assert 0 < worst < 65504


def lowered(exported, change) -> tuple:
    """The W8A8 spec with `change(layers, tensors, weights)` applied, lowered: (Lowered, weights)."""
    repository, _ = exported
    spec_file, weights = read_spec(spec_path(repository, W8A8)), unet_weights(repository)
    layers, tensors = dict(spec_file.spec.layers), dict(spec_file.tensors)
    change(layers, tensors, weights)
    changed = SpecFile(spec_file.spec.model_copy(update={"layers": layers}), tensors)
    return lower_unet_trt(family(repository).graph("unet"), changed), weights


LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize("group", [None, 64], ids=["one scale per channel", "blocks of 64"])
def test_four_bit_weights_alone_are_scaled_in_blocks_shorter_than_k(exported, tmp_path, group):
    def change(layers, tensors, weights):
        update = {"weight": "int4", "activation": "float", "group": group, "rounding": "stored"}
        layers[LINEAR] = layers[LINEAR].model_copy(update=update)
        weight = np.asarray(weights.read(f"{LINEAR}.weight"), np.float32)
        blocks = weight.reshape(len(weight), -1, group or weight.shape[1])
        scales = np.stack([absmax_scale(blocks[:, i], INT4, 0) for i in range(blocks.shape[1])], 1)
        integers = [quantize(blocks[:, i], scales[:, i], INT4, 0) for i in range(blocks.shape[1])]
        tensors[f"{LINEAR}.weight_q"] = np.concatenate(integers, 1)
        tensors[f"{LINEAR}.weight_scale"] = scales[:, 0].copy() if group is None else scales

    made, weights = lowered(exported, change)
    write_graph(made.model, made.tensors, weights.read, tmp_path / "unet.onnx", "w.data")
    onnx.checker.check_model(str(tmp_path / "unet.onnx"), full_check=True)
    nodes = onnx.load(tmp_path / "unet.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in nodes.initializer}
    product = next(node for node in nodes.node if node.name == LINEAR)
    expand = next(node for node in nodes.node if node.output[0] == product.input[1])
    block = next(a.i for a in expand.attribute if a.name == "block_size")
    integers, scales = stored[expand.input[0]], stored[expand.input[1]]
    assert integers.dtype.name == "int4" and scales.dtype == np.float16
    assert block < integers.shape[0] and scales.shape == (integers.shape[0] // block, integers.shape[1])
    found = integers.astype(np.int8).astype(np.float32) * np.repeat(scales.astype(np.float32), block, 0)
    error = np.abs(found.T - np.asarray(weights.read(f"{LINEAR}.weight"), np.float32))
    assert (error <= np.repeat(scales.astype(np.float32), block, 0).T * 0.51).all()


def test_what_a_spec_adds_around_the_integers_is_in_both_lowerings(exported, lowerings, tmp_path):
    """A balanced input, a low-rank branch, a tuned bias, a corrected prediction: both graphs compute the same."""
    repository, results = exported
    spec_file, weights = lowerings[W8A8][0], unet_weights(repository)
    random, layers, tensors = np.random.default_rng(0), dict(spec_file.spec.layers), dict(spec_file.tensors)
    weight = np.asarray(weights.read(f"{LINEAR}.weight"), np.float32)
    vector = random.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
    tensors[f"{LINEAR}.input_balance"] = vector
    tensors[f"{LINEAR}.weight_scale"] = scale = absmax_scale(weight * vector, INT8, 0)
    tensors[f"{LINEAR}.weight_q"] = quantize(weight * vector, scale, INT8, 0)
    tensors[f"{LINEAR}.low_rank_down"] = random.standard_normal((weight.shape[1], 4)).astype(np.float16)
    tensors[f"{LINEAR}.low_rank_up"] = random.standard_normal((4, weight.shape[0])).astype(np.float16)
    tensors["conv_in.bias.tuned"] = np.full(len(weights.read("conv_in.bias")), 0.25, np.float32)
    tensors["correction.gain"] = np.full(10, 0.5, np.float32)
    tensors["correction.mean"] = np.full((10, 4), 0.125, np.float32)
    layers[LINEAR] = layers[LINEAR].model_copy(update={"balanced": True, "low_rank": 4, "rounding": "stored"})
    update = {"layers": layers, "tuned": ("conv_in.bias",), "corrected": True}
    changed = SpecFile(spec_file.spec.model_copy(update=update), tensors)
    write_both(changed, family(repository), weights, tmp_path)
    assert lint_trt(tmp_path / "unet.trt.onnx") == []
    assert initializers(tmp_path, "trt")["conv_in.bias"].tolist() == [0.25] * len(tensors["conv_in.bias.tuned"])
    graphs = [session(tmp_path / f"unet.{name}.onnx") for name in ("ort", "trt")]
    first, second = (graph.run(None, feed(results["taq"].bundle, graph))[0] for graph in graphs)
    plain = session(lowerings[W8A8][1] / "unet.trt.onnx")
    before = plain.run(None, feed(results["taq"].bundle, plain))[0]
    assert decibels(first, second) > 15 > 5 > decibels(first, before)


def decibels(reference: np.ndarray, found: np.ndarray) -> float:
    return 10 * float(np.log10((reference**2).sum() / ((reference - found) ** 2).sum()))


def test_a_scale_that_float16_cannot_hold_is_refused_with_the_layers_name(exported):
    def change(layers, tensors, weights):
        tensors[f"{LINEAR}.input_scale"] = np.array(1e-9, np.float32)

    with pytest.raises(SpecError, match=rf"{LINEAR}.input_scale: scale must be > 0 and < 65504 in float16, got 9.99"):
        lowered(exported, change)


def test_a_spec_of_another_architecture_is_refused(exported):
    def change(layers, tensors, weights):
        del layers[LINEAR]

    with pytest.raises(SpecError, match=f"layers must be those of the family, got a difference at {LINEAR}"):
        lowered(exported, change)


def test_dequantised_weights_are_those_of_the_spec_to_float16(lowerings):
    spec, folder = lowerings[W8A8]
    graph = onnx.load(folder / "unet.trt.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    read_by = {value: node for node in graph.node for value in node.input}
    for node in graph.node:
        if node.op_type != "MatMul" or node.name not in spec.spec.layers:
            continue
        weight, unit, _ = (stored[name] for name in made_by[node.input[1]].input)
        times = read_by[node.output[0]]
        factor = next(stored[name] for name in times.input if name in stored)
        assert times.op_type == "Mul" and float(factor.max()) <= 1.0
        found = weight.astype(np.float32) * float(unit) * factor.astype(np.float32)
        expected = dequantize(weight.T, spec.tensors[f"{node.name}.weight_scale"], 0).T
        np.testing.assert_allclose(found, expected, rtol=2**-10)


@pytest.mark.trt
@pytest.mark.parametrize("name", [W4A8, FP16])  # W8A8 of every family: test_families.py
def test_every_layer_compiles_to_what_the_spec_says(exported, lowerings, name):
    spec_file, folder = lowerings[name]
    bundle = exported[1]["fp32" if name == FP16 else "taq"].bundle
    require_compiles(folder / GRAPH, graph_shapes(bundle, BuildSettings()), spec_file)
