"""The checks pass on an honest bundle, fail on each kind of dishonest one, and never crash."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from personalq.bundle import Manifest, read_manifest
from personalq.rows import KeptTokens
from personalq.spec import SpecFile, read_spec
from runtime.gate.check import Check, Report
from runtime.gate.gate import verify_bundle
from runtime.gate.levels.limits import LIMITS, precision


def failures(report: Report) -> dict[str, str]:
    return {check.name: check.reason for check in report.checks if not check.passed}


def change_golden(folder: Path, **tensors: Any) -> None:
    file = folder / "golden.safetensors"
    with safe_open(str(file), framework="numpy") as opened:
        old, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    new = {name: change(old[name]) for name, change in tensors.items()}
    kept = {name: np.ascontiguousarray(value) for name, value in {**old, **new}.items() if value is not None}
    save_file(kept, file, metadata)


def test_an_honest_bundle_passes_every_check(bundle: Path) -> None:
    report = verify_bundle(bundle, threads=1)
    assert report.passed, failures(report)
    values = {check.name: check.value for check in report.checks}
    assert values["conv layers on integer kernels"] == values["linear layers on integer kernels"] == 1
    assert values["kept rows: prompts whose prediction they change"] == 3
    assert {f"unet cosine, t {name}" for name in ("750-999", "500-749", "250-499", "0-249")} <= set(values)


def test_the_reference_bundle_passes_the_strict_limits(reference: Path) -> None:
    report = verify_bundle(reference, threads=1)
    assert report.passed, failures(report)
    limits = {check.name: check.limit for check in report.checks}
    assert limits["image PSNR dB, mean"] == 45 and limits["unet cosine, t 0-249"] == 0.9999


def test_what_could_not_be_compared_is_said(bundle: Path) -> None:
    left_out = verify_bundle(bundle, threads=1).to_json()["left_out"]
    assert left_out[0] == "stored weights: the checkpoint is not in the repository"


def test_the_json_has_the_keys_of_the_command_line(bundle: Path) -> None:
    content = json.loads(json.dumps(verify_bundle(bundle, threads=1).to_json(), allow_nan=False))
    assert content["passed"] is True
    assert all(list(check)[:4] == ["name", "value", "limit", "passed"] for check in content["checks"])
    failed = Report(Path("x"), (Check("c", 0, 0, False, "why"),)).to_json()
    assert failed["checks"][0]["reason"] == "why" and failed["passed"] is False


def test_nothing_checked_is_not_passed() -> None:
    assert not Report(Path("x")).passed


def test_a_flipped_byte_is_a_failed_check_that_names_the_file(copied: Path) -> None:
    content = bytearray((copied / "unet.ort.onnx").read_bytes())
    content[99] ^= 1
    (copied / "unet.ort.onnx").write_bytes(content)
    reason = "unet.ort.onnx: bytes differ from the manifest's sha256; export the checkpoint again"
    assert failures(verify_bundle(copied)) == {"files intact": reason}


def test_a_folder_that_is_no_bundle_is_a_failed_check(tmp_path: Path) -> None:
    reason = f"{tmp_path}: must be a bundle folder with manifest.json, got none; run 'personalq export'"
    assert failures(verify_bundle(tmp_path)) == {"files intact": reason}


def test_missing_goldens_are_a_failed_check(copied: Path, reseal: Any) -> None:
    (copied / "golden.safetensors").unlink()
    reseal(copied)
    reason = "golden.safetensors: must be in the bundle, got no file; export the checkpoint again"
    assert failures(verify_bundle(copied)) == {"bundle opens": reason}


def test_goldens_that_lack_a_tensor_are_a_failed_check(copied: Path, reseal: Any) -> None:
    change_golden(copied, decoded=lambda _: None)
    reseal(copied)
    reason = "golden.safetensors: must hold decoded, got nothing of that name; export again"
    assert failures(verify_bundle(copied)) == {"bundle opens": reason}


def test_goldens_of_another_shape_fail_their_check_and_no_other(copied: Path, reseal: Any) -> None:
    change_golden(copied, decoded=lambda x: x[:, :, :5])
    reseal(copied)
    found = failures(verify_bundle(copied, threads=1))
    assert list(found) == ["vae decoder"] and found["vae decoder"].startswith("ValueError: operands could not be")


def test_a_graph_that_cannot_be_opened_is_a_failed_check(copied: Path, reseal: Any) -> None:
    (copied / "unet.ort.onnx").write_bytes(b"not a graph")
    reseal(copied)
    found = failures(verify_bundle(copied))
    assert list(found) == ["bundle opens"] and "unet.ort.onnx: cannot be opened: " in found["bundle opens"]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("ids", {"token ids that differ"}),
        ("text_embeds", {"text encoder cosine", "text rows cosine", "kept rows: largest error / largest value"}),
        ("rows", {"text rows cosine", "kept rows: largest error / largest value"}),
        ("noise_pred", {"unet cosine, t 0-249", "unet SNR dB, t 750-999"}),
        ("decoded", {"vae PSNR dB"}),
        ("images", {"image PSNR dB, mean", "image PSNR dB, worst"}),
    ],
)
def test_each_golden_is_really_compared(copied: Path, reseal: Any, tensor: str, expected: set[str]) -> None:
    """A golden shifted by one place along its last axes stands for a graph that computes something else."""
    change_golden(copied, **{tensor: lambda x: np.roll(x, 1, axis=(-2, -1) if tensor != "ids" else -1)})
    reseal(copied)
    assert expected <= set(failures(verify_bundle(copied, threads=1)))


def test_a_census_that_promises_more_than_runs_is_caught(copied: Path, reseal: Any) -> None:
    reseal(copied, census={"conv int8/int8": 2, "linear int8/int8": 1})
    found = failures(verify_bundle(copied, threads=1))
    assert set(found) == {"conv layers on integer kernels", "census of the graph is the manifest's"}
    assert found["census of the graph is the manifest's"] == "conv int8/int8: must be 2 as in the manifest, got 1"


def test_a_float_layer_that_should_be_quantised_is_caught(copied: Path, make_bundle: Any, reseal: Any) -> None:
    """The same bundle with the UNet left in floats: accurate, so only its obedience tells."""
    honest = make_bundle("float000", quantised=False)
    (copied / "unet.ort.onnx").write_bytes((honest / "unet.ort.onnx").read_bytes())
    reseal(copied)
    report = verify_bundle(copied, threads=1)
    assert {check.level for check in report.failed} == {"obedience"}
    kernels = {"conv layers on integer kernels", "linear layers on integer kernels", "float conv kernels"}
    assert kernels < set(failures(report))
    first = "FAILED moss-mug/taq: layers that differ from the spec: block.conv2: must be int8/int8 as the spec says"
    assert report.headline.startswith(first)


def test_kept_rows_that_do_not_matter_are_caught(copied: Path, reseal: Any) -> None:
    """A UNet that reads the rest rows only: the kept slots are dead inputs."""
    import onnx

    model = onnx.load(copied / "unet.ort.onnx")
    concat = next(node for node in model.graph.node if node.op_type == "Concat")
    doubled = concat.input[0]
    del concat.input[:]
    concat.input.extend([doubled, doubled])
    onnx.save(model, copied / "unet.ort.onnx")
    reseal(copied)
    assert "kept rows: prompts whose prediction they change" in failures(verify_bundle(copied, threads=1))


def test_a_bundle_that_keeps_nothing_has_no_kept_rows_to_matter(copied: Path, reseal: Any) -> None:
    rows, old = read_manifest(copied).rows, read_spec(copied / "spec.json")
    kept = {"kept": KeptTokens(slots=4)}
    new = old.spec.model_copy(update={"rows": old.spec.rows.model_copy(update=kept)})
    SpecFile(new, old.tensors).write(copied / "spec.json")
    reseal(copied, rows=rows.model_copy(update=kept))
    report = verify_bundle(copied, threads=1)
    assert report.passed, failures(report)
    assert "kept rows: prompts whose prediction they change" not in {check.name for check in report.checks}


@pytest.mark.parametrize(
    ("census", "key"),
    [
        ({"conv int8/int8": 3, "linear int4/int8": 1}, "int4"),
        ({"conv int6/int8": 3, "linear int8/int8": 1}, "int6"),
        ({"conv int8/int8": 3, "conv float/float": 2}, "int8"),
        ({"conv float/float": 3, "linear int4/int8": 0}, "float32"),
    ],
    ids=["w4a8", "w6a8", "w8a8", "reference"],
)
def test_limits_follow_the_narrowest_weights(bundle: Path, census: dict[str, int], key: str) -> None:
    manifest: Manifest = read_manifest(bundle).model_copy(update={"census": census})
    assert precision(manifest) == key


def test_limits_loosen_with_fewer_bits_and_each_has_a_reason() -> None:
    order = [LIMITS[key] for key in ("float32", "float16", "int8", "int7", "int6", "int4")]
    for field in ("cosine", "snr_db", "image_psnr_db", "worst_image_psnr_db"):
        values = [getattr(limits, field) for limits in order]
        assert values == sorted(values, reverse=True)
    assert all(limits.reason for limits in order)


def test_a_kept_row_one_place_too_late_is_caught_where_no_number_would_tell(copied: Path) -> None:
    from bench._faults import Case, inject

    inject("trigger index shifted", Case(None, "moss-mug", copied, copied))  # type: ignore[arg-type]
    found = failures(verify_bundle(copied, threads=1))
    assert "kept rows: prompts in which a slot and its place differ" in found


def test_a_quantiser_before_attention_is_found_in_the_graph(copied: Path, reseal: Any) -> None:
    """Kept rows rounded to int8 on their way, with a scale fine enough that no number would tell."""
    import onnx

    model = onnx.load(copied / "unet.ort.onnx")
    cast = next(node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == "kept")
    value, kinds = cast.output[0], onnx.helper
    cast.output[0] = "as_float"
    scale = onnx.numpy_helper.from_array(np.array(0.05, np.float32), "s")
    model.graph.initializer.extend([scale, onnx.numpy_helper.from_array(np.array(0, np.int8), "z")])
    at = list(model.graph.node).index(cast) + 1
    model.graph.node.insert(at, kinds.make_node("DequantizeLinear", ["q", "s", "z"], [value], name="dq"))
    model.graph.node.insert(at, kinds.make_node("QuantizeLinear", ["as_float", "s", "z"], ["q"], name="the_rounder"))
    onnx.save(model, copied / "unet.ort.onnx")
    reseal(copied)
    found = failures(verify_bundle(copied, threads=1))
    reason = "unet: the_rounder (QuantizeLinear) stands between 'kept' and attention; export again"
    assert found["kept rows: quantisers on their way"] == reason
