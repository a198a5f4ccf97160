"""A streaming histogram of |x|: fixed memory however many samples pass, and the clips that come from it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personalq.errors import SpecError
from personalq.numerics import SMALLEST_SCALE, QType

BINS = 2048


@dataclass
class Histogram:
    """counts[i]: how many |x| fell into [i, i+1) * peak_range / BINS; the range doubles when a larger value arrives."""

    counts: npt.NDArray[np.float64]
    limit: float = 0.0
    absmax: float = 0.0

    @classmethod
    def empty(cls) -> "Histogram":
        return cls(np.zeros(BINS))

    def add(self, x: Tensor, where: str) -> None:
        """Count a tensor of any shape. Raises SpecError naming `where` on NaN or Inf."""
        magnitude = x.detach().abs().float().flatten()
        peak = float(magnitude.max())
        if not np.isfinite(peak):
            raise SpecError(f"{where}: activations must be finite, got NaN or Inf; check the checkpoint's weights")
        self.absmax = max(self.absmax, peak)
        if self.limit == 0.0:
            self.limit = peak or 0.0
        while self.limit and peak > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2)])
            self.limit *= 2
        if self.limit:
            self.counts += torch.histc(magnitude, BINS, 0.0, self.limit).cpu().numpy()
        else:
            self.counts[0] += magnitude.numel()

    def merged(self, other: "Histogram") -> "Histogram":
        """A histogram of both; ranges are aligned by doubling the smaller one's (bin edges may shift by rounding)."""
        low, high = sorted((self, other), key=lambda h: h.limit)
        edges = (np.arange(BINS) + 0.5) * (low.limit / BINS)
        counts = high.counts.copy()
        if high.limit:
            np.add.at(counts, np.minimum((edges / high.limit * BINS).astype(int), BINS - 1), low.counts)
        return Histogram(counts, high.limit, max(self.absmax, other.absmax))

    def percentile(self, percent: float) -> float:
        """The |x| below which `percent` of the values lie."""
        cumulative = np.cumsum(self.counts)
        index = int(np.searchsorted(cumulative, cumulative[-1] * percent / 100))
        return min((index + 1) * self.limit / BINS, self.absmax)

    def mse_clip(self, qtype: QType, steps: int = 80) -> float:
        """The clip value with the least expected squared error of a symmetric quantiser over this histogram."""
        clips = np.linspace(1.0, 0.2, steps) * self.absmax
        errors = [self.error(clip / qtype.qmax, qtype) for clip in clips]
        return float(clips[int(np.argmin(errors))])

    def error(self, scale: float, qtype: QType) -> float:
        """Summed squared error of quantising everything seen with `scale`, each value taken at its bin's centre."""
        centres = (np.arange(BINS) + 0.5) * (self.limit / BINS)
        restored = np.clip(np.rint(centres / scale), 0, qtype.qmax) * scale
        return float((self.counts * ((restored - centres) ** 2)).sum())

    def scale(self, qtype: QType, how: str, where: str) -> np.float32:
        """float32 scale by 'absmax', 'mse' or 'p99.9'-like percentiles. Raises SpecError when only zeros were seen."""
        if self.absmax == 0.0:
            raise SpecError(
                f"{where}: needs an activation other than 0, got only zeros; add prompts or exclude the layer"
            )
        if how == "absmax":
            clip = self.absmax
        elif how == "mse":
            clip = self.mse_clip(qtype)
        else:
            clip = self.percentile(float(how.removeprefix("p")))
        return max(np.float32(clip / qtype.qmax), SMALLEST_SCALE)
