"""The gallery's judge for the gate: `personalq verify ID --judge gallery.gate_judge:judge`. No torch."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from .concepts import reference_images
from .judge import Judge

N_REFERENCES, SEED = 32, 900  # as in bench/quality.py
Images = npt.NDArray[np.uint8]


def judge(checkpoint_id: str) -> Callable[[Images, list[str]], Mapping[str, npt.NDArray[np.float32]]]:
    """Scores of pictures of one gallery checkpoint: its concept beside real renders, and what the prompt names."""
    scorer, references = Judge.load(), reference_images(checkpoint_id, N_REFERENCES, SEED)

    def scores(images: Images, prompts: list[str]) -> Mapping[str, npt.NDArray[np.float32]]:
        return {
            "concept": scorer.concept_score(images, references),
            "prompt": scorer.prompt_score(images, prompts),
        }

    return scores
