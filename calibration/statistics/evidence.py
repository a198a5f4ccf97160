"""Everything calibration learns from running one checkpoint; each part is computed when a policy first asks for it.

A base is run as it is, and as each of its checkpoints makes it: the parts of a recipe. Ranges, rows and second moments are
over all of them. What is decided, and what sensitivity and tuning compare with, are the weights that are loaded: a base's own,
at the states that its checkpoints cause.

One pass over the seeded prompts (all steps, both halves of guidance) gives ranges, text rows, attention mass and the
points for sensitivity. Hessians take a second pass. Nothing here depends on a policy, so policies share it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personalq.numerics import INT4, INT8
from personalq.rows import RowLayer, find_sequence, pack_layers

from ..model.conditioning import Pipe, encode, heard
from ..model.pipeline import cross_attention, packed_rows, quantisable_layers
from ..model.reference import start_noise
from ..rounding.gptq import Hessian, columns
from .attention import TriggerMap, watching_attention
from .ranges import N_TIME_BINS, LayerRanges, Observer, time_bin
from .saved import load_observation, save_observation, statistics_key
from .sensitivity import Harm, Points, layer_sensitivity
from .text_rows import RowStatistics, row_classes

HESSIAN_EVERY = 4  # every 4th step is enough for the second moments of the inputs
LARGEST_HESSIAN = 4096  # columns; wider layers (none in the gallery) are rounded to nearest, with that reason
N_POINTS = 8
N_LESSONS = 200
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Part:
    """Prompts with the ids that matter in them. checkpoint: whose they are, '' for what is loaded; sha256: its weights'."""

    prompts: tuple[str, ...]
    trigger: tuple[tuple[int, ...], ...] = ()
    class_noun: tuple[tuple[int, ...], ...] = ()
    checkpoint: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Recipe:
    """How the model was run: its parts, steps, guidance, seed."""

    parts: tuple[Part, ...]
    steps: int
    guidance: float
    seed: int

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(prompt for part in self.parts for prompt in part.prompts)


@dataclass
class Observation:
    """What one pass saw."""

    layers: dict[str, LayerRanges]
    rows: RowStatistics
    points: Points
    samples: int


@dataclass
class Evidence:
    """pipe: the FP32 pipeline with the delta loaded; the parts below are computed once.

    dress: puts a part's checkpoint on the pipe while it runs. saved: where an observation is kept between runs.
    checkpoint_sha256: of the weights that are loaded.
    decided: a cache of the decisions made from it so far (calibration.decide).
    """

    pipe: Pipe
    recipe: Recipe
    progress: Progress = field(default=lambda text, done: None)
    dress: Callable[[str], AbstractContextManager[Any]] = lambda checkpoint: nullcontext()
    saved: Path | None = None
    checkpoint_sha256: str = ""
    decided: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Hash of everything an observation depends on."""
        return statistics_key(self.checkpoint_sha256, self.recipe)

    @cached_property
    def row_layers(self) -> list[RowLayer]:
        return pack_layers([(name, layer.to_k.out_features) for name, layer in cross_attention(self.pipe.unet)])

    @cached_property
    def seen(self) -> Observation:
        """Ranges, rows, attention mass and sensitivity points, from one pass over all prompts and steps."""
        unet, watcher = self.pipe.unet, Watcher(self)
        found = load_observation(self.saved, self.key, unet, watcher.rows) if self.saved else None
        if found is not None:
            layers, points, samples = found
            return Observation(layers, watcher.rows, points, samples)
        observer = Observer(unet)
        with observer.watching(), watcher.watching():
            self._denoise(watcher.start)
        points = watcher.points()
        if self.saved:
            save_observation(self.saved, self.key, observer.layers, watcher.rows, points, observer.samples)
        return Observation(observer.layers, watcher.rows, points, observer.samples)

    @cached_property
    def sensitivity(self) -> dict[str, dict[str, Harm]]:
        """layer -> 'int8' | 'int4' -> harm to the noise prediction when its weight alone is quantised."""
        points = self.seen.points
        return layer_sensitivity(
            self.pipe.unet, points, (INT8, INT4), lambda done: self.progress("measuring sensitivity", done)
        )

    @cached_property
    def lessons(self) -> Points:
        """Training pairs for tuning: (unconditional, conditional) at N_LESSONS steps, spread over prompts and steps."""
        watcher = Watcher(self, N_LESSONS, pairs=True)
        with watcher.watching():
            self._denoise(watcher.start)
        return watcher.points()

    @cached_property
    def hessians(self) -> dict[str, dict[str, Hessian]]:
        """'plain' and 'trigger' (pixels weighted by where the trigger attends) -> layer -> X^T X."""
        return collect_hessians(self)

    def _denoise(self, start: Callable[[Part, str], None]) -> None:
        index, total = 0, len(self.recipe.prompts)
        for part in self.recipe.parts:
            with self.dress(part.checkpoint) if part.checkpoint else nullcontext(), torch.no_grad():
                for prompt in part.prompts:
                    self.progress("collecting statistics", index / total)
                    start(part, prompt)
                    self._draw(prompt, index)
                    index += 1

    def _draw(self, prompt: str, index: int) -> None:
        recipe = self.recipe
        noise = torch.from_numpy(start_noise(self.pipe, recipe.seed * 1000 + 100 + index))[None]
        self.pipe(
            prompt,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            latents=noise,
            output_type="latent",
        )


class Watcher:
    """Follows one pass: which prompt and step it is, the trigger's attention, and a few inputs kept as points.

    pairs: keep both halves of guidance (unconditional first), not the conditional one alone.
    """

    def __init__(self, evidence: Evidence, n_points: int = N_POINTS, *, pairs: bool = False):
        self.evidence, self.bin, self.calls, self.pairs = evidence, 0, 0, pairs
        self.rows = RowStatistics(evidence.row_layers, N_TIME_BINS)
        side = evidence.pipe.unet.config.sample_size
        self.map, self.kept = TriggerMap(side), []
        self.weights: Tensor | None = None
        self.part: Part | None = None
        total = len(evidence.recipe.prompts) * evidence.recipe.steps
        self.wanted = set(np.linspace(0, total - 1, n_points).astype(int).tolist())

    def start(self, part: Part, prompt: str) -> None:
        """Start a prompt: record its rows and the classes of its tokens."""
        pipe = self.evidence.pipe
        if part is not self.part and self.weights is not None:
            self.weights = torch.ones_like(self.weights)  # another checkpoint's trigger weighs nothing here
        self.part = part
        ids, told = encode(pipe, ["", prompt])
        eos = pipe.tokenizer.eos_token_id
        self.classes = [row_classes(row.tolist(), part.trigger, part.class_noun, eos) for row in ids]
        self.columns = [[i for s in part.trigger for i in find_sequence(row.tolist(), s)] for row in ids]
        rows = packed_rows(pipe.unet, told.text).numpy()
        self.rows.add_rows(rows[1], self.classes[1])

    @contextmanager
    def watching(self) -> Iterator[None]:
        unet = self.evidence.pipe.unet
        handles = [
            unet.register_forward_pre_hook(self._before, with_kwargs=True),
            unet.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            with watching_attention(unet, self._note):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bin = time_bin(float(torch.as_tensor(args[1]).flatten()[0]))

    def _note(self, layer: int, probabilities: Tensor) -> None:
        mass = probabilities.mean(dim=(1, 2)).numpy()
        self.rows.add_mass(layer, self.bin, mass[-1], self.classes[-1])
        self.map.add(probabilities, self.columns[-probabilities.shape[0] :])

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        self.weights = self.map.take()
        if self.calls in self.wanted:
            kept = slice(None) if self.pairs else slice(-1, None)
            sample, told = args[0][kept].clone(), [value.clone() for value in heard(kwargs).at(kept)]
            timestep = torch.as_tensor(args[1]).flatten()[:1].float().expand(len(sample))
            self.kept.append((sample, timestep, *told, self.weights[kept].clone()))
        self.calls += 1

    def has_turn(self) -> bool:
        """Whether this is an HESSIAN_EVERY-th step; not the same steps of every prompt, however many steps it has."""
        steps = self.evidence.recipe.steps
        shift = self.calls // steps if steps % HESSIAN_EVERY == 0 else 0
        return (self.calls + shift) % HESSIAN_EVERY == 0

    def points(self) -> Points:
        return Points(*(torch.cat(parts) for parts in zip(*self.kept, strict=True)))


def collect_hessians(evidence: Evidence) -> dict[str, dict[str, Hessian]]:
    """A second pass: inputs' second moments of every layer, plain and weighted by the trigger's attention of the last step."""
    modules = {
        name: module
        for name, module in quantisable_layers(evidence.pipe.unet).items()
        if module.weight[0].numel() <= LARGEST_HESSIAN
    }
    result = {kind: {name: Hessian.empty(m) for name, m in modules.items()} for kind in ("plain", "trigger")}

    def note(name: str, x: Tensor, weights: Tensor) -> None:
        matrix = columns(modules[name], x)
        result["plain"][name].add(matrix, None)
        result["trigger"][name].add(matrix, pixel_weights(weights, matrix.shape[0], matrix.shape[1]))

    watch_inputs(evidence, modules, note)
    return result


def watch_inputs(
    evidence: Evidence, modules: Mapping[str, nn.Module], note: Callable[[str, Tensor, Tensor], None]
) -> None:
    """Run all prompts; at every HESSIAN_EVERY-th step note(layer, its input, the trigger's weights (B,1,h,w)).

    The weights of a step come from the step before it (attention changes slowly), so that one forward pass is enough.
    """
    watcher = Watcher(evidence)

    def hook(name: str) -> Callable[..., None]:
        def noted(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            if watcher.has_turn() and watcher.weights is not None:
                note(name, args[0], watcher.weights)

        return noted

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with watcher.watching():
            evidence._denoise(watcher.start)
    finally:
        for handle in handles:
            handle.remove()


def pixel_weights(weights: Tensor, batch: int, n_pixels: int) -> Tensor | None:
    """(B,1,h,w) trigger weights -> (batch, n_pixels) at the layer's resolution; None for layers without pixels."""
    side = int(n_pixels**0.5)
    if side * side != n_pixels or n_pixels == 1 or weights.shape[0] != batch:
        return None
    return nn.functional.interpolate(weights, size=(side, side), mode="area").flatten(1)
