"""Export: the bundle obeys the spec, its integers are the spec's, it is written whole or not at all, and it is reused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporters.export import export_checkpoint
from personalq.bundle import check_files, read_manifest
from personalq.errors import SpecError
from personalq.numerics import INT8, quantize
from personalq.repository import Repository
from personalq.spec import read_spec
from personalq.weights.checkpoint import open_weights
from runtime.gate import verify_bundle

ROOT = Path(__file__).parents[2]


def spec_path(repository, name: str) -> Path:
    return repository.root / "specs" / "rex" / f"{name}.json"


def test_fp32_bundle_equals_diffusers(exported):
    report = verify_bundle(exported[1]["fp32"].bundle)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_taq_bundle_passes_its_checks_on_integer_kernels(exported):
    report = verify_bundle(exported[1]["taq"].bundle)
    values = {check.name: check.value for check in report.checks}
    assert report.passed, [check for check in report.checks if not check.passed]
    assert values["conv layers on integer kernels"] > 0
    assert values["linear layers on integer kernels"] > 0


def test_integers_on_disk_are_the_specs_arithmetic(exported):
    repository, results = exported
    bundle, spec = results["taq"].bundle, read_spec(spec_path(repository, "taq-w8a8"))
    weights = open_weights(
        repository.base_dir(repository.card("rex")), repository.checkpoint_dir("rex"), "lora"
    ).component("unet")
    graph = onnx.load(bundle / "unet.ort.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    compared = 0
    for name, layer in spec.spec.layers.items():
        if layer.weight == "float":
            continue
        integers = numpy_helper.to_array(stored[f"{name}.weight"])
        expected = quantize(weights.read(f"{name}.weight"), spec.tensors[f"{name}.weight_scale"], INT8, 0)
        assert integers.dtype == np.int8
        np.testing.assert_array_equal(integers, expected if layer.op == "conv" else expected.T, err_msg=name)
        compared += 1
    assert compared == sum(n for kind, n in read_manifest(bundle).census.items() if "int8/int8" in kind)


def test_kept_rows_enter_as_float16_and_rest_rows_as_int8(exported):
    graph = onnx.load(exported[1]["taq"].bundle / "unet.ort.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert types["kept"] == onnx.TensorProto.FLOAT16
    assert types["rest"] == onnx.TensorProto.INT8
    assert types["row_index"] == onnx.TensorProto.INT64


def test_self_attention_is_one_node_a_layer_in_a_quantised_unet_and_as_traced_in_the_reference(exported):
    kinds = {}
    for name, result in exported[1].items():
        graph = onnx.load(result.bundle / "unet.ort.onnx", load_external_data=False).graph
        kinds[name] = Counter(node.op_type for node in graph.node)
    layers = len(read_manifest(exported[1]["taq"].bundle).rows.layers)
    assert kinds["taq"]["MultiHeadAttention"] == layers and kinds["taq"]["Softmax"] == layers
    assert kinds["fp32"]["Softmax"] == 2 * layers and kinds["fp32"]["MultiHeadAttention"] == 0


def test_exporting_again_reuses_the_bundle(exported):
    repository, results = exported
    again = export_checkpoint(repository, "rex", spec_path(repository, "taq-w8a8"))
    assert again.reused
    assert again.key == results["taq"].key


def test_whatever_a_bundle_says_is_in_its_key(exported, tmp_path):
    """Scheduler, recommended steps, tokenizer and the card's words: none of them is in a weight file."""
    root = shutil.copytree(exported[0].root, tmp_path / "repository")
    base, card = root / "bases" / "tiny", root / "checkpoints" / "rex" / "card.json"

    def export():
        return export_checkpoint(Repository.open(root), "rex", root / "specs" / "rex" / "fp32.json")

    def edit(file, **fields):
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    keys = [export().key]
    assert export().reused and keys == [exported[1]["fp32"].key]
    edit(base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    keys.append(export().key)
    assert read_manifest(root / "bundles" / keys[-1]).scheduler["prediction_type"] == "v_prediction"
    edit(base / "personalq.json", steps=7)
    keys.append(export().key)
    assert read_manifest(root / "bundles" / keys[-1]).steps == 7
    edit(base / "vae" / "config.json", scaling_factor=0.5)
    keys.append(export().key)
    assert read_manifest(root / "bundles" / keys[-1]).latent.scaling_factor == 0.5
    edit(card, class_noun="wolf")
    keys.append(export().key)
    assert read_manifest(root / "bundles" / keys[-1]).checkpoint.class_noun == "wolf"
    (base / "README.md").write_text("nothing a picture depends on")
    assert export().reused and len(set(keys)) == len(keys)


def test_two_exports_of_one_spec_are_byte_identical(exported, tmp_path):
    repository, results = exported
    before = {p.name: p.read_bytes() for p in results["taq"].bundle.iterdir() if p.is_file()}
    results["taq"].bundle.rename(tmp_path / "old")
    again = export_checkpoint(repository, "rex", spec_path(repository, "taq-w8a8"))
    assert not again.reused
    assert {p.name: p.read_bytes() for p in again.bundle.iterdir()} == before


def test_a_flipped_byte_is_found_and_mended_by_a_new_export(exported):
    repository, results = exported
    file = results["taq"].bundle / "weights.data"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(bytes(data))
    assert check_files(results["taq"].bundle, read_manifest(results["taq"].bundle))
    report = verify_bundle(results["taq"].bundle)
    assert not report.passed
    assert "weights.data" in report.checks[0].reason
    assert not export_checkpoint(repository, "rex", spec_path(repository, "taq-w8a8")).reused


def test_sizes_are_counted_from_files(exported):
    fp32, taq = exported[1]["fp32"], exported[1]["taq"]
    files = ("unet.ort.onnx", "weights.data", "text_rows.onnx", "text_rows.data")
    assert taq.bytes == sum((taq.bundle / name).stat().st_size for name in files)
    assert abs(fp32.bytes / fp32.bytes_fp32 - 1) < 0.05


def test_a_spec_for_another_checkpoint_is_refused(exported, tmp_path):
    repository, _ = exported
    content = json.loads(spec_path(repository, "fp32").read_text())
    content["checkpoint"] = "someone-else"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(SpecError, match=r"checkpoint: must be rex, got 'someone-else'; run 'personalq calibrate rex'"):
        export_checkpoint(repository, "rex", tmp_path / "other.json")


def test_a_killed_export_leaves_no_bundle(exported, tmp_path):
    repository, results = exported
    results["fp32"].bundle.rename(tmp_path / "away")
    code = (
        "import sys; from pathlib import Path; from personalq.repository import Repository;"
        "from exporters.export import export_checkpoint;"
        "repository = Repository.open(Path(sys.argv[1]));"
        "export_checkpoint(repository, 'rex', Path(sys.argv[2]), lambda text, done: print(text, flush=True))"
    )
    arguments = [sys.executable, "-c", code, str(repository.root), str(spec_path(repository, "fp32"))]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("writing UNet"):
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert not results["fp32"].bundle.exists() or not check_files(
        results["fp32"].bundle, read_manifest(results["fp32"].bundle)
    )
    export_checkpoint(repository, "rex", spec_path(repository, "fp32"))
    assert verify_bundle(results["fp32"].bundle).passed
    assert not [
        problem
        for problem in repository.check(fix=True)
        if "orphan" not in str(problem).lower() and "left" not in str(problem).lower()
    ]
