"""bench quality: paired differences carry intervals, the table counts bytes, the plot is a picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench._quality_report import METRICS, differences, markdown, plot, table
from bench.quality import ssim


def row(checkpoint: str, policy: str, size: int, shift: float) -> dict[str, object]:
    generator = np.random.default_rng(len(checkpoint))
    pictures = {metric: (generator.random(8) + shift).tolist() for metric in METRICS}
    means = {metric: float(np.mean(values)) for metric, values in pictures.items()}
    return {
        "checkpoint": checkpoint,
        "policy": policy,
        "bytes": size,
        "bytes_fp32": 1000,
        "noise_error": [0.1] * 5,
        **means,
        "pictures": pictures,
    }


ROWS = [
    row(c, policy, size, shift)
    for c in ("a", "bb", "ccc")
    for policy, size, shift in (("fp32", 1000, 0.0), ("taq-w4a8", 164, -0.1), ("rtn-w4a8", 160, -0.3))
]


def test_a_constant_difference_between_pairs_has_a_narrow_interval():
    found = {(d["a"], d["b"], d["metric"]): d for d in differences(ROWS)}
    gap = found["taq-w4a8", "rtn-w4a8", "concept"]
    assert gap["mean"] == pytest.approx(0.2)
    assert 0.19 < gap["low"] <= gap["high"] < 0.21
    assert found["taq-w4a8", "fp32", "concept"]["mean"] == pytest.approx(-0.1)


def test_the_table_has_a_line_a_policy_with_its_share_of_fp32():
    lines = list(table(ROWS))
    assert len(lines) == 4
    assert "0.164" in next(line for line in lines if line.startswith("taq-w4a8"))


def test_the_docs_table_says_what_taq_has_over_each_policy():
    lines = markdown(ROWS, differences(ROWS)).splitlines()
    assert lines[0] == "**W4A8**, 3 checkpoints:"
    rtn = next(line for line in lines if line.startswith("| rtn"))
    assert "| 0.160 |" in rtn
    assert "+0.200 (" in rtn
    assert next(line for line in lines if line.startswith("| fp32")).count("|") == rtn.count("|")


def test_the_plot_is_a_picture(tmp_path: Path):
    plot(ROWS, "concept", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 300


def test_ssim_is_one_for_equal_pictures_and_less_for_others():
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert ssim(picture, 255 - picture) < 0.5
