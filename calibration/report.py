"""The calibration report: one self-contained HTML file with what was measured, what was kept, and why."""

import base64
import html
import io
from collections import Counter
from typing import Any

import numpy as np

from personalq.spec import Spec

from .statistics.evidence import Evidence
from .statistics.ranges import time_bin_gain_db
from .statistics.text_rows import CLASSES

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1d2430}"
    "h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}"
    "td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #dde}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}"
)


def report_html(evidence: Evidence, spec: Spec, *, sensitivity: bool = True) -> str:
    """The page as text. sensitivity: also measure what quantising each layer alone does (the slow part)."""
    rows = evidence.seen.rows
    parts = [
        f"<h1>Calibration of {html.escape(spec.checkpoint)}</h1>",
        f"<p>Policy {html.escape(spec.policy)}, {html.escape(spec.bits)}; {len(evidence.recipe.prompts)} prompts, "
        f"{evidence.recipe.steps} steps, {evidence.seen.samples} UNet samples; seed {evidence.recipe.seed}.</p>",
        "<h2>Kept text rows, and why</h2>",
        _list({name: reason for name, reason in spec.rows.reasons.items()}),
        "<h2>Text rows by class of token</h2>",
        _class_table(rows.by_class()),
        _image(_row_figure(rows.by_class()), "Bars: share of error and of attention by class of token"),
        f"<p>{_time_bins(evidence)}</p>",
        "<h2>Attention mass by layer and time step</h2>",
        _image(_mass_figure(evidence), "Heat map: share of attention by class of token, layer and time step"),
        "<h2>Layers</h2>",
        _list(_widths(spec)),
    ]
    if sensitivity:
        bars = _image(_sensitivity_figure(evidence), "Bars: harm to the noise prediction by layer, the 40 worst")
        parts += ["<h2>Harm of quantising one layer's weight alone</h2>", bars]
    floats = {name: layer.reason for name, layer in spec.layers.items() if layer.weight == "float"}
    parts += ["<h2>Layers that stay float</h2>", _list(floats) if floats else "<p>None.</p>"]
    body = "\n".join(parts)
    title = f"Calibration of {html.escape(spec.checkpoint)}"
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head = f"{meta}<title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def _time_bins(evidence: Evidence) -> str:
    gains = {name: time_bin_gain_db(layer) for name, layer in evidence.seen.layers.items()}
    best = max(gains, key=lambda name: gains[name])
    return (
        f"Scales are shared by all time steps. One scale per time-step bin would lower the 8-bit error of activations by "
        f"{np.median(list(gains.values())):.1f} dB (median layer), most for {html.escape(best)} ({gains[best]:.1f} dB)."
    )


def _list(items: dict[str, str]) -> str:
    return "<ul>" + "".join(f"<li><b>{html.escape(k)}</b>: {html.escape(v)}</li>" for k, v in items.items()) + "</ul>"


def _class_table(numbers: dict[str, dict[str, float]]) -> str:
    titles = ("class", "largest value", "kurtosis", "error at 8 bits", "at 4 bits", "attention")
    head = "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    lines = [
        f"<tr><td>{name}</td><td>{n['absmax']:.2f}</td><td>{n['kurtosis']:.1f}</td><td>{n['error8']:.1e}</td>"
        f"<td>{n['error4']:.1e}</td><td>{n['mass']:.3f}</td></tr>"
        for name, n in numbers.items()
    ]
    return f"<table>{head}{''.join(lines)}</table>"


def _row_figure(numbers: dict[str, dict[str, float]]) -> Any:
    """What storing a row costs, as its share of the row's energy, beside the attention that the class gets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(numbers))
    for offset, (key, label) in enumerate(
        (("error8", "error at 8 bits"), ("error4", "error at 4 bits"), ("mass", "attention"))
    ):
        axis.bar(places + (offset - 1) * 0.27, [n[key] for n in numbers.values()], 0.27, label=label)
    axis.set_xticks(places, list(numbers), fontsize=8)
    axis.set_yscale("log")
    axis.set_ylabel("share")
    axis.legend(fontsize=8)
    return figure


def _widths(spec: Spec) -> dict[str, str]:
    """Layer counts by kind and resulting precision."""
    counted = Counter((layer.op, layer.weight, layer.activation) for layer in spec.layers.values())
    return {
        f"{n} {op}": f"{weight} weights, {activation} activations" for (op, weight, activation), n in counted.items()
    }


def _mass_figure(evidence: Evidence) -> Any:
    from matplotlib.figure import Figure

    mass = evidence.seen.rows.mean_mass()
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, len(CLASSES), sharey=True)
    names = [layer.name.replace(".transformer_blocks.0.attn2", "") for layer in evidence.row_layers]
    for index, (axis, name) in enumerate(zip(axes, CLASSES, strict=True)):
        picture = axis.imshow(mass[:, ::-1, index], vmin=0, vmax=1, aspect="auto", cmap="magma")
        axis.set_title(name, fontsize=9)
        axis.set_xticks([0, mass.shape[1] - 1], ["first\nstep", "last\nstep"], fontsize=7)
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of attention")
    return figure


def _sensitivity_figure(evidence: Evidence) -> Any:
    from matplotlib.figure import Figure

    harm = evidence.sensitivity
    order = sorted(harm, key=lambda name: -harm[name]["int4"].trigger)[:40]
    figure = Figure(figsize=(11, 8), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(order))
    for offset, (width, kind) in enumerate((w, k) for w in ("int8", "int4") for k in ("plain", "trigger")):
        values = [max(getattr(harm[name][width], kind), 1e-12) for name in order]
        axis.barh(places + (offset - 1.5) * 0.2, values, 0.2, label=f"{width}, {kind}")
    axis.set_yticks(places, order, fontsize=6)
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_xlabel("relative squared error of the noise prediction")
    axis.legend()
    return figure


def _image(figure: Any, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"
