"""Markdown for a pull request: the verdict, what failed, and everything else folded away."""

import re
from collections.abc import Iterable, Iterator, Sequence

from .. import LEVELS
from ..check import Check, Report

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&@])")
N_LAYERS = 5


def markdown(reports: Sequence[Report]) -> str:
    """One section per bundle."""
    return "\n".join(line for report in reports for line in _section(report)) + "\n"


def _section(report: Report) -> Iterator[str]:
    yield f"### {'✅' if report.passed else '❌'} {_text(report.headline)}"
    yield ""
    if report.form != "merged":
        yield from (f"Form: {_text(report.described)}", "")
    if report.failed:
        yield from _table(report.failed)
        yield ""
    yield "| level | checks | failed | seconds |"
    yield "|---|--:|--:|--:|"
    for level in dict.fromkeys([*LEVELS, *(check.level for check in report.checks)]):
        chosen = [check for check in report.checks if check.level == level]
        wrong = sum(not check.passed for check in chosen)
        seconds = f"{report.seconds.get(level, 0.0):.1f}"
        yield from [f"| {level} | {len(chosen)} | {wrong} | {seconds} |"] if chosen else []
    yield ""
    yield from _layers(report)
    for text in report.left_out:
        yield f"Not compared: {_text(text)}"
        yield ""
    yield "<details><summary>Every check</summary>"
    yield ""
    yield from _table(report.checks)
    yield ""
    yield "</details>"
    yield ""


def _table(checks: Iterable[Check]) -> Iterator[str]:
    yield "| | check | value | limit | why |"
    yield "|---|---|--:|--:|---|"
    for check in checks:
        interval = f" [{check.interval[0]:.4g}, {check.interval[1]:.4g}]" if check.interval else ""
        mark = "✅" if check.passed else "❌"
        why = "" if check.passed else _text(check.reason)
        yield f"| {mark} | {_text(check.name)} | {check.value:.4g}{interval} | {check.limit:.4g} | {why} |"


def _layers(report: Report) -> Iterator[str]:
    """The layers that lost most against the baseline, or are weakest where there is none."""
    change = {name: now - report.before[name] for name, now in report.layers.items() if name in report.before}
    order = sorted(report.layers, key=lambda name: change.get(name, report.layers[name]))
    if not order:
        return
    yield f"| {'layers that lost most' if change else 'weakest layers'} | SNR dB | baseline |"
    yield "|---|--:|--:|"
    for name in order[:N_LAYERS]:
        before = f"{report.before[name]:.1f}" if name in report.before else ""
        yield f"| {_text(name)} | {report.layers[name]:.1f} | {before} |"
    yield ""


def _text(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
