"""The sentence encoder: text -> unit vector (384,), all-MiniLM-L6-v2 on ONNX Runtime. English mostly."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckinError, MissingExtraError

WIDTH = 384
START, END = 101, 102  # the tokens that every text begins and ends with
FOLDER = Path(__file__).parent
_REMEMBERED = 4096  # vectors of 1.5 KB
_FEW = 16
_RUN = 128  # tokens encoded at once: more make attention more expensive, fewer read the weights more often
Vectors = NDArray[np.float32]


class Encoder:
    """One loaded model. Deterministic: one thread, and each text is encoded as if it were alone."""

    def __init__(self, folder: Path = FOLDER) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "cpu") from error
        from tokenizers import Tokenizer

        if not (folder / "model.onnx").is_file():
            raise CheckinError(f"{folder}: must hold model.onnx and tokenizer.json, got none; reinstall personalq")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._remembered: dict[str, Vectors] = {}

    def is_word(self, word: str) -> bool:
        """Tell whether the tokenizer knows ``word`` whole: then it is a common word and not a typo."""
        return self._tokenizer.token_to_id(word) is not None

    def token_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, marks of beginning and end with them, at most 128 each."""
        if len(texts) <= _FEW:  # a batch goes to other threads: waking them takes longer than a request's few words
            return [self._tokenizer.encode(text).ids for text in texts]
        return [row.ids for row in self._tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors (len(texts), 384) float32."""
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        return self.encode_rows(self.token_rows(distinct))[[place[text] for text in texts]]

    def encode_remembering(self, texts: Sequence[str]) -> Vectors:
        """Like ``encode``, with a cache: a text's vector does not depend on the batch, so recent texts are not encoded again.

        For requests, whose nouns and scenes recur. May be called from any thread.
        """
        known = self._remembered  # another thread may begin a new one
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        found = dict(zip(missing, self.encode(missing), strict=True))
        if len(known) + len(found) > _REMEMBERED:
            self._remembered = {}
        self._remembered.update(found)
        return np.stack([found[text] if text in found else known[text] for text in texts])

    def encode_rows(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Return unit vectors (len(rows), 384) float32 of texts given as tokens, laid end to end: nothing is padded."""
        vectors = np.zeros((len(rows), WIDTH), np.float32)
        start = 0
        for end in _cuts([len(ids) for ids in rows]):
            vectors[start:end] = self._session.run(None, _laid_out(rows[start:end]))[0]
            start = end
        return vectors


def _cuts(lengths: Sequence[int]) -> list[int]:
    """Return the ends of consecutive groups of texts of at most _RUN tokens in all (a longer text is alone)."""
    ends, total = [], 0
    for place, length in enumerate(lengths):
        if total and total + length > _RUN:
            ends.append(place)
            total = 0
        total += length
    return [*ends, len(lengths)] if lengths else []


def _laid_out(rows: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
    """Return the graph's inputs for token rows: ids, places within their text, and the number of their text (T,)."""
    lengths = [len(ids) for ids in rows]
    return {
        "input_ids": np.array([i for ids in rows for i in ids], np.int64),
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "texts": np.repeat(np.arange(len(rows)), lengths),
    }


@functools.cache
def shared_encoder() -> Encoder:
    """Return the process's one encoder, loaded at first use."""
    return Encoder()
