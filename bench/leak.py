"""Where in the text rows is the concept? Rows of a prompt with its trigger, put class by class into the prompt without.

    python -m bench.leak [--out FILE.json]

Every evaluation prompt is encoded twice: with the trigger, and with a plain word in each of the trigger's places. The
UNet (FP32) then gets the rows of the plain prompt, except those of one class of tokens (or of all but one), which come
from the prompt with the trigger. *Share*: concept score gained, over what all rows together gain. In a causal encoder rows
before the trigger are the same in both; every row after it may carry the concept too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from bench._patched import Patch, Patched, exact_pipeline, over_checkpoints, pooled
from personalq.repository.atomic import write_atomic

PLAIN = "a"  # the word in the trigger's places
CLASSES = ("trigger", "class_noun", "after", "eos", "pad")
SETS: dict[str, tuple[str, ...]] = {
    "none": (),
    **{name: (name,) for name in CLASSES},
    "all but trigger": tuple(name for name in CLASSES if name != "trigger"),
    "all": CLASSES,
}


def without_trigger(ids: npt.NDArray[np.int64], classes: Sequence[str], plain: int) -> npt.NDArray[np.int64]:
    """ids (77,) with `plain` at every position of class 'trigger'."""
    return np.where(np.array(classes) == "trigger", plain, ids)


def mixing(pipeline: Patched, plain: int, moved: tuple[str, ...], nouns: Sequence[Sequence[int]]) -> Patch:
    """Rows of the plain prompt, but those of the classes `moved`, which are the prompt's own."""
    from calibration.statistics.text_rows import row_classes

    manifest, tokenizer = pipeline.manifest, pipeline.tokenizer
    triggers = [tokenizer.token_ids(group) for group in manifest.checkpoint.trigger]

    def patch(prompt: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        ids = tokenizer.encode(prompt).ids
        classes = row_classes(ids.tolist(), triggers, nouns, manifest.text.eos_id)
        if "trigger" not in classes:
            raise click.ClickException(f"{manifest.checkpoint.id}: {prompt!r} must hold the trigger, got none")
        other = without_trigger(ids, classes, plain)
        bare = pipeline.rows_of_ids(other, embeds=pipeline.engine.encode(other[None], None)).conditioning["rows"]
        return np.where(np.isin(classes, moved)[None, :, None], rows, bare)

    return patch


def measure(repo: Path, checkpoint_id: str, prompts: int, seeds: int) -> list[dict[str, Any]]:
    """One row per set of moved classes: per-picture concept scores."""
    from gallery.concepts import evaluation_prompts, reference_images
    from gallery.judge import Judge
    from personalq.repository import Repository

    repository = Repository.open(repo)
    pipeline, judge = exact_pipeline(repository, checkpoint_id), Judge.load()
    card, tokenizer = repository.card(checkpoint_id), pipeline.tokenizer
    nouns = [tokenizer.token_ids(card.class_noun)] if card.class_noun else []
    (plain,) = tokenizer.token_ids(PLAIN)
    references, wanted = reference_images(checkpoint_id, 32, 900), evaluation_prompts(checkpoint_id)[:prompts]
    found = []
    for name, moved in SETS.items():
        images = pipeline.pictures(wanted, seeds, mixing(pipeline, plain, moved, nouns))
        scores = judge.concept_score(images, references).tolist()
        found.append({"checkpoint": checkpoint_id, "kind": card.kind, "moved": name, "concept": scores})
    return found


def shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per set: mean concept score, and its share of what all rows gain, each with a 95 % interval over checkpoints."""
    by = {(row["checkpoint"], row["moved"]): row["concept"] for row in rows}
    ids = list(dict.fromkeys(c for c, _ in by))
    means = {name: np.array([np.mean(by[c, name]) for c in ids]) for name in SETS}
    whole = means["all"] - means["none"]
    draws = np.random.default_rng(0).integers(len(ids), size=(4000, len(ids)))
    told = []
    for name in SETS:
        score = pooled((row for row in rows if row["moved"] == name), "concept")
        part = means[name] - means["none"]  # a ratio of means: some checkpoints show their concept without a trigger
        low, high = np.quantile(part[draws].mean(1) / whole[draws].mean(1), [0.025, 0.975])
        share = {"mean": float(part.mean() / whole.mean()), "low": float(low), "high": float(high)}
        told.append({"moved": name, "concept": asdict(score), "share": share})
    return told


@click.command()
@click.option(
    "--repo", type=click.Path(path_type=Path, exists=True), default=Path("gallery/repository"), show_default=True
)
@click.option("--checkpoints", default="", help="comma list of ids (default: all with weights)")
@click.option("--prompts", default=8, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--jobs", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="also write the JSON here")
def main(repo: Path, checkpoints: str, prompts: int, seeds: int, jobs: int, out: Path | None) -> None:
    """Measure how far the concept leaks past the trigger's rows; a table, then one JSON object as the last line."""
    rows = list(over_checkpoints(measure, repo, checkpoints, jobs, prompts, seeds))
    told = shares(rows)
    click.echo("| rows with the trigger | concept score | share of the gain |\n|---|---|---|")
    for each in told:
        score, share = each["concept"], each["share"]
        click.echo(
            f"| {each['moved']} | {score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f}) | "
            f"{share['mean']:.2f} ({share['low']:.2f} to {share['high']:.2f}) |"
        )
    summary = {"bench": "leak", "prompts": prompts, "seeds": seeds, "shares": told, "rows": rows}
    if out:
        write_atomic(out, (json.dumps(summary) + "\n").encode())
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
