"""How commands speak: one Result in, text or exactly one JSON object on stdout out; progress and failures on stderr.

Exit 0: done, 1: a named failure in one line, 2: usage, 130: interrupted. It knows click and rich, not checkpoints.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import click

from personalq.errors import MissingExtraError, PersonalQError

# Module that a command may miss -> the extra that installs it.
EXTRAS = {
    "torch": "export",
    "diffusers": "export",
    "transformers": "export",
    "peft": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "ml_dtypes": "export",
    "scipy": "export",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "polygraphy": "tensorrt",
    "fastapi": "serve",
    "uvicorn": "serve",
}


@dataclass(frozen=True)
class Result:
    """What a command found. data: the JSON object. lines: for people, text or rich tables. code: the exit status."""

    data: dict[str, Any]
    lines: Sequence[Any] = ()
    code: int = 0


class Report(Protocol):
    """Progress: what is being done, and how much of it (0 to 1; None: nobody knows)."""

    def __call__(self, text: str, fraction: float | None = None) -> None: ...


class OneLine(click.ClickException):
    """A failure shown as one line on stderr."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = code

    def show(self, file: Any = None) -> None:
        click.echo(f"personalq: {self.message}", err=True)


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
            raise  # the reader left; click ends quietly
        except OSError as error:
            where, reason = error.filename or "system", error.strerror or str(error)
            raise OneLine(f"{where}: must be usable, got '{reason}'; check permissions and free space") from error
        except KeyboardInterrupt:
            raise OneLine("interrupted; nothing half-written was kept", 130) from None


def reports(function: Callable[..., Result]) -> Callable[..., None]:
    """Give a command --json, and print the Result it returns."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @functools.wraps(function)
    def run(*args: Any, as_json: bool, **options: Any) -> None:
        result = function(*args, **options)
        if as_json:
            click.echo(json.dumps(result.data, ensure_ascii=False))
        else:
            _print(result.lines)
        if result.code:
            sys.exit(result.code)

    return run


def _print(lines: Sequence[Any]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(line)


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


def table(*columns: str, rows: Sequence[Sequence[Any]]) -> Any:
    """A rich table without a frame; cells are shown as they are, never as markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(*columns, box=None, pad_edge=False, show_header=any(columns))
    for row in rows:
        made.add_row(*(Text(", ".join(cell) if isinstance(cell, list | tuple) else str(cell)) for cell in row))
    return made
