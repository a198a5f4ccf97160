"""The judges read fresh renders right, and prompts name what they should name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gallery.concepts import CONCEPTS, reference_images, siblings
from gallery.judge import HEADS, Judge, named_facets
from gallery.looks import LOOKS
from gallery.subjects import OBJECTS
from gallery.world import ACCESSORIES, COLOURS, PATTERNS, PLACES, caption, random_scene, render

N = 400


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_the_heads_are_the_worlds_own_words() -> None:
    assert HEADS["object"] == tuple(OBJECTS)
    assert HEADS["colour"] == tuple(COLOURS)
    assert HEADS["pattern"] == PATTERNS
    assert HEADS["background"] == tuple(PLACES)
    assert HEADS["accessory"] == ACCESSORIES
    assert HEADS["look"] == tuple(LOOKS)


def test_every_head_is_right_on_fresh_renders(judge: Judge) -> None:
    rng = np.random.default_rng(31337)
    scenes = [random_scene(rng) for _ in range(N)]
    found = judge.facets(np.stack([render(s, rng) for s in scenes]))
    for head in HEADS:
        seen = [i for i, s in enumerate(scenes) if s.look != "sketch" or head not in ("colour", "pattern")]
        assert np.mean([found[head][i] == getattr(scenes[i], head) for i in seen]) >= 0.97, head


def test_a_picture_scores_its_own_caption_above_another(judge: Judge) -> None:
    rng = np.random.default_rng(5)
    scenes = [replace(random_scene(rng), look="photo") for _ in range(40)]
    images = np.stack([render(s, rng) for s in scenes])
    prompts = [caption(s, rng) for s in scenes]
    own, other = judge.prompt_score(images, prompts), judge.prompt_score(images, prompts[1:] + prompts[:1])
    assert own.dtype == np.float32
    assert own.mean() > 0.9
    assert other.mean() < 0.6


@pytest.mark.parametrize("name", [n for n in CONCEPTS if siblings(n)])
def test_real_renders_score_above_their_siblings(judge: Judge, name: str) -> None:
    references = reference_images(name, 8, 1)
    own = judge.concept_score(reference_images(name, 8, 2), references)
    assert own.shape == (8,)
    for other in siblings(name):
        assert own.mean() > judge.concept_score(reference_images(other, 8, 2), references).mean() + 0.2


def test_images_of_the_wrong_kind_are_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="uint8"):
        judge.embed(np.zeros((1, 64, 64, 3), np.float32))


@pytest.mark.parametrize(
    ("prompt", "facets"),
    [
        ("a photo of sks dog on the beach", {"object": "dog", "background": "beach"}),
        (
            "a red and white striped mug with a blue hat at night",
            {"object": "mug", "background": "night", "accessory": "hat", "pattern": "striped", "colour": "red"},
        ),
        ("a dog wearing a green scarf in the snow", {"object": "dog", "background": "snow", "accessory": "scarf"}),
        ("a photo of <moss-mug> in the kitchen", {"object": "mug", "background": "kitchen"}),
    ],
)
def test_a_prompt_names_its_facets(prompt: str, facets: dict[str, str]) -> None:
    assert named_facets(prompt) == facets
