"""Text rows: how a prompt's K and V rows are laid out, which of them are kept FP16, and where the UNet finds each one.

numpy only; shared by calibration, exporters and runtime. It knows token ids and offsets, not tokenizers or graphs.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from .errors import PromptError

Ids = npt.NDArray[np.int64]


class RowLayer(BaseModel):
    """One cross-attention layer's slice of the packed rows: K at [offset, offset+width), V right after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    width: int
    offset: int
    rest_bits: int = 8


class KeptTokens(BaseModel):
    """Which tokens of a prompt keep FP16 rows. Trigger and class noun are token-id sequences, matched anywhere.

    of_adapter: in a base's spec, whose words are still to come: 'trigger' and 'class_noun' of whatever is attached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    slots: int = 8
    of_adapter: tuple[Literal["trigger", "class_noun"], ...] = ()
    trigger: tuple[tuple[int, ...], ...] = ()
    class_noun: tuple[tuple[int, ...], ...] = ()
    bos: bool = False
    eos: bool = False
    pad: bool = False  # the first padding row: all of them are nearly equal in a causal encoder
    everything: bool = False  # control: as many rows as there are slots, from the front
    random_seed: int | None = None  # control: this many rows, drawn by seed, instead of the chosen ones


def pack_layers(widths: Sequence[tuple[str, int]], rest_bits: dict[str, int] | None = None) -> list[RowLayer]:
    """(name, width) of every cross-attention layer in order -> their slices of the packed rows."""
    layers, offset = [], 0
    for name, width in widths:
        bits = (rest_bits or {}).get(name, 8)
        layers.append(RowLayer(name=name, width=width, offset=offset, rest_bits=bits))
        offset += 2 * width
    return layers


def packed_width(layers: Sequence[RowLayer]) -> int:
    """R: the number of columns of the packed rows."""
    return sum(2 * layer.width for layer in layers)


def find_sequence(ids: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Every position of `ids` covered by an occurrence of the token sequence `wanted`."""
    n = len(wanted)
    starts = [i for i in range(len(ids) - n + 1) if n and list(ids[i : i + n]) == list(wanted)]
    return [start + k for start in starts for k in range(n)]


def end_of_prompt(ids: Sequence[int], eos_id: int) -> int:
    """Position of the first EOS (the row after the last word)."""
    for position, token in enumerate(ids):
        if token == eos_id and position > 0:
            return position
    raise PromptError(f"prompt: must contain the end token {eos_id}, got none; encode it with the bundle's tokenizer")


def kept_positions(ids: Ids, kept: KeptTokens, eos_id: int, length: int = 77) -> tuple[int, ...]:
    """Positions of the rows that stay FP16, most important first, at most `kept.slots`.

    ids: (n*length,) int64 of one prompt's n chunks. Order of importance: trigger, BOS, class noun, EOS, first padding row,
    of all chunks each.
    """
    tokens = [int(token) for token in ids]
    starts = range(0, len(tokens), length)
    chunks = [tokens[start : start + length] for start in starts]
    ends = [end_of_prompt(chunk, eos_id) for chunk in chunks]
    words = [chunk[:end] for chunk, end in zip(chunks, ends, strict=True)]

    def occurrences(sequence: Sequence[int]) -> list[int]:
        return [start + k for start, one in zip(starts, words, strict=True) for k in find_sequence(one, sequence)]

    chosen: list[int] = []
    for sequence in kept.trigger:
        chosen += occurrences(sequence)
    chosen += starts if kept.bos else []
    for sequence in kept.class_noun:
        chosen += occurrences(sequence)
    chosen += [start + end for start, end in zip(starts, ends, strict=True)] if kept.eos else []
    if kept.pad:
        chosen += [start + end + 1 for start, end in zip(starts, ends, strict=True) if end + 1 < len(chunks[0])]
    if kept.everything:
        chosen = list(range(len(tokens)))
    unique = tuple(dict.fromkeys(chosen))[: kept.slots]
    if kept.random_seed is None:
        return unique
    generator = np.random.default_rng([kept.random_seed, *(token for one in words for token in one)])
    return tuple(sorted(int(i) for i in generator.choice(len(tokens), size=len(unique), replace=False)))


def kept_index(positions: Sequence[int], slots: int) -> Ids:
    """(slots,) int64: which row fills each kept slot; unused slots repeat row 0 and are never read."""
    index = np.zeros(slots, dtype=np.int64)
    index[: len(positions)] = positions
    return index


def row_index(positions: Sequence[int], length: int = 77) -> Ids:
    """(length,) int64: for each token, its row in Concat(rest rows, kept rows): i, or length + slot when kept.

    length: of all chunks together.
    """
    index = np.arange(length, dtype=np.int64)
    for slot, position in enumerate(positions):
        index[position] = length + slot
    return index
