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
    named = {"/v1/images/{name}", "/v1/models/{model}", "/v1/models/{model}/sheet"}  # answered URLs, and one of a list
    assert all(path in TEXT for path in paths if path not in named)


def test_the_image_holds_the_runtime_alone(tmp_path: Path) -> None:
    copied = re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    rooms = {word for line in copied for word in line.split()[:-1]} - {"pyproject.toml", "constraints.txt", "README.md"}
    assert rooms == {"LICENSE", "cli.py", "personalq", "runtime", "fleet"}  # the command line names fleet's command
    text = (ROOT / "Dockerfile").read_text()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    (code,) = re.findall(r'RUN python -c "(.*?)"', text, re.DOTALL)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, "-c", code.replace("\\\n", "")], cwd=tmp_path, check=True)
    assert {".".join(file.relative_to(tmp_path).parts[:-1]) for file in tmp_path.rglob("__init__.py")} == set(packages)
    assert re.search(r"^USER personalq$", text, re.MULTILINE) and "EXPOSE 8765" in text
