"""The committed weights load with diffusers, the cards are complete, and the scores meet the bars."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gallery.concepts import CONCEPTS
from gallery.deltas import load_pipeline
from gallery.record import BASE, CHECKPOINTS, HERE
from gallery.tidy import shipped_files
from gallery.tokens import RARE, build_tokenizer, word_list

CARD_KEYS = {"id", "name", "kind", "base", "trigger", "class_noun", "description", "tags", "example_prompts", "source"}


@pytest.fixture(scope="module")
def base() -> object:
    return load_pipeline(None)


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_checkpoint_loads_with_diffusers_and_changes_the_picture(name: str, base: object) -> None:
    pipe = load_pipeline(name)
    tokens = pipe.tokenizer(pipe.maybe_convert_prompt(f"a {CONCEPTS[name].trigger}", pipe.tokenizer)).input_ids
    assert len(tokens) <= 6  # every trigger is a few whole tokens, not letters
    prompt = f"a photo of {CONCEPTS[name].trigger} {CONCEPTS[name].noun}"
    assert np.abs(_picture(pipe, prompt) - _picture(base, prompt)).mean() > 0.01
    processors = {type(p).__name__ for p in pipe.unet.attn_processors.values()}
    assert ("CustomDiffusionAttnProcessor" in processors) == (CONCEPTS[name].kind == "custom_diffusion")


def _picture(pipe: object, prompt: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt, num_inference_steps=2, guidance_scale=1.0, generator=generator, height=64, width=64, output_type="np"
    ).images  # type: ignore[operator]


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_card_is_complete_and_agrees_with_the_concept(name: str) -> None:
    card = json.loads((CHECKPOINTS / name / "card.json").read_text())
    assert set(card) == CARD_KEYS
    assert (card["id"], card["kind"], card["base"]) == (name, CONCEPTS[name].kind, "toyworld")
    assert (card["trigger"], card["class_noun"]) == ([CONCEPTS[name].trigger], CONCEPTS[name].noun)
    assert (CHECKPOINTS / name / "README.md").read_text().startswith("---\n")


def test_all_checkpoint_folders_are_known() -> None:
    assert {p.name for p in CHECKPOINTS.iterdir() if p.is_dir()} == set(CONCEPTS)


def test_the_base_is_small_half_precision_and_readable() -> None:
    files = list(BASE.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in BASE.rglob("*") if f.is_file()) <= 24e6
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in files)
    with safe_open(BASE / "unet" / "diffusion_pytorch_model.safetensors", "np") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"F16"}  # noqa: SIM118
    assert sum(f.stat().st_size for f in shipped_files()) <= 80e6  # a wheel stays under 100 MB


def test_no_pickles_are_shipped() -> None:
    assert not [f for f in (HERE / "repository").rglob("*") if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_every_word_and_rare_trigger_is_one_token() -> None:
    tokenizer = build_tokenizer()
    assert set(RARE) <= set(word_list())
    assert [w for w in word_list() if len(tokenizer.tokenize(w)) != 1] == []


def test_the_scores_meet_the_bars() -> None:
    scores = json.loads((HERE / "scores.json").read_text())
    assert scores["base"]["object_and_background"]["share"] >= 0.90
    heads = {k: v for k, v in scores["judges"]["classifier"].items() if k.endswith("_renders")}
    assert min(heads.values()) >= 0.98
    assert scores["judges"]["identity"]["retrieval"] >= 0.98
    assert set(scores["concepts"]) == set(CONCEPTS)
    for name, row in scores["concepts"].items():
        assert row["ratio"] >= 0.8, name
        for other, sibling in row["siblings"].items():
            assert row["concept"]["interval"][0] > sibling["interval"][1], (name, other)
