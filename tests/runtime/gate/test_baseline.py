"""Baselines: noise passes, a regression and an improvement fail, stale and broken files are one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.errors import BundleError
from runtime.gate.baseline import Measured, default_file, layer_tolerance, read_baselines, tolerances
from runtime.gate.gate import Options, run_gate
from runtime.gate.interval import interval

NAME = "moss-mug/taq"
OPTIONS = Options(threads=1, blame=False)


@pytest.fixture
def accepted(bundle: Path, tmp_path: Path) -> Path:
    """A file with the bundle's own baseline."""
    file = tmp_path / "repository.baselines.json"
    assert run_gate(bundle, replace(OPTIONS, baseline=file, update=True)).passed
    return file


def failed_names(bundle: Path, file: Path) -> dict[str, str]:
    report = run_gate(bundle, replace(OPTIONS, baseline=file))
    return {check.name: check.reason for check in report.failed}


def edit(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text())
    content["bundles"][NAME] |= fields
    file.write_text(json.dumps(content))


def test_the_accepted_bundle_passes_and_the_file_can_be_reviewed(bundle: Path, accepted: Path) -> None:
    assert failed_names(bundle, accepted) == {}
    entry = read_baselines(accepted).bundles[NAME]
    assert set(entry.metrics) >= {"unet SNR dB", "image PSNR dB", "image SSIM", "vae PSNR dB"}
    assert entry.decisions == {"block.conv2": "int8/int8", "told": "int8/int8"}
    assert entry.versions["onnxruntime"] and entry.machine
    for metric in entry.metrics.values():
        low, high = metric.interval
        assert low <= np.mean(metric.values) + 1e-3 and np.mean(metric.values) - 1e-3 <= high and metric.tolerance > 0


@pytest.mark.parametrize(("shift", "word"), [(3.0, "worse than the baseline"), (-3.0, "better than the baseline")])
def test_both_ways_of_moving_fail(bundle: Path, accepted: Path, shift: float, word: str) -> None:
    metrics = json.loads(accepted.read_text())["bundles"][NAME]["metrics"]
    metrics["unet SNR dB"]["values"] = [value + shift for value in metrics["unet SNR dB"]["values"]]
    edit(accepted, metrics=metrics)
    found = failed_names(bundle, accepted)
    assert list(found) == ["unet SNR dB, beside the baseline"]
    assert found["unet SNR dB, beside the baseline"].startswith(word)


def test_a_difference_whose_interval_reaches_the_tolerance_is_noise(bundle: Path, accepted: Path) -> None:
    """Half of the inputs 3 dB better, half 3 dB worse: nothing moved."""
    metrics = json.loads(accepted.read_text())["bundles"][NAME]["metrics"]
    values = metrics["unet SNR dB"]["values"]
    metrics["unet SNR dB"]["values"] = [value + (3 if i % 2 else -3) for i, value in enumerate(values)]
    edit(accepted, metrics=metrics)
    assert failed_names(bundle, accepted) == {}


def test_a_baseline_of_other_weights_says_so(bundle: Path, accepted: Path) -> None:
    edit(accepted, checkpoint_sha256="1")
    reason = f"{NAME}: the checkpoint's weights changed; look at it, then --update-baseline"
    assert failed_names(bundle, accepted) == {"baseline is of these weights and prompts": reason}


def test_a_baseline_of_other_prompts_says_so(bundle: Path, accepted: Path) -> None:
    edit(accepted, prompts=["another"])
    reason = f"{NAME}: the goldens' prompts changed; look at them, then --update-baseline"
    assert failed_names(bundle, accepted) == {"baseline is of these weights and prompts": reason}


def test_a_bundle_without_an_entry_fails(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    file.write_text('{"format": "personalq-gate-baseline", "schema_version": 2, "bundles": {}}')
    assert failed_names(bundle, file) == {
        "baseline": f"{file}: must have {NAME}, got nothing; run with --update-baseline"
    }


def test_a_failing_bundle_is_not_accepted(copied: Path, reseal: Any, tmp_path: Path) -> None:
    reseal(copied, census={"conv int8/int8": 2, "linear int8/int8": 1})
    file = tmp_path / "b.json"
    report = run_gate(copied, replace(OPTIONS, baseline=file, update=True))
    assert not report.passed and not file.exists()
    assert "a baseline must pass by itself" in report.failed[-1].reason


@pytest.mark.parametrize("level", ["integrity", "obedience"])
def test_a_level_that_measures_nothing_has_no_baseline(level: str, bundle: Path, accepted: Path) -> None:
    report = run_gate(bundle, replace(OPTIONS, baseline=accepted, level=level))
    reason = f"{accepted}: needs the levels that measure something, got {level!r}; run numerics"
    assert [(check.name, check.reason) for check in report.failed] == [("baseline", reason)]


def test_other_entries_stay_when_one_is_written(bundle: Path, accepted: Path) -> None:
    content = json.loads(accepted.read_text())
    content["bundles"]["other/taq"] = content["bundles"][NAME]
    accepted.write_text(json.dumps(content))
    assert run_gate(bundle, replace(OPTIONS, baseline=accepted, update=True)).passed
    assert set(read_baselines(accepted).bundles) == {NAME, "other/taq"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such baselines; write them with"),
        ("{", "file: Invalid JSON"),
        ('{"format": "x"}', "format: Input should be 'personalq-gate-baseline'"),
        ('{"schema_version": 1}', "schema_version: Input should be 2; write it again with --update-baseline"),
    ],
    ids=["missing", "no JSON", "another file", "older"],
)
def test_a_file_that_is_no_baseline_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BundleError) as error:
        read_baselines(file)
    assert str(error.value).startswith(f"{file}: {message}")


def test_the_default_file_lies_beside_the_repository() -> None:
    assert default_file(Path("/data/checkpoints")) == Path("/data/checkpoints.baselines.json")


def test_tolerances_are_the_floor_or_three_times_the_noise() -> None:
    noisy = [Measured({"x dB": [30.1, 32.1]}, {}), Measured({"image SSIM": [0.9]}, {})]
    quiet = Measured({"x dB": [30.0, 32.0], "image SSIM": [0.9]}, {}, noisy)
    assert tolerances(quiet) == pytest.approx({"x dB": 0.5, "image SSIM": 0.01})
    noisy = [Measured({"x dB": [31.0, 32.0]}, {}), Measured({"x dB": [27.0, 31.0]}, {})]
    loud = Measured({"x dB": [30.0, 32.0]}, {}, noisy)
    assert tolerances(loud) == pytest.approx({"x dB": 6.0})


def test_the_tolerance_of_layers_is_the_floor_or_half_as_much_again_as_the_noise() -> None:
    layers = {"a": [30.0] * 6, "b": [40.0] * 6}
    quiet = Measured({}, layers, [Measured({}, {"a": [31.0] * 6, "b": [39.0] * 6})])
    assert layer_tolerance(quiet) == 2.5
    loud = Measured({}, layers, [Measured({}, {"a": [31.0] * 6, "b": [37.0] * 6})])
    assert layer_tolerance(loud) == pytest.approx(4.5)
    mixed = Measured(
        {}, layers, [Measured({}, {"a": [20.0, 40.0] * 3, "b": [40.0] * 6})]
    )  # one way as far as the other
    assert layer_tolerance(mixed) == 2.5


@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_one_layer_that_moved_fails_while_every_output_holds(bundle: Path, accepted: Path, shift: float) -> None:
    layers = json.loads(accepted.read_text())["bundles"][NAME]["layers"]
    layers["block.conv2"] = [value + shift for value in layers["block.conv2"]]
    edit(accepted, layers=layers)
    found = failed_names(bundle, accepted)
    assert list(found) == ["layers and blocks SNR dB, beside the baseline"]
    before, now = np.mean(layers["block.conv2"]), np.mean(layers["block.conv2"]) - shift
    assert found.popitem()[1] == f"block.conv2: {before:.1f} -> {now:.1f} dB at its output"


def test_a_list_of_numbers_is_one_line_of_the_file(accepted: Path) -> None:
    entry = read_baselines(accepted).bundles[NAME]
    lines = accepted.read_text().splitlines()
    assert sum('"block.conv2": [' in line and line.rstrip(",").endswith("]") for line in lines) == 1
    assert len(lines) < 40 + 6 * len(entry.metrics) + 2 * len(entry.layers)


def test_an_interval_holds_the_mean_and_narrows_with_more_values() -> None:
    few, many = interval([1.0, 2.0, 3.0, 4.0]), interval([1.0, 2.0, 3.0, 4.0] * 50)
    assert few[0] < 2.5 < few[1] and many[1] - many[0] < (few[1] - few[0]) / 3
    assert interval([2.0]) == (2.0, 2.0)


def test_a_worse_bundle_fails_with_the_layer_in_the_first_line(copied: Path, accepted: Path, reseal: Any) -> None:
    """The convolution rounded to 4 bits' worth of integers, honestly: its spec says so, its scale fits."""
    from bench._faults import overwrite
    from personalq.numerics import INT4, INT8, absmax_scale, quantize
    from personalq.spec import SpecFile, read_spec
    from runtime.engines.onnxfile import read_graph
    from runtime.gate.subject import Sources
    from tests.runtime.conftest import unet_weights

    name, weight = "block.conv2", unet_weights()["block.conv2"]
    scale = absmax_scale(weight, INT4, 0)
    graph, old = read_graph(copied / "unet.ort.onnx"), read_spec(copied / "spec.json")
    dequantise = graph.readers[f"{name}.weight"][0]
    overwrite(graph, f"{name}.weight", quantize(weight, scale, INT8, 0).clip(-8, 7))
    overwrite(graph, dequantise.inputs[1], scale)
    SpecFile(old.spec, {**old.tensors, f"{name}.weight_scale": scale}).write(copied / "spec.json")
    reseal(copied)
    sources = Sources(weights=lambda component, key: unet_weights()[key.removesuffix(".weight")])
    report = run_gate(copied, Options(threads=1, level="numerics", baseline=accepted), sources)
    assert not report.passed
    assert report.headline.startswith(f"FAILED {NAME}: layer that moved first: {name}; ")
