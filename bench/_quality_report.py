"""What `bench quality` says of its rows: paired differences with intervals, tables for a terminal and for the docs, plots."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.intervals import bootstrap

METRICS = ("psnr_db", "ssim", "concept", "prompt")
Row = dict[str, Any]


def differences(rows: list[Row], baseline: str = "fp32") -> list[dict[str, Any]]:
    """Paired mean differences, 95 % intervals: every policy with FP32, and `taq` with the others of its bits and budget."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    pairs = [(p, baseline) for p in policies if p != baseline]
    for ours in (p for p in policies if p.startswith("taq-w")):
        width = width_of(ours)
        pairs += [(ours, p) for p in policies if width_of(p) == width and p != ours]
    by = {(row["checkpoint"], row["policy"]): row["pictures"] for row in rows}
    result = []
    for a, b in pairs:
        both = [c for c, p in by if p == a and (c, b) in by]
        for metric in METRICS:
            gaps = [np.subtract(by[c, a][metric], by[c, b][metric]) for c in both]
            groups = np.repeat(both, [len(gap) for gap in gaps])
            result.append({"a": a, "b": b, "metric": metric, **asdict(bootstrap(np.concatenate(gaps), groups))})
    return result


def width_of(policy: str) -> str:
    """'taq-w4a8-rows4@4.5' -> 'w4a8-rows4@4.5'; '' for a reference."""
    found = re.search(r"-(w\da.*)$", policy)
    return found[1] if found else ""


def table(rows: list[Row]) -> Iterator[str]:
    """One line per policy: means over checkpoints."""
    yield f"{'policy':14} {'MB':>6} {'/fp32':>6} {'PSNR dB':>8} {'SSIM':>6} {'concept':>8} {'prompt':>7}"
    for policy in dict.fromkeys(row["policy"] for row in rows):
        chosen = [row for row in rows if row["policy"] == policy]
        size, ratio = (
            float(np.mean([f(row) for row in chosen]))
            for f in (lambda r: r["bytes"] / 1e6, lambda r: r["bytes"] / r["bytes_fp32"])
        )
        means = {metric: float(np.mean([row[metric] for row in chosen])) for metric in METRICS}
        yield (
            f"{policy:14} {size:6.2f} {ratio:6.3f} {means['psnr_db']:8.2f} {means['ssim']:6.3f} "
            f"{means['concept']:8.3f} {means['prompt']:7.3f}"
        )


def markdown(rows: list[Row], found: list[dict[str, Any]]) -> str:
    """One table per width for the docs: means over checkpoints, and what `taq` has over each policy, with 95 % intervals."""
    by = {(d["a"], d["b"], d["metric"]): d for d in found}
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines: list[str] = []
    for width in dict.fromkeys(width_of(policy) for policy in policies if policy != "fp32"):
        lines += [f"**{width.upper()}**, {len({row['checkpoint'] for row in rows})} checkpoints:", ""]
        lines += [
            "| policy | of FP32 | PSNR dB | SSIM | concept | prompt | noise error | `taq` - it: concept | PSNR dB |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for policy in ["fp32", *(p for p in policies if width_of(p) == width)]:
            chosen = [row for row in rows if row["policy"] == policy]
            share = float(np.mean([row["bytes"] / row["bytes_fp32"] for row in chosen]))
            psnr, ssim, concept, prompt = (float(np.mean([row[m] for row in chosen])) for m in METRICS)
            noise = float(np.mean([row["noise_error"] for row in chosen]))
            gaps = [_gap(by.get((f"taq-{width}", policy, m)), n) for m, n in (("concept", 3), ("psnr_db", 1))]
            shown = f"{psnr:.1f}"
            if policy == "fp32":  # its own reference: infinitely near
                shown, gaps[1] = "-", ""
            name = "fp32" if policy == "fp32" else policy.removesuffix(f"-{width}")
            numbers = f"{share:.3f} | {shown} | {ssim:.3f} | {concept:.3f} | {prompt:.3f} | {noise:.4f}"
            lines.append(f"| {name} | {numbers} | {gaps[0]} | {gaps[1]} |")
        lines.append("")
    return "\n".join(lines)


def _gap(found: dict[str, Any] | None, digits: int) -> str:
    if found is None:
        return ""
    low, high = (f"{found[side]:+.{digits}f}" for side in ("low", "high"))
    return f"{found['mean']:+.{digits}f} ({low} to {high})"


def plot(rows: list[Row], metric: str, file: Path) -> None:
    """Quality against bytes, one line a policy through its widths; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != "fp32"):
        chosen = [row for row in rows if row["policy"] == policy]
        at = float(np.mean([row["bytes"] / row["bytes_fp32"] for row in chosen]))
        points.setdefault(policy.removesuffix(f"-{width_of(policy)}"), []).append(
            (at, float(np.mean([row[metric] for row in chosen])))
        )
    for name, where in points.items():
        axes.plot(*zip(*sorted(where), strict=True), marker="o", label=name, lw=2.4 if name == "taq" else 1.1)
    exact = [row[metric] for row in rows if row["policy"] == "fp32"]
    if metric != "psnr_db":
        axes.axhline(float(np.mean(exact)), color="gray", ls=":", label="fp32")
    axes.set_xlabel("UNet on disk, share of FP32")
    axes.set_ylabel({"psnr_db": "PSNR to FP32, dB", "concept": "concept score"}.get(metric, metric))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=110)
