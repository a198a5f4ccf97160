"""Judges of gallery pictures: what is in them, and whose identity they show. numpy and onnxruntime only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "judges"
HEADS: dict[str, tuple[str, ...]] = {
    "object": ("dog", "cat", "backpack", "mug", "car", "house", "robot", "bird"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "brown"),
    "pattern": ("plain", "striped", "dotted", "checkered"),
    "background": ("beach", "forest", "snow", "city", "kitchen", "desert", "night", "meadow"),
    "accessory": ("none", "scarf", "hat", "bow"),
    "look": ("photo", "sketch", "poster"),
}
Facets = dict[str, str]


def named_facets(prompt: str) -> Facets:
    """The facets a prompt names; a colour counts only before the object (`a red dog with a blue hat`: red)."""
    words = re.findall(r"[a-z]+", prompt.lower())
    found: Facets = {}
    for head in ("object", "background", "accessory", "pattern", "look"):
        named = [w for w in words if w in HEADS[head] and w not in ("none", "photo")]
        if named:
            found[head] = named[0]
    if "object" in found:
        before = words[: words.index(found["object"])]
        colours = [w for w in before if w in HEADS["colour"]]
        if colours and found.get("accessory") not in before:
            found["colour"] = colours[0]
    return found


@dataclass(frozen=True)
class Judge:
    """Two ONNX sessions: a classifier with one head per facet, and an identity embedding."""

    classifier: Any
    identity: Any

    @staticmethod
    def load(folder: Path = FOLDER) -> Judge:
        """Open the judges on CPU, one thread."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        sessions = [
            ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("classifier.onnx", "identity.onnx")
        ]
        return Judge(*sessions)

    def probabilities(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Probabilities by head, float32 (N, labels), of uint8 (N, 64, 64, 3) images.

        The mean of the picture's and its mirror image's: no label tells left from right, and two looks see more than one.
        """
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        seen = zip(self._batched(self.classifier, images), self._batched(self.classifier, mirrored), strict=True)
        return {head: (a + b) / 2 for head, (a, b) in zip(HEADS, seen, strict=True)}

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Unit identity vectors, float32 (N, 64), of uint8 (N, 64, 64, 3) images."""
        return self._batched(self.identity, images)[0]

    def facets(self, images: np.ndarray) -> dict[str, list[str]]:
        """The most probable label of every head."""
        return {head: [HEADS[head][i] for i in p.argmax(1)] for head, p in self.probabilities(images).items()}

    def concept_score(self, images: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Mean cosine of every image to the references, float32 (N,)."""
        return (self.embed(images) @ self.embed(references).T).mean(1)

    def prompt_score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Mean probability of the facets each prompt names, float32 (N,); 1 for a prompt that names none."""
        by_head = self.probabilities(images)
        scores = []
        for i, prompt in enumerate(prompts):
            named = named_facets(prompt)
            shares = [by_head[head][i, HEADS[head].index(label)] for head, label in named.items()]
            scores.append(np.mean(shares) if shares else 1.0)
        return np.asarray(scores, np.float32)

    @staticmethod
    def _batched(session: Any, images: np.ndarray) -> list[np.ndarray]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (64, 64, 3):
            raise ValueError(f"images must be uint8 (N, 64, 64, 3), got {images.dtype} {images.shape}")
        name = session.get_inputs()[0].name
        parts = [session.run(None, {name: images[i : i + 64]}) for i in range(0, len(images), 64)]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]
