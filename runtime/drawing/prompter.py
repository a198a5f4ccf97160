"""A bundle's prompts: read, tokenised chunk by chunk, encoded, weighed, and made into the rows that the UNet attends to.

It knows the bundle's tokenizers, triggers and how many chunks its graphs take; pictures and samplers are in pipeline.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from personalq.chunks import Chunks
from personalq.errors import PromptError
from personalq.prompts import Prompt, read_prompt, refuse_faults
from personalq.rows import Ids, find_sequence, kept_index, kept_positions, row_index

from ..engines.engine import UNET_INPUTS, Array, Conditioning, Engine, TextEmbeds
from .attaching import Wearing
from .emphasis import emphasised

logger = logging.getLogger("personalq.runtime")

MOST_CHUNKS = 8  # 600 tokens; each costs a step some time and, on SD 1.5, 2 MB a picture. A flood of BREAKs ends here
Key = str | Prompt | tuple[str | Prompt, int]  # a prompt, and how many rows it was made for when not its own number


@dataclass(frozen=True)
class PromptRows:
    """A prompt, encoded and turned into what the UNet needs (batch of 1). kept: positions whose rows are FP16.

    text_embeds: (1,77n,C) float32. ids: (77n,) int64. cut: the text that had no room.
    """

    conditioning: Conditioning
    kept: tuple[int, ...]
    text_embeds: Array
    ids: Ids
    cut: str = ""

    @property
    def n_rows(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Reading:
    """A prompt as one bundle reads it. second: for SDXL's second encoder, of as many chunks. warnings: what is not used."""

    prompt: Prompt
    first: Chunks
    second: Chunks | None
    warnings: tuple[str, ...]


class Prompter:
    """Reads prompts for one engine and its adapters. Keeps the rows of the last ones, and those of the empty prompt."""

    def __init__(self, engine: Engine, wearing: Wearing, cached_prompts: int) -> None:
        self.engine, self.wearing, self.manifest = engine, wearing, wearing.manifest
        self.tokenizer, self.second_tokenizer = wearing.tokenizers()
        self.most_chunks = MOST_CHUNKS if engine.takes_chunks else 1
        self._triggers = tuple(self.tokenizer.token_ids(trigger) for trigger in self.manifest.checkpoint.trigger)
        text = self.manifest.text
        self.cached = Recent(cached_prompts, text.length)
        self._nothing: PromptRows | None = None

    def read(self, prompt: str | Prompt) -> Reading:
        """Read a prompt without encoding it. Raises PromptError for one that cannot be drawn, or whose trigger is cut."""
        if isinstance(prompt, str):
            prompt = read_prompt(prompt, self.manifest.checkpoint.trigger)
        refuse_faults(prompt, self.wearing.strengths, is_attached=bool(self.wearing.chosen))
        first, second = self._chunks(prompt)
        self._check_cut(first)
        warnings = list(prompt.warnings)
        if self.most_chunks == 1 and len(prompt.sections) > 1:
            warnings.append("BREAK: this bundle takes one chunk of text on this target: it is left out")
        if first.cut:
            warnings.append(_told_cut(first))
        return Reading(prompt, first, second, tuple(warnings))

    def rows(self, prompt: str | Prompt) -> PromptRows:
        """The prompt's rows, from the cache when it was among the last ones asked for. Logs what is not used of it."""
        if prompt == "":
            return self.nothing()
        reading = self.read(prompt)
        for warning in reading.warnings:
            logger.warning("prompt: %s", warning)
        if reading.prompt.text == "":
            return self.nothing()
        return self.cached.get(prompt, lambda: self._rows_of(reading))

    def lengthened(self, prompt: str | Prompt, rows: PromptRows, n_rows: int) -> PromptRows:
        """The prompt's rows, followed by those of empty chunks: as many as its partner has."""
        missing = (n_rows - rows.n_rows) // self.manifest.text.length
        return self.cached.get((prompt, n_rows), lambda: self._followed(rows, missing)) if missing else rows

    def nothing(self) -> PromptRows:
        """The rows of the empty prompt; SDXL's are zeros."""
        if self._nothing is None:
            embeds = self.embed([""])
            is_zero = self.manifest.text.is_empty_zero
            self._nothing = self.rows_of_ids(self.tokenizer.blank(), embeds=embeds.zeros() if is_zero else embeds)
        return self._nothing

    def embed(self, texts: Sequence[str]) -> TextEmbeds:
        """Texts as they stand, brackets and all -> their embeddings, one chunk each."""
        return self.engine.encode(*self.token_ids(texts), self.wearing.attached)

    def token_ids(self, texts: Sequence[str]) -> tuple[Ids, Ids | None]:
        """Texts as they stand -> ids (B,77) of the first tokenizer, and of SDXL's second one."""
        ids = np.stack([self.tokenizer.encode(text).ids for text in texts])
        if self.second_tokenizer is None:
            return ids, None
        return ids, np.stack([self.second_tokenizer.encode(text).ids for text in texts])

    def rows_of_ids(self, ids: Ids, *, embeds: TextEmbeds, cut: str = "") -> PromptRows:
        """Token ids (77n,) and their embeddings (a batch of one: 77n rows) -> rows."""
        rows, text = self.manifest.rows, self.manifest.text
        positions = kept_positions(ids, rows.kept, text.eos_id, text.length) if rows.form == "split" else ()
        made = self.engine.text_rows(embeds.states, kept_index(positions, rows.kept.slots)[None], self.wearing.attached)
        made["row_index"] = row_index(positions, len(ids))[None]
        conditioning = {name: made[name] for name in UNET_INPUTS[rows.form]}
        if embeds.pooled is not None:
            conditioning["text_embeds"] = embeds.pooled
        return PromptRows(conditioning, positions, embeds.states, ids, cut)

    def _rows_of(self, reading: Reading) -> PromptRows:
        first, second = reading.first, reading.second
        embeds = self.engine.encode(first.ids, None if second is None else second.ids, self.wearing.attached)
        weights = [chunks.weights for chunks in (first, second) if chunks is not None]
        states = emphasised(embeds.states, weights, embeds.widths)
        pooled = None if embeds.pooled is None else embeds.pooled[:1]  # the first chunk's, as compel takes it
        joined = TextEmbeds(states.reshape(1, -1, states.shape[-1]), pooled)
        return self.rows_of_ids(first.ids.reshape(-1), embeds=joined, cut=first.cut)

    def _followed(self, rows: PromptRows, missing: int) -> PromptRows:
        is_nothing = rows is self._nothing
        blank = rows.text_embeds if is_nothing else self.embed([""]).states
        states = np.concatenate([rows.text_embeds, *[blank] * missing], axis=1)
        ids = np.concatenate([rows.ids, *[self.tokenizer.blank()] * missing])
        return self.rows_of_ids(ids, embeds=TextEmbeds(states, rows.conditioning.get("text_embeds")), cut=rows.cut)

    def _chunks(self, prompt: Prompt) -> tuple[Chunks, Chunks | None]:
        """The chunks for both text encoders, equally many: SDXL's second tokenizer may split a word differently."""
        most = 1 if prompt.is_literal else self.most_chunks
        first = self.tokenizer.chunks(prompt, most, self._triggers)
        if self.second_tokenizer is None:
            return first, None
        second = self.second_tokenizer.chunks(prompt, most, self._triggers)
        n = max(len(first.ids), len(second.ids))
        return first.lengthened(self.tokenizer.blank(), n), second.lengthened(self.second_tokenizer.blank(), n)

    def _check_cut(self, chunks: Chunks) -> None:
        """Refuse a prompt whose trigger was cut; one that also stands whole in what fits is fine."""
        for trigger, ids in zip(self.manifest.checkpoint.trigger, self._triggers, strict=True):
            if chunks.cut and find_sequence(chunks.tokens, ids) and not _is_in(chunks, ids):
                raise PromptError(
                    f"prompt: its trigger {trigger!r} must be within the first {chunks.ids.size} tokens, got it in what is cut "
                    f"({chunks.cut!r}); shorten the prompt or put the trigger earlier"
                )


class Recent:
    """The rows of the last prompts asked for, `most` chunks in all: a long prompt takes the place of several."""

    def __init__(self, most: int, length: int) -> None:
        self._most_rows = most * length
        self._rows: OrderedDict[Key, PromptRows] = OrderedDict()

    def get(self, key: Key, make: Callable[[], PromptRows]) -> PromptRows:
        """The key's rows, made when they are not among them."""
        if key not in self._rows:
            self._rows[key] = make()
            while len(self._rows) > 1 and sum(rows.n_rows for rows in self._rows.values()) > self._most_rows:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return self._rows[key]

    def keys(self) -> set[Key]:
        return set(self._rows)


def _is_in(chunks: Chunks, sequence: Sequence[int]) -> bool:
    """Whether a token sequence stands whole in a chunk."""
    return any(find_sequence(chunk.tolist(), sequence) for chunk in chunks.ids)


def _told_cut(chunks: Chunks) -> str:
    words = "1 word is" if chunks.n_cut == 1 else f"{chunks.n_cut} words are"
    return f"only {chunks.ids.size} tokens fit; {words} cut, from {chunks.lost!r} on; shorten it"
