"""The CLIP judge scores what CLIP computes, from a folder of the user's, and says in one line what is missing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalq.errors import RepositoryError
from tests.conftest import tiny_text_config, tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A random CLIP, saved as transformers saves it."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'personalq[export]'")
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = tiny_text_config(tokenizer).to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=16))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def pictures(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, 40, 40, 3), dtype=np.uint8)


def test_scores_are_cosines_of_the_models_embeddings(model_dir, tmp_path, monkeypatch):
    from calibration.clip_judge import judge

    (tmp_path / "rex").mkdir()
    for i, image in enumerate(pictures(1, 2)):
        Image.fromarray(image).save(tmp_path / "rex" / f"{i}.png")
    monkeypatch.setenv("PERSONALQ_CLIP", str(model_dir))
    monkeypatch.setenv("PERSONALQ_REFERENCES", str(tmp_path))
    scores = judge("rex")(pictures(1, 2), ["a photo of dog", "red mug"])
    assert set(scores) == {"CLIP-I concept", "CLIP-T prompt"}
    assert all(value.shape == (2,) and (np.abs(value) <= 1.0001).all() for value in scores.values())
    # The references themselves: each picture's cosine to itself is 1, to the other the same for both.
    assert scores["CLIP-I concept"][0] == pytest.approx(scores["CLIP-I concept"][1], abs=1e-5)
    assert judge("rex")(pictures(1, 2), ["red mug", "red mug"])["CLIP-T prompt"][1] == pytest.approx(
        scores["CLIP-T prompt"][1], abs=1e-5
    )


def test_what_is_missing_is_one_line(model_dir, tmp_path, monkeypatch):
    from calibration.clip_judge import judge

    monkeypatch.delenv("PERSONALQ_CLIP", raising=False)
    with pytest.raises(RepositoryError, match="PERSONALQ_CLIP: must name a folder, got ''"):
        judge("rex")
    monkeypatch.setenv("PERSONALQ_CLIP", str(model_dir))
    monkeypatch.setenv("PERSONALQ_REFERENCES", str(tmp_path))
    with pytest.raises(RepositoryError, match="rex: must hold reference pictures"):
        judge("rex")
