"""Write the tables of scores.json and training.json into docs/gallery.md, between its markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .record import HERE, write_text

PAGE = HERE.parent / "docs" / "gallery.md"


def share(cell: Mapping[str, Any], key: str) -> str:
    """`0.94 (0.90-0.97)`."""
    low, high = cell["interval"]
    return f"{cell[key]:.3f} ({low:.3f}-{high:.3f})"


def base_table(scores: Mapping[str, Any]) -> str:
    """Shares of held-out captions the base gets right."""
    rows = [
        f"| {name.replace('_', ' ')} | {share(cell, 'share')} | {cell['n']} |"
        for name, cell in scores["base"].items()
        if "share" in cell
    ]
    return "\n".join(["| facet named by the caption | judged right (95 % interval) | n |", "|---|---|---|", *rows])


def concept_table(scores: Mapping[str, Any]) -> str:
    """A row per checkpoint."""
    lines = [
        "| checkpoint | kind | trigger | concept score | real renders | ratio | best sibling | prompt score | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in scores["concepts"].items():
        rival = max((s["mean"] for s in row["siblings"].values()), default=None)
        lines.append(
            f"| {name} | {row['kind'].replace('_', ' ')} | `{row['trigger']}` | {share(row['concept'], 'mean')} "
            f"| {row['real']['mean']:.3f} | {row['ratio']:.2f} | {'-' if rival is None else f'{rival:.3f}'} "
            f"| {row['prompt']['mean']:.3f} | {row['concept']['n']} |"
        )
    return "\n".join(lines)


def judge_table(scores: Mapping[str, Any]) -> str:
    """Accuracy of the judges on fresh renders, and on the same after the VAE."""
    cells, identity = scores["judges"]["classifier"], scores["judges"]["identity"]
    heads = [k.removesuffix("_renders") for k in cells if k.endswith("_renders")]
    rows = [f"| {h} | {cells[f'{h}_renders']:.3f} | {cells[f'{h}_through_vae']:.3f} | {cells['n']} |" for h in heads]
    last = (
        f"| identity, among {identity['distractors']} distractors | {identity['retrieval']:.3f} | | {identity['n']} |"
    )
    return "\n".join(["| judge | fresh renders | the same through the VAE | n |", "|---|---|---|---|", *rows, last])


def cost_table(log: Mapping[str, Any]) -> str:
    """Seconds of every stage."""
    lines = [
        f"Machine: {log['machine']}, torch {log['torch']}.",
        "",
        "| stage | seconds | steps | notes |",
        "|---|---|---|---|",
    ]
    for stage, facts in log["stages"].items():
        notes = [f"{k} {facts[k]}" for k in ("samples", "pictures", "render_seconds", "final_loss") if k in facts]
        lines.append(f"| {stage} | {facts['seconds']} | {facts.get('steps', '')} | {', '.join(notes)} |")
    return "\n".join(lines)


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with every `<!-- name -->` ... `<!-- /name -->` block replaced."""
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, page, flags=re.S)
    return page


def main(page: Path = PAGE) -> None:
    """Fill the page."""
    scores, log = (json.loads((HERE / name).read_text()) for name in ("scores.json", "training.json"))
    tables = {
        "base": base_table(scores),
        "concepts": concept_table(scores),
        "judges": judge_table(scores),
        "costs": cost_table(log),
    }
    write_text(page, filled(page.read_text(encoding="utf-8"), tables))


if __name__ == "__main__":
    main()
