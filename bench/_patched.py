"""Pipelines whose text rows are changed on their way to the UNet, and what the gallery's judges say of their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.intervals import Interval, bootstrap
from bench.quality import LARGEST_DB, export
from personalq.numerics import psnr_db
from runtime.drawing.pipeline import Picture, Pipeline
from runtime.drawing.prompter import PromptRows
from runtime.engines.engine import Engine
from runtime.engines.ort import OrtEngine

Rows = npt.NDArray[np.float32]
Patch = Callable[[str, Rows], Rows]


class Patched(Pipeline):
    """A pipeline over an FP32 bundle. patch: (prompt, rows (1,77,R)) -> the rows the UNet gets; '' is never patched."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, cached_prompts=64)
        self.patch: Patch | None = None

    def rows(self, prompt: str) -> PromptRows:
        found = super().rows(prompt)
        if self.patch is None or prompt == "":
            return found
        changed = self.patch(prompt, found.conditioning["rows"])
        return replace(found, conditioning={**found.conditioning, "rows": changed})

    def pictures(self, prompts: list[str], seeds: int, patch: Patch | None = None) -> npt.NDArray[np.uint8]:
        """(prompts x seeds, H, W, 3), the seeds of a prompt side by side, with these rows patched."""
        self.patch = patch
        *_, last = self.denoise([Picture(prompt, seed=seed) for prompt in prompts for seed in range(seeds)])
        return np.stack([self.decode(latents) for latents in last.latents])


def exact_pipeline(repository: Any, checkpoint_id: str) -> Patched:
    """The checkpoint unquantised, one thread."""
    return Patched(OrtEngine(export(repository, checkpoint_id, "fp32")["bundle"], threads=1))


def nearness(reference: npt.NDArray[np.uint8], images: npt.NDArray[np.uint8]) -> list[float]:
    """PSNR in dB of each picture to its reference; equal pictures count as LARGEST_DB."""
    return [min(psnr_db(a, b, peak=255), LARGEST_DB) for a, b in zip(reference, images, strict=True)]


def over_checkpoints(
    measure: Callable[..., list[dict[str, Any]]], repo: Path, wanted: str, jobs: int, *arguments: Any
) -> Iterator[dict[str, Any]]:
    """Rows of `measure(repo, id, *arguments)` for the ids (a comma list; '': all with weights), over processes."""
    from personalq.repository import Repository

    repository = Repository.open(repo)
    ids = wanted.split(",") if wanted else [c.id for c in repository.cards() if repository.has_weights(c.id)]
    exact_pipeline(repository, ids[0])  # the family is traced once, before the workers start
    with ProcessPoolExecutor(jobs) as pool:
        for running in [pool.submit(measure, repo, checkpoint_id, *arguments) for checkpoint_id in ids]:
            yield from running.result()


def pooled(rows: Iterable[dict[str, Any]], metric: str) -> Interval:
    """Mean of a per-picture metric over the rows of several checkpoints, with its cluster-bootstrap interval."""
    chosen = list(rows)
    groups = np.repeat([row["checkpoint"] for row in chosen], [len(row[metric]) for row in chosen])
    return bootstrap(np.concatenate([row[metric] for row in chosen]), groups)
