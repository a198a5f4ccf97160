"""One self-contained HTML page: verdict, failures, pictures beside FP32's with their differences, layers, every check."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

import numpy as np

from personalq.numerics import psnr_db

from .. import LEVELS
from ..check import Check, Pictures, Report
from .plots import FULL_SCALE, heat_map, layers_plot, png, strip

WHAT = {
    "integrity": "the bundle is what its key says",
    "obedience": "the graph is what the spec decided",
    "numerics": "outputs, blocks, layers and text rows hold FP32's numbers",
    "images": "pictures from the same start noise as FP32's",
    "targets": "two targets compute the same",
    "baseline": "nothing moved since the accepted run",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --page: #fff; --card: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; --now: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --card: #151b23; --good: #3fb950; --bad: #f85149; --now: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 24px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 8px; }
h1 .verdict { padding: 2px 10px; border-radius: 6px; color: #fff; margin-right: 8px; }
.passed .verdict { background: var(--good); } .failed .verdict { background: var(--bad); }
.headline { color: var(--soft); margin: 0 0 20px; overflow-wrap: anywhere; }
.levels { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 10px; }
.level { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; font-size: 13px; }
.level b { display: block; font-size: 15px; } .level.bad { border-color: var(--bad); }
.level .count { color: var(--good); font-weight: 600; } .level.bad .count { color: var(--bad); }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.why { color: var(--bad); overflow-wrap: anywhere; min-width: 200px; }
.mark { font-weight: 700; color: var(--good); } tr.bad .mark { color: var(--bad); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; font-size: 12px; color: var(--soft); }
.trio img { width: 100%; display: block; image-rendering: pixelated; border-radius: 4px; }
figcaption { font-size: 13px; margin-top: 8px; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); } svg.strip { width: 160px; }
.grid { stroke: var(--line); } .group { stroke: var(--line); stroke-dasharray: 2 3; }
.now { fill: none; stroke: var(--now); stroke-width: 1.2; } .dot { fill: var(--now); }
.before { fill: none; stroke: var(--soft); stroke-dasharray: 4 3; } .ring { fill: none; stroke: var(--soft); }
svg .marked { fill: var(--bad); } svg text.marked { font-weight: 600; font-size: 12px; }
details summary { cursor: pointer; font-weight: 600; margin: 8px 0; }
"""


def html(reports: Sequence[Report]) -> str:
    """The page; nothing in it is loaded from elsewhere, and no script runs."""
    title = escape(", ".join(report.subject for report in reports))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>PersonalQ gate: {title}</title><style>{STYLE}</style></head><body>"
    )
    body = "".join(part for report in reports for part in _report(report))
    return f"{head}{body}</body></html>\n"


def _report(report: Report) -> Iterator[str]:
    verdict = "passed" if report.passed else "failed"
    yield f'<main class="{verdict}"><h1><span class="verdict">{verdict.upper()}</span>{escape(report.subject)}</h1>'
    yield f'<p class="headline">{escape(report.headline)}<br>{escape(report.described)}</p>'
    yield "".join(f'<p class="soft">Not compared: {escape(text)}</p>' for text in report.left_out)
    yield f'<div class="levels">{"".join(_levels(report))}</div>'
    if report.failed:
        yield f"<h2>What failed</h2>{_table(report.failed)}"
    if report.pictures is not None:
        yield "<h2>Pictures, from the same start noise</h2>"
        yield f'<p class="soft">Difference: mean over channels, brightest at {FULL_SCALE} of 255 and more.</p>'
        yield f'<div class="pairs">{"".join(_pairs(report.pictures))}</div>'
    if report.layers:
        yield from _layers(report)
    yield from _measured(report)
    yield f"<h2>Every check</h2><details><summary>{len(report.checks)} checks</summary>{_table(report.checks)}</details>"
    yield "</main>"


def _levels(report: Report) -> Iterator[str]:
    for level in dict.fromkeys([*LEVELS, *(check.level for check in report.checks)]):
        chosen = [check for check in report.checks if check.level == level]
        wrong = sum(not check.passed for check in chosen)
        state = f"{wrong} of {len(chosen)} failed" if wrong else f"{len(chosen)} passed" if chosen else "not run"
        seconds = f", {report.seconds[level]:.1f} s" if level in report.seconds else ""
        yield (
            f'<div class="level{" bad" if wrong else ""}"><b>{escape(level)}</b><span class="count">{state}</span>{seconds}'
            f'<br><span class="soft">{escape(WHAT.get(level, ""))}</span></div>'
        )


def _pairs(pictures: Pictures) -> Iterator[str]:
    for reference, drawn, caption in zip(pictures.reference, pictures.drawn, pictures.captions, strict=True):
        psnr = min(psnr_db(reference, drawn, peak=255), 99.0)
        images = (("FP32", reference), ("bundle", drawn), ("difference", heat_map(reference, drawn)))
        cells = "".join(f'<div><img alt="{name}" src="{png(image)}">{name}</div>' for name, image in images)
        yield f'<figure><div class="trio">{cells}</div><figcaption>{escape(caption)}<br>{psnr:.1f} dB</figcaption></figure>'


def _layers(report: Report) -> Iterator[str]:
    marked = next((check.layer for check in report.failed if check.layer in report.layers), "")
    blocks = {name for name in report.layers if any(other.startswith(f"{name}.") for other in report.layers)}
    kinds = (
        ("layer", [n for n in report.layers if n not in blocks]),
        ("block", [n for n in report.layers if n in blocks]),
    )
    beside = "; the baseline dashed" if report.before else ""
    for kind, names in kinds:
        if names:
            yield f"<h2>Every {kind}'s output beside FP32's</h2>"
            yield f'<p class="soft">Signal-to-noise ratio in dB, in the order the UNet computes them{beside}.</p>'
            yield layers_plot(
                {n: report.layers[n] for n in names}, {n: report.before[n] for n in names if n in report.before}, marked
            )


def _measured(report: Report) -> Iterator[str]:
    if not report.measured:
        return
    rows = []
    for name, values in report.measured.items():
        mean, low, high = float(np.mean(values)), min(values), max(values)
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="n">{len(values)}</td><td class="n">{mean:.4g}</td>'
            f'<td class="n">{low:.4g} to {high:.4g}</td><td>{strip(values)}</td></tr>'
        )
    head = '<tr><th>metric</th><th class="n">values</th><th class="n">mean</th><th class="n">range</th><th></th></tr>'
    yield f'<h2>Measured</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _table(checks: Iterable[Check]) -> str:
    head = '<tr><th></th><th>level</th><th>check</th><th class="n">value</th><th class="n">limit</th><th>why</th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(map(_row, checks))}</table></div>'


def _row(check: Check) -> str:
    interval = f"<br>[{check.interval[0]:.4g}, {check.interval[1]:.4g}]" if check.interval else ""
    why = "" if check.passed else escape(check.reason)
    return (
        f'<tr class="{"ok" if check.passed else "bad"}"><td class="mark">{"✓" if check.passed else "✗"}</td>'
        f'<td>{escape(check.level)}</td><td>{escape(check.name)}</td><td class="n">{check.value:.4g}{interval}</td>'
        f'<td class="n">{check.limit:.4g}</td><td class="why">{why}</td></tr>'
    )
