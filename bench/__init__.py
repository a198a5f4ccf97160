"""One file per question: `personalq bench NAME`. Prints a table, then one JSON object as the last line."""

import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from personalq.errors import PersonalQError

HERE = Path(__file__).parent
# The same command in a new process. -P: what lies in the current folder is not imported.
START = f"import sys; sys.path.append({str(HERE.parent)!r}); from cli import main; main()"
APART = (sys.executable, "-P", "-c", START, "bench")


def names() -> list[str]:
    """Every benchmark there is: a file of this folder that can be run and whose name does not start with '_'."""
    return sorted(file.stem for file in HERE.glob("[!_]*.py") if '__name__ == "__main__"' in file.read_text())


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one benchmark as if it were called as `python -m bench.<name>` with these arguments. Returns its exit status."""
    sys.argv = [f"bench {name}", *arguments]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    return 0


def run_for_json(name: str, arguments: Sequence[str]) -> int:
    """Run one benchmark; only its JSON object goes to stdout, all else that it prints to stderr. Returns its exit status.

    In a process of its own: some start programs that write to the same stdout, and `switch` replaces its process.
    """
    if "--help" in arguments:
        return run(name, arguments)
    found = ""
    with subprocess.Popen([*APART, name, *arguments], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if _is_object(line):
                found, line = line, found
            click.echo(line, nl=False, err=True)
    if not (found or process.returncode):
        raise PersonalQError(f"bench {name}: must print one JSON object, got none; it is a bug of the benchmark")
    click.echo(found, nl=False)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
