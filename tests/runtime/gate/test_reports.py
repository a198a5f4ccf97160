"""Reports say the verdict first, are well formed, load nothing, and show text from outside as text."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from runtime.gate.check import Check, Pictures, Report, at_least
from runtime.gate.gate import Options, run_gate
from runtime.gate.levels.pictures import ssim
from runtime.gate.reports.html import html
from runtime.gate.reports.junit import junit
from runtime.gate.reports.markdown import markdown
from runtime.gate.reports.plots import heat_map, layers_plot

ROOT = Path(__file__).parents[3]
EVIL = "<script>alert(1)</script> | a\x00b `c` [x](http://e)"


def evil_report() -> Report:
    """A failed report whose every text comes from somebody who would rather be code."""
    random = np.random.default_rng(0)
    pictures = Pictures(*random.integers(0, 255, (2, 1, 16, 16, 3), dtype=np.uint8), captions=(EVIL,))
    checks = (at_least("fine", 2, 1, level="integrity"), Check(EVIL, 1, 2, False, EVIL, "numerics", "a.b"))
    layers = {"a.b": 12.0, "a": 30.0, EVIL: 40.0}
    return Report(Path("b"), checks, EVIL, f"FAILED {EVIL}", {EVIL: [1.0, 2.0]}, layers, {"a.b": 31.0}, pictures)


def test_junit_has_one_case_a_check_and_its_failures(bundle: Path) -> None:
    good, bad = run_gate(bundle, Options(threads=1)), evil_report()
    root = ET.fromstring(junit([good, bad]))
    suites = root.findall("testsuite")
    assert [suite.get("failures") for suite in suites] == ["0", "1"]
    assert len(suites[0].findall("testcase")) == int(suites[0].get("tests", "0")) == len(good.checks)
    (failure,) = suites[1].iter("failure")
    assert failure.get("message") == EVIL.replace("\x00", "?") and "layer a.b" in (failure.text or "")


def test_markdown_says_the_verdict_first_and_shows_text_as_text(bundle: Path) -> None:
    good, bad = markdown([run_gate(bundle, Options(threads=1))]), markdown([evil_report()])
    assert good.startswith("### ✅ PASSED moss\\-mug/taq".replace("\\-", "-"))
    assert bad.startswith("### ❌ FAILED ")
    assert "<script>" not in bad and "](http" not in bad
    rows = [line for line in bad.splitlines() if line.startswith("|")]
    columns = [len(line.replace("\\|", "").strip("|").split("|")) for line in rows]
    assert set(columns) <= {3, 4, 5}  # a pipe in a text does not make a column
    assert "| a.b | 12.0 | 31.0 |" in bad


class Page(HTMLParser):
    """Tags and what they would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]


def test_the_page_is_self_contained_and_escapes_everything() -> None:
    text, page = html([evil_report()]), Page()
    page.feed(text)
    assert "script" not in page.tags and "&lt;script&gt;" in text
    assert page.loads and all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert {"svg", "figure", "table"} <= set(page.tags)
    assert "default-src 'none'" in text
    assert page.tags.count("img") == 3


def test_the_heat_map_is_dark_where_pictures_agree_and_bright_where_not() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[0, 0] = 255
    drawn = heat_map(a, b).astype(int).sum(axis=2)
    assert drawn[0, 0] == drawn.max() and (drawn[1:] == drawn.min()).all()


def test_the_plot_marks_the_layer_to_blame() -> None:
    svg = layers_plot({"a": 30.0, "b": 10.0}, {"a": 30.5, "b": 28.0}, "b")
    root = ET.fromstring(svg)
    marked = [node for node in root.iter() if "marked" in (node.get("class") or "")]
    assert [node.tag for node in marked] == ["circle", "text"] and marked[1].text == "b"
    assert len(root.findall("circle")) == 2 and len(root.findall("polyline")) == 2


def test_ssim_is_scikit_images() -> None:
    metrics = pytest.importorskip(
        "skimage.metrics", reason="scikit-image is not installed: pip install 'personalq[dev]'"
    )
    random = np.random.default_rng(1)
    a = random.integers(0, 255, (32, 40, 3), dtype=np.uint8)
    b = np.clip(a + random.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    # theirs leaves a border of 3 out as well: windows that stick out of the picture
    wanted = metrics.structural_similarity(a, b, channel_axis=2, data_range=255)
    assert ssim(a, b) == pytest.approx(wanted, abs=1e-9)
    assert ssim(a, a) == 1.0


@pytest.mark.slow
def test_the_page_opens_in_a_browser(chromium: str, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(html([run_gate(bundle, Options(threads=1)), evil_report()]))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    assert "PASSED" in done.stdout and "<figure>" in done.stdout and "<svg" in done.stdout
    assert "alert(1)" not in [line.strip() for line in done.stdout.splitlines() if line.startswith("<script")]


# --- the pytest plugin and the script for CI, as a user's project has them


def sample_project(folder: Path) -> Path:
    (folder / "test_own.py").write_text("def test_of_the_project():\n    pass\n")
    return folder


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "runtime.gate.plugin", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_plugin_makes_a_test_of_every_check(bundle: Path, tmp_path: Path) -> None:
    done = run_pytest(
        sample_project(tmp_path), "-v", "--personalq-bundle", str(bundle), "--personalq-level", "numerics"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_own.py::test_of_the_project PASSED" in done.stdout
    assert "integrity: files intact PASSED" in done.stdout
    assert "numerics: vae PSNR dB PASSED" in done.stdout
    assert "images" not in done.stdout


def test_the_plugin_fails_with_value_limit_and_reason(copied: Path, tmp_path: Path) -> None:
    (copied / "unet.ort.onnx").write_bytes(b"other")
    done = run_pytest(sample_project(tmp_path), "--personalq-bundle", str(copied))
    assert done.returncode == 1
    assert "files intact: 1, limit 0" in done.stdout
    assert "unet.ort.onnx: bytes differ from the manifest's sha256" in done.stdout
    assert "Traceback" not in done.stdout and "1 failed, 1 passed" in done.stdout


def test_the_plugin_says_in_one_line_what_it_cannot_gate(tmp_path: Path) -> None:
    done = run_pytest(sample_project(tmp_path), "--personalq-bundle", "no-such-thing")
    assert done.returncode == 4
    assert "ERROR: personalq: " in done.stderr and "no-such-thing" in done.stderr


def test_without_its_option_the_plugin_does_nothing(tmp_path: Path) -> None:
    done = run_pytest(sample_project(tmp_path))
    assert done.returncode == 0 and "1 passed" in done.stdout


@pytest.fixture
def kit(bundle: Path, tmp_path: Path) -> Path:
    """A project with gate.sh, a `personalq` on its path, and baselines of the bundle."""
    shutil.copy(ROOT / "docs" / "ci" / "gate.sh", tmp_path)
    program = f'#!/bin/sh\nexec {sys.executable} -c "from cli import main; main()" "$@"\n'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "personalq").write_text(program)
    (tmp_path / "bin" / "personalq").chmod(0o755)
    repository = tmp_path / "checkpoints"
    (repository / "checkpoints" / "moss-mug").mkdir(parents=True)
    card = {"id": "moss-mug", "name": "Moss mug", "kind": "textual_inversion", "base": "tiny", "trigger": ["sks"]}
    (repository / "checkpoints" / "moss-mug" / "card.json").write_text(json.dumps(card))
    shutil.copytree(bundle, repository / "bundles" / "split000")
    options = Options(threads=1, level="numerics", baseline=tmp_path / "checkpoints.baselines.json", update=True)
    assert run_gate(bundle, options).passed
    return tmp_path


def run_script(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    environment.pop("PERSONALQ_REPO", None)
    command = ["bash", "gate.sh", *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_script_gates_what_has_a_baseline_and_writes_reports(kit: Path) -> None:
    done = run_script(kit, "--level", "numerics", "--out", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASSED moss-mug/taq")
    assert sorted(file.name for file in (kit / "out").iterdir()) == ["moss-mug.html", "moss-mug.md", "moss-mug.xml"]
    ET.parse(kit / "out" / "moss-mug.xml")


def test_the_script_fails_when_a_bundle_is_missing(kit: Path) -> None:
    shutil.rmtree(kit / "checkpoints" / "bundles")
    done = run_script(kit, "--level", "numerics")
    assert done.returncode == 1
    assert "moss-mug: must have a bundle, got none" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"), [(["--what"], "unknown option --what"), ([], "no such baselines; run 'personalq verify")]
)
def test_the_scripts_usage_errors_exit_2(options: list[str], message: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "ci" / "gate.sh", tmp_path)
    done = run_script(tmp_path, *options)
    assert done.returncode == 2 and message in done.stderr


def test_the_workflow_is_valid_and_asks_for_little() -> None:
    import yaml

    flow = yaml.safe_load((ROOT / "docs" / "ci" / "personalq-gate.yml").read_text())
    assert flow[True].keys() == {"pull_request", "push"}  # YAML 1.1 reads the key `on` as true
    assert flow["permissions"] == {"contents": "read"}
    steps = flow["jobs"]["gate"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all("@v" in step["uses"] for step in steps if "uses" in step)
    commands = " ".join(step.get("run", "") for step in steps)
    assert "gate.sh --out gate-reports" in commands and "personalq[cpu]" in commands
