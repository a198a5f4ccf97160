"""What .ci/run adds to the make targets: a browser, and last lines that say what was skipped in all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import browser, skips

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

@pytest.mark.skipif("WITHOUT" in __import__("os").environ, reason="needs another environment")
@pytest.mark.parametrize("number", range(2))
def test_here_or_there(number): pass

@pytest.mark.parametrize("number", range(3))
def test_nowhere(number): pytest.skip("no GPU")

def test_always(): pass
"""
SKIPPED = ["skipped: 4", "  3 x test_some.py: no GPU", "  1 x test_whole.py: no such package"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with our conftest.py, a file of tests and one that is skipped while it is imported."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_terminal_summary as pytest_terminal_summary\n"
    )
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.skip('no such package', allow_module_level=True)\n")
    return tmp_path


def run_pytest(project: Path, *options: str, **environment: str) -> str:
    """Run the project's tests as one target of .ci/run; its output."""
    told = {"PYTHONPATH": str(ROOT), "PERSONALQ_SKIPS": str(project / "skips"), "PYTEST_ADDOPTS": ""}
    told |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", *options]
    done = subprocess.run(
        command, cwd=project, env=os.environ | told, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", ["0", "2"], ids=["one process", "two workers"])
def test_what_one_run_skips_and_another_runs_was_not_skipped(project: Path, workers: str) -> None:
    run_pytest(project, "-n", workers, WITHOUT="1")
    lines = (project / "skips").read_text().splitlines()
    assert "  2 x test_some.py: needs another environment" in skips.summary(lines)
    run_pytest(project, "-k", "here_or_there")
    assert skips.summary((project / "skips").read_text().splitlines()) == SKIPPED


def test_without_the_variable_nothing_is_recorded(project: Path) -> None:
    assert "skipped" in run_pytest(project, PERSONALQ_SKIPS="")
    assert not (project / "skips").exists()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], ["no test run came to its end"]),
        ([["a.py::b", None]], ["nothing was skipped"]),
        (
            [["a.py::b", "no GPU"], ["a.py", "no numpy"]],
            ["skipped: 2", "  1 x a.py: no numpy", "  1 x a.py::b: no GPU"],
        ),
    ],
    ids=["nothing ran", "all ran", "one test is named"],
)
def test_the_summary_is_short(lines: list[list[str | None]], told: list[str]) -> None:
    assert skips.summary(map(json.dumps, lines)) == told


def test_a_browser_test_without_a_browser_is_skipped_but_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONALQ_BROWSER", "/no/such/browser")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium here: install Debian's chromium"):
        browser.require_browser()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium here"):
        browser.require_browser()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What .ci/run needs of a checkout; `make` and `apt-get` only say how they were called."""
    for name in (".ci/run", "tests/skips.py", "tests/browser.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    skip = json.dumps(["tests/a.py::test_b", "no GPU"])
    write_program(tmp_path / ".venv" / "bin" / "python", f'exec {sys.executable} "$@"')
    write_program(tmp_path / "bin" / "make", f"echo make $1; echo '{skip}' >> $PERSONALQ_SKIPS; [ $1 != \"$BREAKS\" ]")
    write_program(tmp_path / "bin" / "apt-get", 'echo apt-get "$@" >&2; [ -z "$INSTALLS" ] || cp "$0" "$INSTALLS"')
    write_program(tmp_path / "bin" / "id", "echo $USER_ID")
    write_program(tmp_path / "browser", "")
    return tmp_path


def write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def run_ci(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    told = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "INSTALLS": ""}
    told |= {"PERSONALQ_BROWSER": str(checkout / "browser"), "BREAKS": "", "USER_ID": "0"}
    return subprocess.run(
        [checkout / ".ci" / "run"], env=os.environ | told | environment, capture_output=True, text=True, check=False
    )


def test_the_last_lines_of_a_run_say_what_was_skipped(checkout: Path) -> None:
    done = run_ci(checkout)
    assert done.returncode == 0, done.stderr
    targets = [line.removeprefix("make ") for line in done.stdout.splitlines() if line.startswith("make ")]
    assert targets == ["lint", "test", "test-optimum", "test-rtx", "gate"]
    assert done.stdout.endswith("\nskipped: 1\n  1 x tests/a.py::test_b: no GPU\n")


def test_a_run_that_fails_says_it_too_and_keeps_its_status(checkout: Path) -> None:
    done = run_ci(checkout, BREAKS="test")
    assert done.returncode == 1 and "make test-optimum" not in done.stdout
    assert done.stdout.endswith("make test\nskipped: 1\n  1 x tests/a.py::test_b: no GPU\n")


def test_a_missing_browser_is_installed_by_root(checkout: Path) -> None:
    (checkout / "browser").unlink()
    done = run_ci(checkout, INSTALLS=str(checkout / "browser"))
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stderr.splitlines()] == ["update", "chromium"]


@pytest.mark.parametrize("user", ["0", "1000"], ids=["apt-get installs nothing", "not root"])
def test_a_browser_that_cannot_be_installed_is_one_line(checkout: Path, user: str) -> None:
    (checkout / "browser").unlink()
    done = run_ci(checkout, USER_ID=user)
    assert done.returncode == 1 and "make test" not in done.stdout
    *of_apt, said = done.stderr.splitlines()
    assert said == (
        ".ci/run: no Chromium, and apt-get as root cannot install it here; install one, or name one in PERSONALQ_BROWSER"
    )
    assert [line.split()[-1] for line in of_apt] == (["update", "chromium"] if user == "0" else [])
