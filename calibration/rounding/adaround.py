"""Learnt rounding: AdaRound (Nagel et al., ICML'20, arXiv 2004.10568), layer by layer, on second moments of the inputs.

The layer-wise objective E||Wx - W'x||^2 (eq. 20) equals tr(dW H dW^T) with H = E[x x^T], so the Hessian that GPTQ uses
holds all the data it needs: no activation is kept, and memory does not grow with samples.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personalq.numerics import QType

from .gptq import Hessian, spread

Array = npt.NDArray[np.float32]
ITERATIONS, LEARNING_RATE, WARM_UP = 150, 3e-2, 0.2
STRETCH = (-0.1, 1.1)  # gamma and zeta of the rectified sigmoid, eq. 23


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1), eq. 23."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def adaround(weight: Array, scale: Array, hessian: Hessian, qtype: QType) -> npt.NDArray[np.int8]:
    """weight (O, K), scale (O,) or (O, blocks) -> int8 integers (O, K), each the floor or the ceiling of weight / scale.

    Regulariser 1 - |2h - 1|^beta with beta 20 -> 2 after a warm-up of 20 % (eq. 24), weighed against the reconstruction
    error relative to that of rounding to nearest.
    """
    w = torch.from_numpy(weight.astype(np.float32))
    s = spread(torch.from_numpy(np.asarray(scale, np.float32)), w.shape)
    w = w / s
    floor = torch.floor(w)
    low, high = STRETCH
    share = (w - floor).clamp(0.01, 0.99)
    v = torch.log((share - low) / (high - share)).requires_grad_(True)
    moments = hessian.total / max(float(hessian.total.diagonal().mean()), 1e-30)
    size = s / (s**2).mean().sqrt()

    def error(q: Tensor) -> Tensor:
        gap = (q.clamp(qtype.qmin, qtype.qmax) - w) * size
        return ((gap @ moments) * gap).sum()

    nearest = float(error(torch.round(w)).clamp(min=1e-12))
    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
    for step in range(ITERATIONS):
        done = step / ITERATIONS
        h = rectified_sigmoid(v)
        loss = error(floor + h) / nearest
        if done >= WARM_UP:
            beta = 2 + 18 * (1 - (done - WARM_UP) / (1 - WARM_UP))
            loss = loss + done * (1 - (2 * h - 1).abs() ** beta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        best = floor + (rectified_sigmoid(v) >= 0.5)
        chosen = best if float(error(best)) < nearest else torch.round(w)
    return chosen.clamp(qtype.qmin, qtype.qmax).to(torch.int8).numpy()
