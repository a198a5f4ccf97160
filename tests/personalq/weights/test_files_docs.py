"""docs/files.md: each of its rows names a test, and each of those tests is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[2]
PAGE = (TESTS.parent / "docs" / "files.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not re.match(r"\| what\b", line)]


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_each_row_names_a_test_that_is_there() -> None:
    assert len(ROWS) > 40
    for row in ROWS:
        (name,) = re.findall(r"`(\S+\.py)::(test_\w+)`", row) or [("", "")]
        file, function = name
        assert file and function in functions(TESTS.parent / file), row
