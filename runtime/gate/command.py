"""`personalq verify` as a click command; what it does is in request. Importing this imports nothing heavy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import Result, reports
from . import LEVELS

if TYPE_CHECKING:
    from personalq.repository import Repository

    from .check import Report
    from .request import OpenWeights

PATH = click.Path(path_type=Path)


def verify_command(opened: "Callable[[], Repository]", open_weights: "Callable[[], OpenWeights]") -> click.Command:
    """The command. opened: the repository of --repo. open_weights: imports the checkpoint reader when it is needed."""

    @click.command()
    @click.argument("bundle", metavar="BUNDLE|ID")
    @click.option(
        "--level", type=click.Choice(LEVELS), default="images", show_default=True, help="The last level to run."
    )
    @click.option("--baseline", type=PATH, help="Compare with the entry of this file, both ways.")
    @click.option(
        "--update-baseline", is_flag=True, help="Accept this run: write its entry (default: beside the repository)."
    )
    @click.option("--junit", type=PATH, help="Also write JUnit XML.")
    @click.option("--markdown", type=PATH, help="Also write Markdown for a pull request.")
    @click.option("--html", type=PATH, help="Also write one self-contained page.")
    @click.option("--against", default="", help="Compare every output with this target's, e.g. openvino.")
    @click.option("--pictures", default=4, show_default=True, help="Pairs beyond the goldens', with an FP32 bundle.")
    @click.option("--threads", type=click.IntRange(min=1), help="For one operator. Default: every core.")
    @click.option("--judge", default="", help="MODULE:FUNCTION that gives a judge for a checkpoint's id.")
    @reports
    def verify(**asked: Any) -> Result:
        """Gate a bundle: files, spec, numbers, pictures; exit 1 when one check fails."""
        from .request import Request, answer

        made = answer(Request(**asked), opened, open_weights)
        report, written = made.report, [str(made.baseline)] if made.baseline else []
        data = {**report.to_json(), "bundle": str(report.bundle), "written": [*written, *made.reports]}
        return Result(data, _lines(report, [*written, *made.reports]), code=0 if report.passed else 1)

    return verify


def _lines(report: "Report", files: Sequence[str]) -> list[Any]:
    """For people: the headline, a table of every check with failures first, what was written."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("level", "check", "value", "limit", "passed", "why"):
        table.add_column(column, overflow="fold")
    for check in sorted(report.checks, key=lambda check: check.passed):
        style = "" if check.passed else "bold red"
        cells = [check.level, check.name, f"{check.value:.4g}", f"{check.limit:.4g}", "yes" if check.passed else "NO"]
        table.add_row(*(Text(cell, style) for cell in cells), Text("" if check.passed else check.reason))
    seconds = ", ".join(f"{level} {value:.1f} s" for level, value in report.seconds.items())
    notes = [f"not compared: {text}" for text in report.left_out] + [f"wrote {file}" for file in files]
    notes = [report.described, *notes] if report.form != "merged" else notes
    return [Text(report.headline), table, Text(seconds), *map(Text, notes)]
