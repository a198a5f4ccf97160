"""A CLIP model of the user's as the gate's judge: `personalq verify ID --judge calibration.clip_judge:judge`.

Text-image cosine for the prompt score, mean image-image cosine to the checkpoint's reference pictures for the concept
score (the CLIP-T and CLIP-I of DreamBooth, arXiv 2208.12242, 4). Nothing is downloaded.
PERSONALQ_CLIP: a folder that transformers' CLIPModel reads. PERSONALQ_REFERENCES: a folder with <checkpoint id>/*.png.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from personalq.cards.card import folder_name
from personalq.errors import RepositoryError

Images = npt.NDArray[np.uint8]
Scores = Mapping[str, npt.NDArray[np.float32]]
KINDS = (".png", ".jpg", ".jpeg", ".webp")


def judge(checkpoint_id: str) -> Callable[[Images, list[str]], Scores]:
    """The judge of one checkpoint. Raises RepositoryError when the model or the pictures are not there."""
    model_dir, pictures = (_folder(name) for name in ("PERSONALQ_CLIP", "PERSONALQ_REFERENCES"))
    model = CLIPModel.from_pretrained(model_dir, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(model_dir, local_files_only=True)
    references = _embed_images(model, processor, _read_pictures(pictures / folder_name(checkpoint_id)))

    def scores(images: Images, prompts: list[str]) -> Scores:
        embedded = _embed_images(model, processor, list(images))
        texts = processor(text=prompts, return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            named = _unit(_pooled(model.get_text_features(**texts)))
        concept, prompt = (embedded @ references.T).mean(1), (embedded * named).sum(1)
        return {"CLIP-I concept": concept.numpy(), "CLIP-T prompt": prompt.numpy()}

    return scores


def _folder(variable: str) -> Path:
    folder = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not folder.is_dir():
        raise RepositoryError(f"{variable}: must name a folder, got {os.environ.get(variable, '')!r}; see docs/gate.md")
    return folder


def _read_pictures(folder: Path) -> list[Images]:
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in KINDS)
    if not files:
        raise RepositoryError(f"{folder}: must hold reference pictures ({', '.join(KINDS)}), got none; add some")
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    return pictures


def _embed_images(model: Any, processor: Any, images: list[Images]) -> Tensor:
    """Unit vectors (N, D)."""
    pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        return _unit(_pooled(model.get_image_features(**pixels)))


def _pooled(output: Any) -> Tensor:
    """transformers 5 returns an output object here, transformers 4 the tensor itself."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
