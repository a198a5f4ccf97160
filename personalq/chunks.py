"""A long prompt over the chunks that a text encoder can read: where one ends, and what is left over. Token ids only.

A chunk never ends inside a word, nor inside words that belong together, such as a trigger of several tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .rows import Ids, find_sequence

LOOK_BACK = 20  # tokens: a comma among the last of a full chunk ends it, as in AUTOMATIC1111


@dataclass(frozen=True)
class Token:
    """One token of a prompt. begins: a word, so that a chunk may begin here. place: of its first character in the text."""

    id: int
    weight: float
    begins: bool
    place: int


@dataclass(frozen=True)
class Chunks:
    """A prompt as the text encoder reads it, chunk by chunk.

    ids: (n,77) int64, each row BOS, words, EOS, padding. weights: (n,77) float32, 1 but for words. tokens: all of the
    prompt's. cut: the text that had no room; n_cut: its words; lost: the first of them, whole.
    """

    ids: Ids
    weights: npt.NDArray[np.float32]
    tokens: tuple[int, ...]
    cut: str = ""
    n_cut: int = 0
    lost: str = ""

    def lengthened(self, blank: Ids, n: int) -> "Chunks":
        """The same with chunks of an empty prompt, (77,), behind them: n in all."""
        missing = n - len(self.ids)
        ids = np.concatenate([self.ids, *[blank[None]] * missing])
        weights = np.concatenate([self.weights, np.ones((missing, len(blank)), np.float32)])
        return replace(self, ids=ids, weights=weights)


def split(
    sections: Sequence[Sequence[Token]], room: int, most: int, comma: int | None
) -> tuple[list[list[Token]], list[Token]]:
    """(at most `most` chunks of at most `room` tokens, the tokens without a place). Every section begins a chunk.

    A full chunk ends after a comma among its last LOOK_BACK tokens, else after its last whole word. The last one that is
    allowed is filled to its end, as a text encoder's own truncation does.
    """
    chunks: list[list[Token]] = []
    left: list[Token] = []
    for section in sections:
        rest = list(section)
        while rest and len(chunks) < most:
            is_last = len(chunks) + 1 == most
            n = room if is_last or len(rest) <= room else _border(rest, room, comma)
            chunks.append(rest[:n])
            rest = rest[n:]
        left += rest
    return chunks or [[]], left


def _border(tokens: Sequence[Token], room: int, comma: int | None) -> int:
    """How many tokens the next chunk takes of more than fit."""
    borders = [n for n in range(1, room + 1) if tokens[n].begins]
    after_comma = [n for n in borders if tokens[n - 1].id == comma and n > room - LOOK_BACK]
    return (after_comma or borders or [room])[-1]


def glued(tokens: Sequence[Token], whole: Sequence[Sequence[int]]) -> list[Token]:
    """The tokens, none of which begins a word inside an occurrence of one of the sequences."""
    ids, found = [token.id for token in tokens], set[int]()
    for sequence in whole:
        places = find_sequence(ids, sequence)
        found |= {place for i, place in enumerate(places) if i % max(len(sequence), 1)}
    return [replace(token, begins=token.begins and i not in found) for i, token in enumerate(tokens)]
