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

from bench.intervals import bootstrap
from bench.quality import LARGEST_DB, export
from personalq.bundle import Manifest
from personalq.numerics import QType, absmax_scale, fake_quantize, psnr_db
from personalq.rows import KeptTokens, kept_positions

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


def measure(repository: Any, checkpoint_id: str, qtype: QType, prompts: int, seeds: int) -> Iterator[dict[str, Any]]:
    """One row per (kept, part): per-picture PSNR against exact rows, and concept score."""
    from gallery.concepts import evaluation_prompts, reference_images
    from gallery.judge import Judge
    from runtime.engine import OrtEngine
    from runtime.pipeline import Picture, Pipeline, PromptRows

    bundle, judge = export(repository, checkpoint_id, "fp32")["bundle"], Judge.load()
    pipeline = Pipeline(OrtEngine(bundle, threads=1))
    manifest, tokenizer = pipeline.engine.manifest, pipeline.tokenizer
    trigger = tuple(tokenizer.token_ids(group) for group in manifest.checkpoint.trigger)
    references, wanted = reference_images(checkpoint_id, 32, 900), evaluation_prompts(checkpoint_id)[:prompts]
    exact_rows = pipeline.rows

    def pictures(kept: KeptTokens | None, parts: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        def rows(prompt: str) -> PromptRows:
            found = exact_rows(prompt)
            if kept is None:
                return found
            positions = kept_positions(tokenizer.encode(prompt).ids, kept, manifest.text.eos_id)
            worse = degraded(found.conditioning["rows"], manifest, positions, parts, qtype)
            return PromptRows({"rows": worse}, positions, found.text_embeds)

        pipeline.rows = rows  # type: ignore[method-assign]
        *_, last = pipeline.denoise([Picture(prompt, seed=seed) for prompt in wanted for seed in range(seeds)])
        return np.stack([pipeline.decode(latents) for latents in last.latents])

    reference = pictures(None, ())
    for name, kept in choices(trigger).items():
        for part, parts in PARTS.items():
            images = pictures(kept, parts)
            psnr = [min(psnr_db(a, b, peak=255), LARGEST_DB) for a, b in zip(reference, images, strict=True)]
            concept = judge.concept_score(images, references).tolist()
            yield {"checkpoint": checkpoint_id, "kept": name, "part": part, "psnr_db": psnr, "concept": concept}


@click.command()
@click.option(
    "--repo", type=click.Path(path_type=Path, exists=True), default=Path("gallery/repository"), show_default=True
)
@click.option("--bits", default=4, show_default=True, type=click.IntRange(2, 8))
@click.option("--checkpoints", default="", help="comma list of ids (default: all with weights)")
@click.option("--prompts", default=4, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(repo: Path, bits: int, checkpoints: str, prompts: int, seeds: int, out: Path | None) -> None:
    """Measure the ablation; a table, then one JSON object as the last line."""
    from personalq.repository import Repository

    repository = Repository.open(repo)
    wanted = (
        checkpoints.split(",") if checkpoints else [c.id for c in repository.cards() if repository.has_weights(c.id)]
    )
    rows: list[dict[str, Any]] = []
    for checkpoint_id in wanted:
        rows += measure(repository, checkpoint_id, QType(f"int{bits}", bits), prompts, seeds)
        click.echo(f"{checkpoint_id} done", err=True)
    click.echo(f"{'kept':14} " + " ".join(f"{part + ' PSNR dB (95 %)':>24}" for part in PARTS))
    for name in dict.fromkeys(row["kept"] for row in rows):
        cells = []
        for part in PARTS:
            chosen = [row for row in rows if row["kept"] == name and row["part"] == part]
            values = np.concatenate([row["psnr_db"] for row in chosen])
            found = bootstrap(
                values, np.repeat([row["checkpoint"] for row in chosen], [len(row["psnr_db"]) for row in chosen])
            )
            cells.append(f"{found.mean:8.2f} [{found.low:.2f}, {found.high:.2f}]".rjust(24))
            rows[rows.index(chosen[0])]["interval"] = asdict(found)
        click.echo(f"{name:14} " + " ".join(cells))
    summary = {"bench": "rows", "bits": bits, "prompts": prompts, "seeds": seeds, "rows": rows}
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
