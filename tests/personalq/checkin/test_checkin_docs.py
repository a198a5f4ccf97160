"""The worked examples of docs/check-in.md are what comes out."""

import doctest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_worked_examples_give_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PERSONALQ_REPO", raising=False)
    result = doctest.testfile(str(ROOT / "docs" / "check-in.md"), module_relative=False, encoding="utf-8")
    assert result.attempted >= 10 and result.failed == 0
