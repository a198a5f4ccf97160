"""Prompts to CLIP token ids without transformers: a tokenizer.json, the ids a bundle names, and what did not fit.

It knows text and ids, not text encoders or which tokens matter.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .bundle import Text
from .chunks import Chunks, Token, glued, split
from .errors import BundleError, MissingExtraError, PromptError
from .prompts import Prompt
from .rows import Ids

if TYPE_CHECKING:
    import tokenizers

LONGEST_WORD = 40  # characters, in a warning


@dataclass(frozen=True)
class Encoded:
    """A text as it stands, brackets and all, as the text encoder reads it: what goldens are made from.

    ids: (77,) int64, BOS, words, EOS, padding. n_words: the tokens between BOS and EOS. cut: the text that did not fit.
    tokens: every token of the prompt, those that were cut too, without BOS and EOS.
    """

    ids: Ids
    n_words: int
    cut: str
    tokens: tuple[int, ...]


class Tokenizer:
    """The CLIP tokenizer of one checkpoint; gives the ids of transformers' CLIPTokenizer for the same files."""

    def __init__(self, file: Path, text: Text, learned: Mapping[str, int] | None = None) -> None:
        """Read `file` (tokenizer.json). Raises BundleError when it is missing or not a tokenizer.

        learned: piece -> id of the tokens that attached adapters add: what `tokenizers` does with added tokens, without a
        copy of the tokenizer for each adapter.
        """
        self.text = text
        self._tokenizer = _read(file)
        self._learned = _Learned(self._tokenizer, learned) if learned else None
        self._expansions = _expansion_patterns(text.expansions)
        self._comma: int | None = self._tokenizer.token_to_id(",</w>")

    def expand(self, prompt: str) -> str:
        """Write a multi-vector trigger out: '<tok>' -> '<tok> <tok>_1'. A trigger already written out stays as it is.

        The same as diffusers' maybe_convert_prompt, which also looks at the spelling only, except that the case of
        letters does not matter here: the tokenizer lowercases, so '<Tok>' would otherwise become half a trigger.
        """
        for pattern, replacement in self._expansions:
            prompt = pattern.sub(lambda _, text=replacement: text, prompt)  # type: ignore[misc]
        return prompt

    def encode(self, prompt: str) -> Encoded:
        """Tokenise a prompt, cut it to the text encoder's length and pad it. Raises PromptError when it is not text."""
        expanded = self.expand(_checked(prompt))
        encoding = self._encode(expanded)
        room = self.text.length - 2
        kept = encoding.ids[:room]
        ids = np.full(self.text.length, self.text.pad_id, dtype=np.int64)
        ids[: len(kept) + 2] = [self.text.bos_id, *kept, self.text.eos_id]
        cut = expanded[encoding.offsets[room][0] :].strip() if len(encoding.ids) > room else ""
        return Encoded(ids=ids, n_words=len(kept), cut=cut, tokens=tuple(encoding.ids))

    def chunks(self, prompt: Prompt, most: int, whole: Sequence[Sequence[int]] = ()) -> Chunks:
        """Tokenise a prompt piece by piece and lay it over at most `most` chunks; where that is 1, BREAK ends none.

        whole: token sequences that no chunk ends in. Raises PromptError when the prompt is not text.
        """
        sections, written = self._tokens(prompt)
        if most == 1:
            sections = [[token for section in sections for token in section]]
        parts, left = split([glued(section, whole) for section in sections], self.text.length - 2, most, self._comma)
        ids = np.full((len(parts), self.text.length), self.text.pad_id, dtype=np.int64)
        weights = np.ones(ids.shape, dtype=np.float32)
        for i, part in enumerate(parts):
            ids[i, : len(part) + 2] = [self.text.bos_id, *(token.id for token in part), self.text.eos_id]
            weights[i, 1 : len(part) + 1] = [token.weight for token in part]
        tokens = tuple(token.id for section in sections for token in section)
        cut = written[left[0].place :].strip() if left else ""
        n_cut = sum(token.begins for token in left[1:]) + 1 if left else 0
        return Chunks(ids, weights, tokens, cut, n_cut, _word_at(written, left[0].place) if left else "")

    def blank(self) -> Ids:
        """(77,) int64: BOS, EOS, padding; the chunk that makes a shorter prompt as long as its partner."""
        return self.encode("").ids

    def _tokens(self, prompt: Prompt) -> tuple[list[list[Token]], str]:
        """The tokens of each section, and the text that their places are in."""
        written, sections = "", []
        for section in prompt.sections:
            tokens = []
            for piece in section:
                expanded = self.expand(_checked(piece.text))
                encoding = self._encode(expanded)
                words = [None, *encoding.word_ids]
                for i, (token, offset) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
                    begins = i == 0 or words[i] != words[i + 1]
                    tokens.append(Token(token, piece.weight, begins, len(written) + offset[0]))
                written += expanded
            sections.append(tokens)
            written += " "
        return sections, written

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a word or phrase alone, expanded, without BOS and EOS, of any length."""
        return tuple(self._encode(self.expand(_checked(text))).ids)

    def _encode(self, text: str) -> "Encoding":
        """Ids, and where each stands, without BOS and EOS."""
        if self._learned is not None:
            return self._learned.encode(text)
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoding(found.ids, found.offsets, found.word_ids)


@dataclass(frozen=True)
class Encoding:
    """Token ids, the characters that each came from, and the number of its word."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]


class _Learned:
    """A tokenizer with further tokens: the text is cut at them, the longest one first, and what lies between is encoded alone.

    So does `tokenizers` with tokens added as plain text: they are found in the lowercased text, before it is split.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", learned: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._ids = {piece.casefold(): id_ for piece, id_ in learned.items()}
        self._pattern = re.compile("|".join(re.escape(piece) for piece in sorted(learned, key=len, reverse=True)), re.I)

    def encode(self, text: str) -> Encoding:
        made, at = Encoding([], [], []), 0
        for match in self._pattern.finditer(text):
            self._add(made, text, at, match.start())
            made.ids.append(self._ids[match.group().casefold()])
            made.offsets.append(match.span())
            made.word_ids.append(self._next_word(made))
            at = match.end()
        self._add(made, text, at, len(text))
        return made

    def _add(self, made: Encoding, text: str, start: int, end: int) -> None:
        """The tokens of text[start:end]; its first word has the next number."""
        found, word = self._tokenizer.encode(text[start:end], add_special_tokens=False), self._next_word(made)
        made.ids.extend(found.ids)
        made.offsets.extend((start + a, start + b) for a, b in found.offsets)
        made.word_ids.extend(None if one is None else word + one for one in found.word_ids)

    @staticmethod
    def _next_word(made: Encoding) -> int:
        last = made.word_ids[-1] if made.word_ids else None
        return 0 if last is None else last + 1


def _read(file: Path) -> "tokenizers.Tokenizer":
    try:
        import tokenizers  # noqa: F401 (asked for here too: what is kept was read when it was installed)
    except ImportError:
        raise MissingExtraError("tokenizers", "cpu") from None
    if not file.is_file():
        raise BundleError(f"{file}: must be a tokenizer.json, got no file; export the checkpoint again")
    stat = file.stat()
    return _read_once(str(file), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _read_once(file: str, mtime_ns: int, n_bytes: int) -> "tokenizers.Tokenizer":
    """A file's tokenizer, kept: reading one takes 0.1 s, and every adapter of a base has the same."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise BundleError(f"{file}: must be a tokenizer.json, got {reason}; export the checkpoint again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _expansion_patterns(expansions: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """For each trigger: what to look for (written out already, or alone and not '<tok>_1') and what to put there."""
    patterns = []
    for token, replacement in expansions.items():
        alone = re.escape(token) + r"(?!_\d)"
        patterns.append((re.compile(f"{re.escape(replacement)}|{alone}", re.IGNORECASE), replacement))
    return patterns


def _word_at(text: str, place: int) -> str:
    """The word around a character, 40 characters of it at most: some languages put no spaces."""
    place += len(text[place:]) - len(text[place:].lstrip())
    begun = re.split(r"\s", text[:place])[-1]
    rest = text[place:].split(maxsplit=1)[0]
    return (begun + rest if len(begun) <= LONGEST_WORD else rest)[:LONGEST_WORD]


def _checked(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt: must be Unicode text, got a lone surrogate at character {error.start}; remove it"
        ) from None
    return prompt
