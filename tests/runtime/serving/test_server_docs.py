"""The Python in docs/server.md runs against a server; the page names every option and error it should."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "server.md").read_text()


def test_the_documented_client_runs(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)).replace("http://127.0.0.1:8765", served.url)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/server.md", "exec"), names)
    names["client"].close()
    lines = capsys.readouterr().out.splitlines()
    assert "sks mug" in lines[0]
    assert lines[1:] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_every_option_of_serve_is_named() -> None:
    from cli import cli

    shown = CliRunner().invoke(cli, ["serve", "--help"]).output
    options = set(re.findall(r"--[a-z-]+", shown)) - {"--help"}
    assert options and options <= set(re.findall(r"--[a-z-]+", TEXT))


def test_every_route_is_named(served: Any) -> None:
    paths = served.client.get("/openapi.json").json()["paths"]
    named = {
        "/v1/images/files/{name}",
        "/v1/models/{model}",
        "/v1/models/{model}/sheet",
    }  # answered URLs, one of a list
    assert all(path in TEXT for path in paths if path not in named)


def test_the_image_holds_the_runtime_alone() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    rooms = {word for line in copied for word in line.split()[:-1]} - {"pyproject.toml", "constraints.txt", "README.md"}
    assert rooms == {"LICENSE", "cli.py", "personalq", "runtime", "fleet"}  # the command line names fleet's command
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER personalq$", text, re.MULTILINE) and "EXPOSE 8765" in text


def test_the_image_has_the_names_of_the_rooms_that_it_does_not_hold(tmp_path: Path) -> None:
    """setuptools wants every package that pyproject.toml names; the Dockerfile's own command makes the missing ones."""
    command = re.search(r'^RUN python -c "(.*?)"', (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL)
    assert command is not None
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, "-c", command[1].replace("\\\n", "")], cwd=tmp_path, check=True)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert packages and all((tmp_path / name.replace(".", "/") / "__init__.py").is_file() for name in packages)
