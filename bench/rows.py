"""Which text rows matter? Rows of the prompt quantised to few bits, all but a chosen few, in K, V or both; UNet in FP32.

    python -m bench.rows [--bits 4] [--out FILE.json]

The ablation {none, BOS, random, trigger, trigger+BOS, trigger+EOS, all} x {K, V, K+V}: with everything else exact, the
only harm is that of the rows, so what one kept row saves can be seen. Same arithmetic as the exported row encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from bench._patched import Patch, exact_pipeline, nearness, over_checkpoints, pooled
from personalq.bundle import Manifest
from personalq.numerics import QType, absmax_scale, fake_quantize
from personalq.repository.atomic import write_atomic
from personalq.rows import KeptTokens, kept_positions
from personalq.tokens import Tokenizer

PARTS = {"K": (0,), "V": (1,), "K+V": (0, 1)}


def choices(trigger: tuple[tuple[int, ...], ...]) -> dict[str, KeptTokens]:
    """Name -> which tokens stay exact. 'random' keeps as many rows as 'trigger+BOS'."""
    return {
        "none": KeptTokens(),
        "BOS": KeptTokens(bos=True),
        "random": KeptTokens(trigger=trigger, bos=True, random_seed=0),
        "trigger": KeptTokens(trigger=trigger),
        "trigger+BOS": KeptTokens(trigger=trigger, bos=True),
        "trigger+EOS": KeptTokens(trigger=trigger, eos=True),
        "all": KeptTokens(slots=77, everything=True),
    }


def degraded(
    rows: npt.NDArray[Any], manifest: Manifest, kept: tuple[int, ...], parts: tuple[int, ...], qtype: QType
) -> npt.NDArray[Any]:
    """rows (1,77,R) with every row but `kept` quantised (one scale per token and layer) in K (0) and/or V (1)."""
    result = rows.copy()
    exposed = np.array([i for i in range(rows.shape[1]) if i not in kept], int)
    if not exposed.size:
        return result
    for layer in manifest.rows.layers:
        for part in parts:
            start = layer.offset + part * layer.width
            values = rows[0, exposed, start : start + layer.width]
            scale = absmax_scale(values, qtype, 0, where=layer.name)
            result[0, exposed, start : start + layer.width] = fake_quantize(values, scale, qtype, 0)
    return result


def degrading(
    tokenizer: Tokenizer, manifest: Manifest, kept: KeptTokens, parts: tuple[int, ...], qtype: QType
) -> Patch:
    """`degraded`, where the kept positions are those of the prompt."""

    def patch(prompt: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        positions = kept_positions(tokenizer.encode(prompt).ids, kept, manifest.text.eos_id)
        return degraded(rows, manifest, positions, parts, qtype)

    return patch


def measure(repo: Path, checkpoint_id: str, bits: int, prompts: int, seeds: int) -> list[dict[str, Any]]:
    """One row per (kept, part): per-picture PSNR against exact rows, and concept score."""
    from gallery.concepts import evaluation_prompts, reference_images
    from gallery.judge import Judge
    from personalq.repository import Repository

    pipeline, judge = exact_pipeline(Repository.open(repo), checkpoint_id), Judge.load()
    manifest, tokenizer, qtype = pipeline.manifest, pipeline.tokenizer, QType(f"int{bits}", bits)
    trigger = tuple(tokenizer.token_ids(group) for group in manifest.checkpoint.trigger)
    references, wanted = reference_images(checkpoint_id, 32, 900), evaluation_prompts(checkpoint_id)[:prompts]
    reference = pipeline.pictures(wanted, seeds)
    found = []
    for name, kept in choices(trigger).items():
        for part, parts in PARTS.items():
            if name == "all" and part != "K+V":
                continue  # nothing is quantised: the same pictures
            images = pipeline.pictures(wanted, seeds, degrading(tokenizer, manifest, kept, parts, qtype))
            numbers = {
                "psnr_db": nearness(reference, images),
                "concept": judge.concept_score(images, references).tolist(),
            }
            found.append({"checkpoint": checkpoint_id, "kept": name, "part": part, **numbers})
    return found


def table(rows: list[dict[str, Any]], metric: str, digits: int) -> Iterator[str]:
    """One Markdown line per choice of kept rows: means with 95 % intervals for K, V and K+V."""
    yield f"| kept | {' | '.join(PARTS)} |"
    yield "|---|---|---|---|"
    for name in dict.fromkeys(row["kept"] for row in rows):
        cells = []
        for part in PARTS:
            chosen = [row for row in rows if row["kept"] == name and row["part"] == part]
            found = pooled(chosen, metric) if chosen else None
            told = (
                "" if found is None else f"{found.mean:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"
            )
            cells.append(told)
        yield f"| {name} | {' | '.join(cells)} |"


def gains(rows: list[dict[str, Any]], part: str = "K+V") -> list[dict[str, Any]]:
    """What each choice of kept rows gains over none and over as many random rows: paired differences with intervals."""
    by = {(row["checkpoint"], row["kept"]): row for row in rows if row["part"] == part}
    ids = list(dict.fromkeys(c for c, _ in by))
    result = []
    for name in dict.fromkeys(kept for _, kept in by):
        for other in ("none", "random", "BOS"):
            for metric in ("psnr_db", "concept"):
                gaps = [
                    {"checkpoint": c, "gap": np.subtract(by[c, name][metric], by[c, other][metric]).tolist()}
                    for c in ids
                ]
                if name != other:
                    result.append({"a": name, "b": other, "metric": metric, **asdict(pooled(gaps, "gap"))})
    return result


@click.command()
@click.option(
    "--repo", type=click.Path(path_type=Path, exists=True), default=Path("gallery/repository"), show_default=True
)
@click.option("--bits", default=4, show_default=True, type=click.IntRange(2, 8))
@click.option("--checkpoints", default="", help="comma list of ids (default: all with weights)")
@click.option("--prompts", default=8, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--jobs", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="also write the JSON here")
def main(repo: Path, bits: int, checkpoints: str, prompts: int, seeds: int, jobs: int, out: Path | None) -> None:
    """Measure the ablation; tables, then one JSON object as the last line."""
    rows = list(over_checkpoints(measure, repo, checkpoints, jobs, bits, prompts, seeds))
    for metric, digits, title in (("psnr_db", 1, "PSNR dB to exact rows"), ("concept", 3, "concept score")):
        click.echo("\n".join([f"{title}:", *table(rows, metric, digits), ""]))
    summary = {"bench": "rows", "bits": bits, "prompts": prompts, "seeds": seeds, "rows": rows, "gains": gains(rows)}
    if out:
        write_atomic(out, (json.dumps(summary) + "\n").encode())
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
