"""What the text rows of a checkpoint look like, by class of token: BOS, before, trigger, class noun, after, EOS, padding.

Per class: the largest value, kurtosis, the error of storing the row in 8 and 4 bits, and the attention mass it gets per
layer and time-step bin. Kept rows are chosen from these numbers, never assumed (causal CLIP-L and a small encoder differ).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.numerics import INT4, INT8, QType, absmax_scale, fake_quantize
from personalq.rows import RowLayer, end_of_prompt, find_sequence

CLASSES = ("bos", "before", "trigger", "class_noun", "after", "eos", "pad")
Array = npt.NDArray[Any]


def row_classes(
    ids: Sequence[int], trigger: Sequence[Sequence[int]], noun: Sequence[Sequence[int]], eos_id: int
) -> list[str]:
    """The class of each of the 77 rows of one prompt. Words of a prompt without trigger are 'before'."""
    end = end_of_prompt(ids, eos_id)
    words = list(ids[:end])
    triggers = {p for sequence in trigger for p in find_sequence(words, sequence)}
    nouns = {p for sequence in noun for p in find_sequence(words, sequence)} - triggers
    first = min(triggers) if triggers else end
    named = {0: "bos", end: "eos"} | dict.fromkeys(nouns, "class_noun") | dict.fromkeys(triggers, "trigger")

    def plain(position: int) -> str:
        if position > end:
            return "pad"
        return "before" if position < first else "after"

    return [named.get(position, plain(position)) for position in range(len(ids))]


@dataclass
class Moments:
    """Streamed count, power sums and extremes of the values of one (class, layer, K|V); memory does not grow."""

    n: int = 0
    sums: Array = field(default_factory=lambda: np.zeros(4))
    absmax: float = 0.0
    energy: float = 0.0
    error8: float = 0.0
    error4: float = 0.0

    def add(self, values: Array) -> None:
        """values: (rows, width) of one layer; each row is quantised with its own scale, as the bundle stores it."""
        x = values.astype(np.float64)
        self.n += x.size
        self.sums += np.array([(x**power).sum() for power in (1, 2, 3, 4)])
        self.absmax = max(self.absmax, float(np.abs(x).max()))
        self.energy += float((x**2).sum())
        self.error8 += _row_error(values, INT8)
        self.error4 += _row_error(values, INT4)

    @property
    def kurtosis(self) -> float:
        """Fourth standardised moment (3 for a Gaussian)."""
        m1, m2, m3, m4 = self.sums / max(self.n, 1)
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return float(fourth / variance**2) if variance > 0 else 0.0

    def as_numbers(self) -> dict[str, float]:
        """absmax, kurtosis, and relative squared errors at 8 and 4 bits."""
        energy = max(self.energy, 1e-30)
        return {
            "absmax": self.absmax,
            "kurtosis": self.kurtosis,
            "error8": self.error8 / energy,
            "error4": self.error4 / energy,
        }


def _row_error(values: Array, qtype: QType) -> float:
    scale = absmax_scale(values, qtype, 0, where="text rows")
    return float(((fake_quantize(values, scale, qtype, 0) - values) ** 2).sum(dtype=np.float64))


class RowStatistics:
    """Moments per (class, layer, 'k'|'v') and attention mass per (layer, time bin, class)."""

    def __init__(self, layers: Sequence[RowLayer], n_time_bins: int):
        self.layers = tuple(layers)
        self.moments: dict[tuple[str, str, str], Moments] = {}
        self.mass = np.zeros((len(layers), n_time_bins, len(CLASSES)))
        self.mass_count = np.zeros((len(layers), n_time_bins, len(CLASSES)))
        self.counts: dict[str, list[int]] = {name: [] for name in CLASSES}

    def add_rows(self, rows: Array, classes: list[str]) -> None:
        """rows: (77, R) packed rows of one prompt."""
        for name in dict.fromkeys(classes):
            self.counts[name].append(classes.count(name))
            chosen = [i for i, value in enumerate(classes) if value == name]
            for layer in self.layers:
                for part, start in (("k", layer.offset), ("v", layer.offset + layer.width)):
                    values = rows[chosen, start : start + layer.width]
                    if np.any(values):
                        self.moments.setdefault((name, layer.name, part), Moments()).add(values)

    def add_mass(self, layer: int, time_bin: int, mass: Array, classes: Sequence[str]) -> None:
        """mass: (77,) attention probability of each row, mean over heads and pixels (sums to 1)."""
        for index, name in enumerate(CLASSES):
            chosen = [i for i, value in enumerate(classes) if value == name]
            if chosen:
                self.mass[layer, time_bin, index] += float(mass[chosen].sum())
                self.mass_count[layer, time_bin, index] += 1

    def rows_per_prompt(self, name: str) -> float:
        """How many rows of this class a prompt has, on average over the prompts that have any."""
        return float(np.mean(self.counts[name])) if self.counts[name] else 0.0

    def mean_mass(self) -> Array:
        """(layers, time bins, classes): mean share of attention, over prompts that have the class."""
        return np.asarray(self.mass / np.maximum(self.mass_count, 1))

    def by_class(self) -> dict[str, dict[str, float]]:
        """class -> absmax (largest over layers), and kurtosis and errors (mean over layers, K and V)."""
        result = {}
        for name in CLASSES:
            numbers = [m.as_numbers() for (kind, _, _), m in self.moments.items() if kind == name]
            if numbers:
                result[name] = {
                    key: float(np.mean([n[key] for n in numbers])) for key in ("kurtosis", "error8", "error4")
                }
                result[name]["absmax"] = max(n["absmax"] for n in numbers)
                result[name]["mass"] = float(self.mean_mass()[:, :, CLASSES.index(name)].mean())
        return result
