"""Every fault of the library is caught on a real, small export, and the same export without a fault passes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench._faults import FAULTS, NEEDS_INT4, Case, export_with, inject, quantised_layer, with_int4
from personalq.spec import read_spec
from runtime.gate.gate import Options, run_gate
from tests.bench.conftest import Tiny

OPTIONS = Options(threads=1, level="numerics", blame=False)


@pytest.fixture(scope="module")
def four_bits(tiny: Tiny) -> Path:
    """rex with two Linear layers at 4 bits."""
    spec_file = read_spec(tiny.bundle / "spec.json")
    linear = [name for name, layer in spec_file.spec.layers.items() if layer.op == "linear"]
    made = with_int4(tiny.repository, "rex", spec_file, linear[3:5])
    made.spec = made.spec.model_copy(update={"name": "gate-int4"})
    return export_with(tiny.repository, "rex", made)


def test_bundles_without_a_fault_pass(tiny: Tiny, four_bits: Path) -> None:
    for bundle in (tiny.bundle, four_bits):
        report = run_gate(bundle, OPTIONS, tiny.sources)
        assert report.passed, report.headline


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught(fault: str, tiny: Tiny, four_bits: Path, tmp_path: Path) -> None:
    source = four_bits if fault in NEEDS_INT4 else tiny.bundle
    folder = Path(shutil.copytree(source, tmp_path / "bundle"))
    inject(fault, Case(tiny.repository, "rex", folder, tiny.other))
    report = run_gate(folder, OPTIONS, tiny.sources)
    assert not report.passed
    assert "files intact" not in {check.name for check in report.failed}


# What names the layer, and what the first line must say; the other faults have no single layer.
NAMED = {
    "scale x1.1": "weight_scale: must be the spec's bit for bit, got 1.1 times it",
    "zero point off by one": "weight_scale: zero point must be 0, got 1",
    "two channels swapped": "must be the spec's arithmetic",
    "bias dropped": ".bias: must be the spec's arithmetic",
    "wrong row kept": "rows.kept.trigger: must be ids of sks",
}


@pytest.mark.parametrize("fault", NAMED)
def test_the_first_line_says_what_is_wrong(fault: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    inject(fault, Case(tiny.repository, "rex", folder, tiny.other))
    report = run_gate(folder, Options(threads=1, level="obedience"), tiny.sources)
    assert NAMED[fault] in report.headline


def test_a_baseline_names_the_layer_where_the_checkpoint_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    """By its own limits the bundle passes: the fault is seen only beside the weights, or beside a baseline."""
    file, folder = tmp_path / "b.json", Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    options = Options(threads=1, level="numerics", baseline=file)
    assert run_gate(folder, replace(options, update=True)).passed
    case = Case(tiny.repository, "rex", folder, tiny.other)
    layer = quantised_layer(case, "conv")[1].name
    inject("bias dropped", case)
    assert run_gate(folder, OPTIONS).passed
    assert run_gate(folder, options).headline.startswith(f"FAILED rex/taq-w8a8: layer that moved first: {layer}; ")


def test_the_bench_counts_faults_and_false_alarms_and_names_the_worse_layer(tiny: Tiny, tmp_path: Path) -> None:
    from bench.gate import Bench, clean_runs, faults, table

    bench = Bench(tiny.repository, {"rex": tiny.bundle, "max": tiny.other}, "numerics", clean=1)
    rows = list(faults(bench, ["corrupted golden", "bias dropped"]))  # by turns: rex has goldens, max has none
    assert [row["caught"] for row in rows] == [True, True]
    assert rows[0]["levels"] == ["numerics"] and rows[1]["levels"][0] == "obedience"
    assert len(list(table(rows))) == 3
    only = Bench(tiny.repository, {"rex": tiny.bundle}, "numerics", clean=1)
    runs = list(clean_runs(only, tmp_path / "b.json"))
    assert [(run["run"], run["passed"]) for run in runs] == [("one thread", True)], runs


def test_the_bench_names_the_layer_of_a_worse_spec(tiny: Tiny, tmp_path: Path) -> None:
    """The first quantised layer and the last one, whose own output is the noise prediction."""
    from bench.gate import Bench, clean_runs, worse_specs

    only = Bench(tiny.repository, {"rex": tiny.bundle}, "numerics", clean=1, worse=2)
    assert [run["passed"] for run in clean_runs(only, tmp_path / "b.json")] == [True]
    for row in worse_specs(only, tmp_path / "b.json"):
        assert row["first"].startswith("FAILED rex/taq-w8a8: ") and row["layer"] in row["first"], row["first"]
