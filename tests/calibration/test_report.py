"""The calibration report is one page that needs nothing else, and says what was kept and why."""

import re

from calibration.calibrate import CalibrateOptions, calibrate


def test_the_page_holds_its_pictures_and_the_reasons(rex, tmp_path):
    page = tmp_path / "report.html"
    calibrate(rex, "rex", CalibrateOptions(samples=2, steps=2, report=page))
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "alt=''" not in text
    assert re.search(r"<b>\d+ linear</b>: int8 weights, int8 activations", text)
    assert "carries the concept" in text
    for name in ("bos", "trigger", "class_noun", "eos", "pad"):
        assert f"<td>{name}</td>" in text
    assert "http" not in text
    assert "first or last layer" in text
