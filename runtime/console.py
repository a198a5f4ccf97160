"""How commands print: a Result becomes text or exactly one JSON object on stdout; progress and failures go to stderr.

Exit 0: done, 1: a named failure in one line, 2: usage, 130: interrupted. It knows click and rich, not checkpoints.
"""

import contextlib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from personalq.errors import MissingExtraError, PersonalQError

# Module that a command may miss -> the extra that installs it.
EXTRAS = {
    "torch": "export",
    "diffusers": "export",
    "transformers": "export",
    "peft": "export",
    "onnx": "convert",
    "onnx_ir": "convert",
    "onnxscript": "export",
    "ml_dtypes": "convert",
    "scipy": "export",
    "matplotlib": "export",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "polygraphy": "tensorrt",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "openai": "llm",
    "ray": "ray",
    "obstore": "store",
}


@dataclass(frozen=True)
class Result:
    """What a command found.

    data: the JSON object. lines: the same for people, texts or rich tables; without them `data` is laid out as it is.
    code: the exit status.
    printed: the command has printed by itself, one JSON object a line.
    """

    data: dict[str, Any]
    lines: Sequence[Any] = ()
    code: int = 0
    printed: bool = False


class Report(Protocol):
    """Progress: what is being done, and the fraction done (0 to 1; None: unknown)."""

    def __call__(self, text: str, fraction: float | None = None) -> None: ...


class OneLine(click.ClickException):
    """A failure shown as one line on stderr."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: Any = None) -> None:
        click.echo(f"personalq: {self.message}", err=True)


class Interrupted(OneLine):
    exit_code = 130


class Commands(click.Group):
    """A group whose named failures, missing packages and interrupts are one line. A bug still shows its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PersonalQError as error:
            raise OneLine(str(error)) from error
        except ImportError as error:
            package = (error.name or "").split(".")[0]
            if package not in EXTRAS:
                raise
            raise OneLine(str(MissingExtraError(package, EXTRAS[package]))) from error
        except BrokenPipeError:
            raise  # the reader closed the pipe; click ends quietly
        except FileNotFoundError as error:
            raise OneLine(f"{error.filename or 'file'}: must exist, got nothing there; check the path") from error
        except OSError as error:
            where, reason = error.filename or "system", error.strerror or str(error)
            raise OneLine(f"{where}: must be usable, got '{reason}'; check permissions and free space") from error
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing half-written was kept") from None


def start_logging() -> None:
    """Send warnings of every room to stderr, and keep the libraries below quiet unless the user asks them to speak."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="personalq: %(message)s")
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("DIFFUSERS_VERBOSITY", "error"), ("TQDM_DISABLE", "1")):
        os.environ.setdefault(name, value)


def reports(function: Callable[..., Result]) -> Callable[..., None]:
    """Give a command --json, which may also stand before its name, and print the Result it returns."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @functools.wraps(function)
    def run(*args: Any, as_json: bool, **options: Any) -> None:
        result = function(*args, **options)
        if wants_json() and not result.printed:
            click.echo(json.dumps(result.data, ensure_ascii=False))
        elif not result.printed:
            _print(result)
        if result.code:
            sys.exit(result.code)

    return run


def wants_json() -> bool:
    """Whether --json was said, before the command's name or after it."""
    context: click.Context | None = click.get_current_context()
    while context is not None:
        if context.params.get("as_json"):
            return True
        context = context.parent
    return False


def talk(decide: Callable[[list[str]], Any], answers: Sequence[str]) -> Any:
    """Return `decide(answers)`; at a terminal, put its open question to the person and decide again with the answer.

    With --json, or when nobody is there to answer, the question is part of what is returned.
    """
    said = list(answers)
    found = decide(said)
    asks = sys.stdin.isatty() and sys.stderr.isatty() and not wants_json()
    while asks and found.question:
        lines = [found.question, *(f"  {number}. {option}" for number, option in enumerate(found.options, 1))]
        click.echo("\n".join(lines), err=True)
        said.append(click.prompt("Your answer (a number, words, or 'neither')", err=True))
        found = decide(said)
    return found


def each_line(file: Path, needs: str, answer: Callable[[dict[str, Any]], Any]) -> Result:
    """JSONL in, JSONL out: print `answer(line).to_json()` for each line, in order.

    A line that is not an object with the text `needs`, or cannot be answered, prints {"error": ...} and makes the exit
    status 1.
    """
    code = 0
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get(needs), str):
                raise ValueError(needs)
            made = answer(line).to_json()
        except PersonalQError as error:
            code, made = 1, {"error": str(error)}
        except ValueError:
            code, made = 1, {"error": f"{file}:{number}: must be a JSON object with {needs!r}; fix the line"}
        click.echo(json.dumps(made, ensure_ascii=False))
    return Result({}, code=code, printed=True)


def _print(result: Result) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200  # in a pipe nothing is wrapped at 80
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    for block in result.lines or _blocks(result.data):
        console.print(block)


def _blocks(data: Mapping[str, Any]) -> Iterator[Any]:
    """Single values as one list, then every list of objects and every object as a table of its own."""
    objects = {key: value for key, value in data.items() if isinstance(value, Mapping) or _is_table(value)}
    single = [(key, value) for key, value in data.items() if key not in objects and value not in ("", None, [], ())]
    if single:
        yield _table("", "", rows=single)
    for key, value in objects.items():
        if isinstance(value, Mapping):
            rows = [(name, item) for name, item in value.items() if not isinstance(item, Mapping)]
            yield from [f"{key}:", _table("", "", rows=rows)] if rows else []
        else:
            columns = list(dict.fromkeys(name for item in value for name in item))
            yield from [f"{key}:", _table(*columns, rows=[[item.get(name, "") for name in columns] for item in value])]


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _cell(value: Any) -> str:
    """A value as people read it: no brackets, long lists one item a line, hashes cut short, four digits."""
    if isinstance(value, list | tuple):
        items = [_cell(item) for item in value]
        return (", " if sum(map(len, items)) <= 80 else "\n").join(items)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Yield a Report: a bar on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text, fraction=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(text: str, fraction: float | None = None) -> None:
            bar.update(task, description=text, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        yield report


def _table(*columns: str, rows: Sequence[Sequence[Any]]) -> Any:
    """A rich table without a frame; cells are shown as they are, never as markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(cell)) for cell in row))
    return made
