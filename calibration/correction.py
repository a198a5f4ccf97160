"""What one checkpoint needs beside a base's integers: a low-rank part that makes up for their rounding error where it matters.

Of all matrices of rank r, L = U_r U_r^T E has the least ||(E - L) H^(1/2)||: E = W - what the integers stand for, H = sum of
w x x^T over the checkpoint's own inputs x, w the trigger's attention, U_r the leading left singular vectors of E H^(1/2), which
are the leading eigenvectors of E H E^T (LQER, ICML'24, arXiv 2402.02446; QERA, ICLR'25, arXiv 2410.06040).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personalq.errors import SpecError
from personalq.numerics import QTYPES, dequantize, quantize
from personalq.repository import Repository
from personalq.spec import SpecFile, read_spec
from personalq.weights.adapter import Branch

from .gather import CalibrateOptions, Progress, checkpoint_sha256, part_of, quiet, settings_of
from .model.dressing import dressed
from .model.pipeline import load_pipeline, quantisable_layers
from .rounding.gptq import columns
from .statistics.evidence import Evidence, Recipe, pixel_weights, watch_inputs

Array = npt.NDArray[np.float32]


@dataclass
class Errors:
    """One layer's rounding error under inputs x: sums of w e e^T (N, N), e = E x; of w x x^T (K, K) where K is smaller.

    error: E, of the weight's shape.
    """

    module: nn.Module
    error: Tensor
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.by_output = len(self.error) <= self.error[0].numel()
        side = len(self.error) if self.by_output else self.error[0].numel()
        self.total = torch.zeros(side, side)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """x: the layer's input; weights (B,1,h,w): how much each pixel counts."""
        rows = outputs(self.module, self.error, x) if self.by_output else columns(self.module, x)
        share = pixel_weights(weights, rows.shape[0], rows.shape[1])
        flat = rows.reshape(-1, rows.shape[-1])
        self.total += (flat if share is None else flat * share.reshape(-1, 1)).T @ flat

    def branch(self, rank: int) -> Branch:
        """The correction of this rank."""
        return correction_of(self.error, self.total, min(rank, len(self.error), self.error[0].numel()))


def correction(
    repository: Repository,
    base_spec: Path,
    checkpoint_id: str,
    rank: int,
    options: CalibrateOptions,
    progress: Progress = quiet,
    *,
    wanted: Callable[[str], bool] = lambda layer: True,
) -> dict[str, Branch]:
    """Layer -> the part that makes up for the base's rounding error under this checkpoint's own prompts, its delta attached.

    options: samples, steps and seed count here. wanted: which layers may have one; those stored float have none.
    Raises SpecError or RepositoryError.
    """
    file, whole = read_spec(base_spec), repository.whole(checkpoint_id)
    base = repository.whole(file.spec.checkpoint)
    if not base.is_base or whole.is_base or whole.base_dir != base.base_dir:
        raise SpecError(
            f"{base_spec}: must be a spec of the base of {checkpoint_id!r}, got one of {file.spec.checkpoint!r}; "
            "calibrate the base first"
        )
    if file.spec.provenance.checkpoint_sha256 != checkpoint_sha256(base):
        raise SpecError(
            f"{base_spec}: must be of the base's weights, got other weights' spec; calibrate the base again"
        )
    pipe = load_pipeline(repository, base.card)
    modules = {
        name: module
        for name, module in quantisable_layers(pipe.unet).items()
        if file.spec.layers[name].weight != "float" and wanted(name)
    }
    seen = {name: Errors(module, rounding_error(file, name, module.weight)) for name, module in modules.items()}
    recipe = Recipe(
        (part_of(whole, options.samples, options),), options.steps, settings_of(base).guidance, options.seed
    )
    with dressed(pipe, whole):
        watch_inputs(Evidence(pipe, recipe, progress), modules, lambda name, x, w: seen[name].add(x, w))
    return {name: errors.branch(rank) for name, errors in seen.items()}


def rounding_error(file: SpecFile, name: str, weight: Tensor) -> Tensor:
    """W - what the spec's integers stand for, float32, of the weight's shape."""
    exact = weight.detach().numpy().astype(np.float32)
    return torch.from_numpy(exact - stands_for(file, name, exact))


def stands_for(file: SpecFile, name: str, weight: Array) -> Array:
    """What an engine of this spec multiplies the layer's input by: integers x scales, balance and low-rank part undone."""
    layer, tensors = file.spec.layers[name], file.tensors
    qtype, scale = QTYPES[layer.weight], tensors[f"{name}.weight_scale"]
    stored = tensors.get(f"{name}.weight_q")
    if scale.ndim == 2:
        assert stored is not None, "blocks are always stored"
        made: Array = stored.astype(np.float32) * np.repeat(scale, stored.shape[1] // scale.shape[1], 1)
    else:
        made = dequantize(quantize(weight, scale, qtype, 0) if stored is None else stored, scale, 0)
    if layer.balanced:
        made = made / tensors[f"{name}.input_balance"].reshape(1, -1, *([1] * (weight.ndim - 2)))
    if layer.low_rank:
        down, up = (tensors[f"{name}.low_rank_{part}"].astype(np.float32) for part in ("down", "up"))
        made = made + (down @ up).T
    return made


def outputs(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer computes with this weight and no bias: (B, pixels or tokens, N)."""
    if isinstance(module, nn.Conv2d):
        made = nn.functional.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)
        return made.flatten(2).transpose(1, 2)
    return nn.functional.linear(x, weight).reshape(x.shape[0], -1, len(weight))


def correction_of(error: Tensor, total: Tensor, rank: int) -> Branch:
    """U_r U_r^T E as two narrow matrices of equal size. total: E H E^T (N, N), or H (K, K) where K is smaller than N."""
    flat = error.reshape(len(error), -1)
    leading = leading_outputs(flat, total, rank)
    down = leading.T @ flat
    balance = (
        down.norm(dim=1).clamp(min=1e-12) / leading.norm(dim=0).clamp(min=1e-12)
    ).sqrt()  # float16 has few small values
    up, down = (leading * balance).half().numpy(), (down / balance[:, None]).half().numpy()
    if error.ndim == 2:
        return Branch(np.ascontiguousarray(down.T), np.ascontiguousarray(up.T))
    return Branch(down.reshape(rank, *error.shape[1:]), up)


def leading_outputs(flat: Tensor, total: Tensor, rank: int) -> Tensor:
    """(N, r): the leading left singular vectors of E H^(1/2)."""
    if len(total) == len(flat) and len(flat) <= flat.shape[1]:
        return torch.linalg.eigh(total.double())[1][:, -rank:].flip(1).float()
    values, vectors = torch.linalg.eigh(total.double())
    moved = flat.double() @ (
        vectors * values.clamp(min=0).sqrt()
    )  # E H^(1/2), turned: its left singular vectors are the same
    right = torch.linalg.eigh(moved.T @ moved)[1][:, -rank:].flip(1)
    return torch.linalg.qr(moved @ right)[0].float()
