"""Error-compensating rounding: GPTQ (Frantar et al., ICLR'23, arXiv 2210.17323, algorithm 1) for Linear and Conv2d.

Columns are rounded one by one; the error of each is spread over the columns not yet rounded through the inverse Hessian
of the layer's inputs, H = 2 X^T X. Samples may be weighted (X^T diag(w) X): TAQ weights pixels by where the trigger attends.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personalq.numerics import QType

Array = npt.NDArray[np.float32]
DAMPING = 0.01  # of the mean diagonal, as the paper


def columns(module: nn.Module, x: Tensor) -> Tensor:
    """The layer's input as a matrix with one column per column of its weight: (B, pixels or tokens, K)."""
    if isinstance(module, nn.Conv2d):
        unfolded = nn.functional.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
        return unfolded.transpose(1, 2)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Scales (O,) or (O, blocks) as a factor of a weight of `shape`: (O, 1, ...) or (O, K)."""
    if scale.ndim == 2:
        return scale.repeat_interleave(shape[1] // scale.shape[1], 1)
    return scale.reshape(-1, *([1] * (len(shape) - 1)))


@dataclass
class Hessian:
    """X^T diag(w) X of one layer, summed over samples. (K, K) float32, whatever the number of samples."""

    total: Tensor
    n: float = 0.0

    @classmethod
    def empty(cls, module: nn.Module) -> "Hessian":
        k = module.weight[0].numel()
        return cls(torch.zeros(k, k))

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """x: (B, P, K); weights: (B, P) or None for ones."""
        flat = x.reshape(-1, x.shape[-1]).float()
        scaled = flat if weights is None else flat * weights.reshape(-1, 1)
        self.total += scaled.T @ flat
        self.n += flat.shape[0]


def gptq(weight: Array, scale: Array, hessian: Hessian, qtype: QType, block: int = 64) -> npt.NDArray[np.int8]:
    """weight (O, K) -> int8 integers (O, K) that keep the layer's output, not its weight.

    scale: (O,) per output channel, or (O, K / block length), fixed before the first column is rounded (the paper computes a
    block's scale when it gets there).
    """
    w = torch.from_numpy(weight.astype(np.float32)).clone()
    s = spread(torch.from_numpy(np.asarray(scale, np.float32)), w.shape).expand_as(w)
    h = hessian.total.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    w, s, h = w[:, order], s[:, order], h[order][:, order]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        part, errors = w[:, start:end].clone(), torch.zeros(w.shape[0], end - start)
        for i in range(end - start):
            column, diagonal = part[:, i : i + 1], inverse[start + i, start + i]
            at = slice(start + i, start + i + 1)
            q[:, at] = torch.clamp(torch.round(column / s[:, at]), qtype.qmin, qtype.qmax)
            error = (column - q[:, at] * s[:, at]) / diagonal
            part[:, i:] -= error * inverse[start + i, start + i : end].unsqueeze(0)
            errors[:, i : i + 1] = error
        w[:, end:] -= errors @ inverse[start:end, end:]
    result = torch.empty_like(q)
    result[:, order] = q
    return result.to(torch.int8).numpy()
