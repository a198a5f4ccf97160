"""The world is seeded, and its captions say what its pictures show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gallery.concepts import CONCEPTS, concept_caption, evaluation_prompts, reference_images, reference_pairs, siblings
from gallery.world import (
    COLOURS,
    OBJECTS,
    PLACES,
    Concept,
    caption,
    captioned_scene,
    random_identity,
    random_scene,
    render,
    render_concept,
)


def test_the_same_seed_draws_the_same_picture_and_caption() -> None:
    first, second = (captioned_scene(np.random.default_rng(3)) for _ in range(2))
    assert first[1] == second[1]
    assert np.array_equal(first[0], second[0])


def test_another_seed_draws_another_picture() -> None:
    assert not np.array_equal(
        captioned_scene(np.random.default_rng(3))[0], captioned_scene(np.random.default_rng(4))[0]
    )


def test_pictures_are_small_rgb() -> None:
    rng = np.random.default_rng(0)
    for thing in OBJECTS:
        for place in PLACES:
            picture = render(replace(random_scene(rng), object=thing, background=place), rng)
            assert picture.shape == (64, 64, 3)
            assert picture.dtype == np.uint8
            assert picture.std() > 5


def test_a_caption_names_the_object_the_place_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = random_scene(rng)
        words = caption(scene, rng).replace(",", "").split()
        assert [w for w in words if w in OBJECTS] == [scene.object]
        places = [name for name, phrases in PLACES.items() if any(p in " ".join(words) for p in phrases)]
        assert places in ([scene.background], [])
        assert set(words) & set(COLOURS) <= {scene.colour, scene.second, scene.accessory_colour}


def test_a_subject_keeps_its_identity_and_takes_the_scene() -> None:
    rng = np.random.default_rng(2)
    subject = random_identity(rng)
    scene = replace(random_scene(rng), look="photo", background="snow")
    first = render_concept(Concept(subject=subject), scene, np.random.default_rng(0))
    moved = render_concept(Concept(subject=subject), replace(scene, background="night"), np.random.default_rng(0))
    assert np.abs(first.astype(int) - moved).mean() > 20


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_concept_has_references_prompts_and_captions_with_its_trigger(name: str) -> None:
    assert np.array_equal(reference_images(name, 3, 8), reference_images(name, 3, 8))
    prompts = evaluation_prompts(name)
    assert len(prompts) >= 12
    assert all(CONCEPTS[name].trigger in p for p in prompts)
    assert evaluation_prompts({"id": name}) == prompts
    scene = reference_pairs(name, 1, 0)[0][1]
    assert CONCEPTS[name].trigger in concept_caption(CONCEPTS[name], scene, np.random.default_rng(0))


def test_the_gallery_has_confusable_siblings() -> None:
    assert len(siblings("biscuit-the-dog")) == 2
    assert len(siblings("trail-backpack")) == 2
    assert siblings("moss-mug") == ["grandmas-mug"]
    assert siblings("blueprint-look") == ["pastel-outline"]
