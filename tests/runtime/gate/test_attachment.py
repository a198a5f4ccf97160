"""Attached checkpoints: an honest one passes, each fault fails its own check and names the layer; verify finds both bundles."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench._attached_faults import (
    ATTACHED_FAULTS,
    IN_ENGINE,
    NEEDS,
    AttachedCase,
    fits,
    inject_attached,
    rewrite,
)
from bench._attached_gate import AttachedBench, attached_clean_runs, attached_faults
from bench._faults import reseal
from cli import cli
from personalq.adapters import ADAPTER
from personalq.bundle import read_manifest
from personalq.spec import REFERENCE
from personalq.weights.adapter import read_adapter
from personalq.weights.checkpoint import open_weights
from runtime.drawing.attaching import open_adapter
from runtime.engines.onnxfile import Edited, read_graph
from runtime.gate.baseline import read_baselines
from runtime.gate.check import Report
from runtime.gate.gate import Options, run_gate
from runtime.gate.levels.kernels import kernels_that_run
from runtime.gate.request import sources_of
from runtime.gate.subject import Sources, Subject
from runtime.gate.taps import find_taps, golden_sizes, look
from tests.fleet.many import fresh_copy
from tests.runtime.gate.attached import KINDS, OPTIONS, Attached, copied

# float32 graphs beside torch's, both with the change in float16 and float32: dB at any layer or block of the tiny UNet.
FLOAT_LAYER_DB = 50.0


def failures(report: Report) -> dict[str, str]:
    return {check.name: check.reason for check in report.failed}


def case_of(attached: Attached, name: str, folder: Path) -> AttachedCase:
    """Copies that a fault may spoil."""
    golden = attached.sources(name).golden
    assert golden is not None
    other = attached.adapters["rex" if name == "locon" else "locon"]
    engine, adapter = copied(attached.engine, folder / "engine"), copied(attached.adapters[name], folder / "adapter")
    return AttachedCase(
        attached.repository, name, engine, adapter, Path(shutil.copy(golden, folder / REFERENCE)), other
    )


def judged(attached: Attached, case: AttachedCase, *, alone: bool = False, options: Options = OPTIONS) -> Report:
    full = replace(attached.sources(case.checkpoint_id), golden=case.golden)
    return run_gate(case.engine, options, Sources(golden=case.golden) if alone else full, case.adapter)


# --- honest ones


@pytest.mark.parametrize("name", KINDS)
def test_an_honest_attached_checkpoint_passes_every_level(name: str, attached: Attached) -> None:
    report = attached.judged(name, Options(threads=1))
    assert report.passed, failures(report)
    assert report.headline.startswith(f"PASSED {name}/taq-w8a8-attached: ")
    assert (report.form, report.adapter) == ("attached", attached.adapters[name])
    names = {check.name for check in report.checks}
    assert {"adapter's files intact", "adapter is of the engine's base", "goldens are the checkpoint's"} <= names
    assert {"adapter: tensors that are not the delta's", "adapter's trigger is in the goldens' prompts"} <= names
    changes_unet = name in ("rex", "locon")
    assert ("adapter: values that strength 0 leaves changed" in names) == changes_unet
    assert ("adapter: text values that strength 0 leaves changed" in names) == (name == "locon")


@pytest.mark.parametrize("name", KINDS)
def test_it_passes_by_its_files_and_goldens_alone(name: str, attached: Attached) -> None:
    report = run_gate(attached.engine, OPTIONS, Sources(golden=attached.sources(name).golden), attached.adapters[name])
    assert report.passed, failures(report)
    assert report.left_out[0].startswith("stored weights: ")


def test_the_checkpoint_that_changes_convolutions_is_judged_in_the_wide_graph(attached: Attached) -> None:
    subject, narrow = subject_of(attached, "locon"), subject_of(attached, "rex")
    assert (subject.unet_path.name, narrow.unet_path.name) == ("unet.ort_wide.onnx", "unet.ort.onnx")
    kinds = {layer.rpartition(".")[2] for layer in subject.attached.pairs["unet"]}
    assert {"conv1", "time_emb_proj", "proj_in", "to_q"} <= kinds


def subject_of(attached: Attached, name: str, engine: Path | None = None) -> Subject:
    engine = engine or attached.engine
    sources = sources_of(engine, attached.repository, lambda: open_weights, adapter=attached.adapters[name])
    return Subject(engine, read_manifest(engine), sources, 1, open_adapter(attached.adapters[name]))


# --- faults


DELTA, WAY = (
    "adapter: tensors that are not the delta's",
    "adapter: matrices that do not reach their layer as they should",
)
SETTINGS = "adapter's words and settings are the checkpoint's"
# fault -> the check that the first line names, and what it says of it: the layer, where there is one
EXPECTED = {
    "missing layer": (DELTA, "must be in the adapter, got nothing"),
    "alpha applied twice": (DELTA, "must be the checkpoint's change within 0.20%, got one 100.0% off"),
    "two layers swapped": (DELTA, "must be the checkpoint's change within 0.20%, got one 14"),
    "strength ignored": (WAY, "must be multiplied by adapter_strength, got a branch that is not"),
    "text strength ignored": (WAY, "must be multiplied by adapter_strength, got a branch that is not"),
    "other's trigger kept": (SETTINGS, ": trigger must be the checkpoint's ('"),
    "adapter of another base": ("adapter is of the engine's base", ": base_sha256 must be "),
    "pieces of a token swapped": (
        DELTA,
        "text_encoder.embeddings.token_embedding.weight: must be the checkpoint's change",
    ),
    "change of K negated": (
        DELTA,
        ".attn2.to_k.weight: must be the checkpoint's change within 0.20%, got one 200.0% off",
    ),
    "wrong scheduler in adapter": ("adapter's scheduler is the checkpoint's", "beta_schedule: must be 'scaled_linear'"),
    "base: scale x1.1": (
        "layers that differ from the spec",
        "weight_scale: must be the spec's bit for bit, got 1.1 times",
    ),
    "base: two channels swapped": ("unet: tensors that are not the checkpoint's", "must be the spec's arithmetic"),
    "base: bias dropped": ("unet: tensors that are not the checkpoint's", ".bias: must be the spec's arithmetic"),
    "corrupted golden": ("unet cosine, t 750-999", ""),
    "base: zero point off by one": ("layers that differ from the spec", "weight_scale: zero point must be 0, got 1"),
    "base: trigger index shifted": ("kept rows: prompts in which a slot and its place differ", ""),
    "base: wrong tokenizer": ("tokenizers are the checkpoint's", "tokenizer.json: id of "),
}


# What engine, adapter and goldens alone say: the same, or this.
BRANCHES = "adapter: branches that are not what their layers lack"
ALONE = {
    "alpha applied twice": (BRANCHES, "of its branch 0.50 times"),
    "two layers swapped": (BRANCHES, "of its branch "),
}
# Seen beside the weights only, or beside a baseline: see docs/gate.md.
NOT_ALONE = ("base: bias dropped", "base: two channels swapped")


@pytest.mark.parametrize("fault", ATTACHED_FAULTS)
def test_each_fault_is_caught_and_the_first_line_says_what_is_wrong(
    fault: str, attached: Attached, tmp_path: Path
) -> None:
    """With the repository beside it, and by engine, adapter and goldens alone; checkpoints by turns."""
    fitting = [name for name in KINDS if fits(fault, attached.adapters[name])]
    case = case_of(attached, fitting[list(ATTACHED_FAULTS).index(fault) % len(fitting)], tmp_path)
    inject_attached(fault, case)
    report, alone = judged(attached, case), judged(attached, case, alone=True)
    check, text = EXPECTED[fault]
    assert f": {check}: " in report.headline and text in report.headline, report.headline
    assert not alone.passed or fault in NOT_ALONE
    check, text = ALONE.get(fault, ("", ""))
    assert check in alone.headline and text in alone.headline
    hashes = [one.name for one in (*report.failed, *alone.failed) if "intact" in one.name or "key is" in one.name]
    assert hashes == []


def test_a_fault_names_the_layer_that_it_was_put_into(attached: Attached, tmp_path: Path) -> None:
    case = case_of(attached, "rex", tmp_path)
    before = read_adapter(case.adapter / ADAPTER).branches["unet"]
    inject_attached("missing layer", case)
    (layer,) = set(before) - set(read_adapter(case.adapter / ADAPTER).branches["unet"])
    assert f"unet.{layer}.weight" in judged(attached, case).headline


def test_a_branch_without_a_change_is_foreign(attached: Attached, tmp_path: Path) -> None:
    case = case_of(attached, "rex", tmp_path)
    adapter = read_adapter(case.adapter / ADAPTER)
    layers = adapter.branches["unet"]
    other = next(name for name in layers if name.endswith("attn1.to_q")).replace("attn1.to_q", "ff.net.2")
    place = read_manifest(case.engine).adapters.branches["unet"][other]  # type: ignore[union-attr]
    n, k = place.weight
    some = next(iter(layers.values()))
    made = replace(some, down=np.ones((k, 1), np.float16), up=np.ones((1, n), np.float16))
    rewrite(case.adapter, replace(adapter, branches={"unet": {**layers, other: made}}))
    reason = failures(judged(attached, case))[DELTA]
    assert (
        reason == f"unet.{other}.weight: must be changed by the checkpoint, got a branch without a change; export again"
    )


def test_a_quantiser_on_a_matrixs_way_is_found_and_named(attached: Attached, tmp_path: Path) -> None:
    """Rounded so finely that no number tells."""
    case = case_of(attached, "rex", tmp_path)
    graph = read_graph(case.engine / "unet.ort.onnx")
    down = next(name for name in graph.readers if name.endswith("attn1.to_q.down"))
    product = graph.readers[down][0]
    edited = Edited(graph)
    edited.cut_off(product.outputs[0])
    edited.add_constant("fault_scale", np.array(1e-4, np.float32))
    edited.add_node(product.op, [product.inputs[0], down], "fault_product")
    edited.add_node("Div", ["fault_product", "fault_scale"], "fault_steps")
    edited.add_node("Round", ["fault_steps"], "fault_whole")
    edited.add_node("Mul", ["fault_whole", "fault_scale"], product.outputs[0])
    graph.path.write_bytes(edited.serialized())
    reseal(case.engine)
    report = judged(attached, case)
    assert set(failures(report)) == {WAY}
    layer = down.removesuffix(".down")
    assert f"(Round) stands between {layer}.down and its layer; export again" in report.headline


def test_goldens_of_other_weights_are_refused(attached: Attached, tmp_path: Path) -> None:
    case = case_of(attached, "rex", tmp_path)
    other = attached.sources("locon").golden
    assert other is not None
    shutil.copy(other, case.golden)
    reason = failures(judged(attached, case, options=Options(threads=1, level="integrity")))
    (text,) = reason.values()
    assert list(reason) == ["goldens are the checkpoint's"] and text.startswith("rex: goldens must be ")


def test_a_bases_goldens_are_not_taken_for_the_checkpoints(attached: Attached) -> None:
    report = run_gate(attached.engine, OPTIONS, Sources(), attached.adapters["rex"])
    assert (attached.engine / "golden.safetensors").is_file()
    assert failures(report) == {
        "bundle opens": "reference.safetensors: must be the goldens of rex, got none beside its adapter; verify it by its id, "
        "in its repository"
    }


def test_weights_that_changed_since_the_export_are_told_apart(attached: Attached, tmp_path: Path) -> None:
    """The checkpoint's own, and its base's, which the engine holds."""
    repository = fresh_copy(attached.repository.root, tmp_path / "repository")
    file = next((repository.root / "checkpoints" / "rex").glob("*.safetensors"))
    file.write_bytes(next((repository.root / "checkpoints" / "locon").glob("*.safetensors")).read_bytes())
    sources = sources_of(attached.engine, repository, lambda: open_weights, adapter=attached.adapters["rex"])
    options = Options(threads=1, level="integrity")
    found = failures(run_gate(attached.engine, options, sources, attached.adapters["rex"]))
    assert list(found) == ["adapter's checkpoint is as it was exported"]
    file = next((repository.root / "bases" / "tiny" / "vae").glob("*.safetensors"))
    file.write_bytes((repository.root / "bases" / "tiny" / "text_encoder" / "model.safetensors").read_bytes())
    found = failures(run_gate(attached.engine, options, sources, attached.adapters["rex"]))
    assert "checkpoint is as it was exported" in found


# --- inside


@pytest.fixture(scope="module")
def plain(attached: Attached) -> Path:
    """The base's engine in float32."""
    from exporters.export import export_base
    from exporters.request import reference_spec

    path = reference_spec(attached.repository, "tiny", "fp32")
    made = export_base(attached.repository, "tiny", path).bundle
    return made


@pytest.mark.parametrize("name", ["rex", "locon", "hat"])
def test_taps_see_the_layers_outputs_with_their_branches(name: str, attached: Attached, plain: Path) -> None:
    """In float32: every layer, block and attention is torch's, which has the change in its weights (the goldens)."""
    subject = subject_of(attached, name, plain)
    seen = look(subject)
    for kind in ("layers", "blocks"):
        wanted = dict(zip(golden_sizes(subject, kind), np.moveaxis(subject.golden[kind], 1, 0), strict=True))
        for layer, values in getattr(seen, kind).items():
            noise = float(((values - wanted[layer]) ** 2).mean() / (wanted[layer] ** 2).mean())
            assert -10 * np.log10(noise + 1e-20) >= FLOAT_LAYER_DB, (kind, layer)
    np.testing.assert_allclose(seen.attention, subject.golden["attention"], atol=1e-4)


@pytest.mark.parametrize("name", ["rex", "locon"])
def test_a_branch_is_what_its_layer_lacks_without_it(name: str, attached: Attached, plain: Path) -> None:
    """In float32: torch's output less the layer's own is the branch, to a thousandth of it, for layers of every kind."""
    subject = subject_of(attached, name, plain)
    seen, changed = look(subject), subject.attached.pairs["unet"]
    golden = dict(zip(golden_sizes(subject, "layers"), np.moveaxis(subject.golden["layers"], 1, 0), strict=True))
    assert set(seen.branches) == set(changed)
    for layer, branch in seen.branches.items():
        lacking = golden[layer] - (seen.layers[layer] - branch)
        assert float(np.linalg.norm(lacking - branch)) <= 0.01 * float(np.linalg.norm(branch)), layer


def test_taps_of_a_quantised_base_turn_what_lies_with_channels_last(attached: Attached) -> None:
    """Nearer to torch's outputs than to any other order of the same values: 8 bits leave some 20 dB and more."""
    subject = subject_of(attached, "locon")
    sizes = {kind: golden_sizes(subject, kind) for kind in ("layers", "blocks")}
    taps = find_taps(subject.unet, list(sizes["layers"]), list(sizes["blocks"]), subject.manifest.rows.layers)
    assert taps.channels_last, "the branch of a quantised convolution is added with channels last"
    seen = look(subject)
    wanted = dict(zip(sizes["layers"], np.moveaxis(subject.golden["layers"], 1, 0), strict=True))
    for layer in taps.channels_last:
        noise = float(((seen.layers[layer] - wanted[layer]) ** 2).mean() / (wanted[layer] ** 2).mean())
        assert noise < 0.03, layer


@pytest.mark.parametrize("name", KINDS)
def test_integer_kernels_are_the_bases_with_every_adapter(name: str, attached: Attached) -> None:
    census, ran = read_manifest(attached.engine).census, kernels_that_run(subject_of(attached, name))
    assert ran["QLinearConv"] == census["conv int8/int8"]
    assert ran["MatMulIntegerToFloat"] == census["linear int8/int8"]


# --- asked for


@pytest.fixture
def root(attached: Attached, tmp_path: Path) -> Path:
    """A repository of its own: the engine, and the adapters."""
    return Path(shutil.copytree(attached.repository.root, tmp_path / "repository"))


def ran(root: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    done = CliRunner().invoke(cli, ["--repo", str(root), "verify", *arguments, "--threads", "1", "--json"])
    assert done.stdout.count("\n") == 1, done.output
    return json.loads(done.stdout), done.exit_code


def test_by_id_by_folder_and_by_base(root: Path, attached: Attached) -> None:
    folder = root / "bundles" / attached.adapters["rex"].name
    for asked in ("rex", str(folder)):
        data, code = ran(root, asked, "--level", "numerics")
        assert (code, data["form"]) == (0, "attached"), data["headline"]
        assert Path(data["adapter"]).name == folder.name and Path(data["bundle"]).parent == root / "bundles"
    data, code = ran(root, "tiny", "--level", "numerics")
    assert (code, data["form"]) == (0, "base") and "adapter" not in data, data["headline"]
    assert data["headline"].startswith("PASSED tiny/")


def test_an_adapter_prefers_a_quantised_engine_of_its_base(root: Path, attached: Attached, plain: Path) -> None:
    """As generate does, though the float one was made later."""
    shutil.copytree(plain, root / "bundles" / plain.name, dirs_exist_ok=True)
    data, _ = ran(root, str(root / "bundles" / attached.adapters["rex"].name), "--level", "integrity")
    assert Path(data["bundle"]).name == attached.engine.name


@pytest.mark.parametrize("asked", ["id", "folder"])
def test_an_adapter_without_its_bases_engine_is_one_line(asked: str, root: Path, attached: Attached) -> None:
    for folder in (root / "bundles").iterdir():
        if (folder / "spec.json").is_file():
            shutil.rmtree(folder)
    adapter = root / "bundles" / attached.adapters["rex"].name
    done = CliRunner().invoke(cli, ["--repo", str(root), "verify", "rex" if asked == "id" else str(adapter)])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and not done.stdout
    assert "must have an engine" in done.stderr and "personalq export --base" in done.stderr


def test_without_goldens_it_says_how_they_are_made_and_its_files_can_be_verified(root: Path) -> None:
    (root / "specs" / "rex" / REFERENCE).unlink()
    data, code = ran(root, "rex")
    (check,) = [one for one in data["checks"] if not one["passed"]]
    assert (
        code == 1
        and check["name"] == "reference"
        and check["reason"]
        == (
            "specs/rex/reference.safetensors: must hold what torch computes in FP32 (a reference), got no file; run: personalq "
            "calibrate rex --policy fp16 && personalq verify rex"
        )
    )
    assert check["reason"] in data["headline"]
    assert ran(root, "rex", "--level", "integrity")[1] == 0


def test_a_baseline_has_an_entry_of_the_attached_form(root: Path, tmp_path: Path, attached: Attached) -> None:
    file = str(tmp_path / "b.json")
    data, code = ran(root, "rex", "--level", "numerics", "--update-baseline", "--baseline", file)
    assert code == 0 and data["written"] == [file], data["headline"]
    assert set(read_baselines(Path(file)).bundles) == {"rex/taq-w8a8-attached"}
    assert ran(root, "rex", "--level", "numerics", "--baseline", file)[1] == 0
    data, code = ran(root, "mug", "--level", "numerics", "--baseline", file)
    assert code == 1 and f"{file}: must have mug/taq-w8a8-attached, got nothing" in data["headline"]


def test_a_baseline_names_the_layer_that_lacks_its_branch(attached: Attached, tmp_path: Path) -> None:
    """By the files alone, where no limit need tell."""
    options = Options(threads=1, level="numerics", baseline=tmp_path / "b.json")
    case = case_of(attached, "rex", tmp_path)
    assert judged(attached, case, alone=True, options=replace(options, update=True)).passed
    before = set(read_adapter(case.adapter / ADAPTER).branches["unet"])
    inject_attached("missing layer", case)
    (layer,) = before - set(read_adapter(case.adapter / ADAPTER).branches["unet"])
    report = judged(attached, case, alone=True, options=options)
    assert report.headline.startswith(f"FAILED rex/taq-w8a8-attached: layer that moved first: {layer}; "), (
        report.headline
    )


@pytest.mark.parametrize(
    ("option", "shown"), [("--junit", 'name="form"'), ("--markdown", "Form: "), ("--html", "attached")]
)
def test_reports_name_the_form(option: str, shown: str, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "report"
    assert ran(root, "rex", "--level", "integrity", option, str(file))[1] == 0
    text = file.read_text()
    assert shown in text and "to base bundle " in text


def test_the_bench_counts_faults_and_clean_runs_of_the_attached_form(attached: Attached, tmp_path: Path) -> None:
    bench = AttachedBench(attached.repository, attached.engine, attached.adapters, "for tests", "numerics", clean=1)
    rows = list(attached_faults(bench, ["missing layer", "base: bias dropped"]))
    assert [(row["caught"], row["bundle_alone"]["caught"]) for row in rows] == [(True, True), (True, False)]
    assert {row["form"] for row in rows} == {"attached"} and rows[0]["levels"] == ["obedience", "numerics"]
    only = replace(bench, adapters={"mug": attached.adapters["mug"]})
    runs = list(attached_clean_runs(only, tmp_path / "b.json"))
    assert [(run["run"], run["passed"]) for run in runs] == [("one thread", True)], runs


def test_every_need_and_every_fault_of_an_engine_is_a_fault() -> None:
    assert set(NEEDS) <= set(ATTACHED_FAULTS) and {f"base: {name}" for name in IN_ENGINE} <= set(ATTACHED_FAULTS)
