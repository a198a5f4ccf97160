"""The Python in docs/runtime.md runs as it stands, against a repository with one bundle."""

import re
import shutil
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "runtime.md"


def test_the_documented_python_runs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, tmp_path / "repository" / "bundles" / "split000")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL))
    exec(compile(code, str(DOCS), "exec"), {})
    assert (tmp_path / "mug.png").is_file()
    bracket = "prompt: '(' at character 19 is never closed: it is read as a bracket"
    composed = "prompt: AND: prompts cannot be composed: it is read as the word 'and'"
    steps = ["1/4 t=999", "2/4 t=749", "3/4 t=499", "4/4 t=249"]
    assert capsys.readouterr().out.splitlines() == [*steps, str((bracket, composed)), "True []"]
