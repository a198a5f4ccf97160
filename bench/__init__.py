"""One file per question: `personalq bench NAME`. Prints a table, then one JSON object as the last line."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def names() -> list[str]:
    """Every benchmark there is: a file of this folder whose name does not start with '_'."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))


def run(name: str, arguments: Sequence[str]) -> None:
    """Run one benchmark as if it were called as `python -m bench.<name>` with these arguments."""
    sys.argv = [f"bench {name}", *arguments]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
