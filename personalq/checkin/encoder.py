"""The sentence encoder: text -> unit vector (384,), all-MiniLM-L6-v2 on ONNX Runtime. English mostly."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckinError, MissingExtraError

WIDTH = 384
FOLDER = Path(__file__).parent / "encoder"
_BATCH = 16
Vectors = NDArray[np.float32]


class Encoder:
    """One loaded model. Deterministic: one thread, and a text's vector does not depend on its batch."""

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

    def is_word(self, word: str) -> bool:
        """Tell whether the tokenizer knows ``word`` whole: then it is a common word and not a typo."""
        return self._tokenizer.token_to_id(word) is not None

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors (len(texts), 384) float32. Texts of equal length share a batch, so nothing is padded."""
        rows = [row.ids for row in self._tokenizer.encode_batch(list(texts))]
        vectors = np.zeros((len(rows), WIDTH), np.float32)
        by_length: dict[int, list[int]] = {}
        for place, ids in enumerate(rows):
            by_length.setdefault(len(ids), []).append(place)
        for places in by_length.values():
            for start in range(0, len(places), _BATCH):
                batch = places[start : start + _BATCH]
                ids = np.array([rows[place] for place in batch], np.int64)
                vectors[batch] = self._session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        return vectors


@functools.cache
def shared_encoder() -> Encoder:
    """Return the process's one encoder, loaded at first use."""
    return Encoder()
