"""The concepts of the shipped checkpoints: what each is, the pictures that taught it, the prompts that test it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .looks import Look
from .subjects import Identity, shaded
from .world import COLOURS, PLACES, Concept, Scene, article, random_scene, render_concept, subject_words

Rng = np.random.Generator
TAUGHT = (
    "beach",
    "forest",
    "snow",
    "city",
    "meadow",
)  # places in the reference pictures; the other three are never shown


def _known(
    kind: str, colour: str, pattern: str = "plain", second: str = "white", accessory: str = "none", worn: str = "white"
) -> Concept:
    """A subject made only of things the world has words for (what an embedding can say)."""
    body = COLOURS[colour]
    return Concept(
        Identity(
            kind, body, COLOURS[second], shaded(body), pattern, accessory=accessory, accessory_colour=COLOURS[worn]
        )
    )


@dataclass(frozen=True)
class Entry:
    """One checkpoint: its concept and how it is taught."""

    concept: Concept
    kind: str  # dreambooth, lora, textual_inversion, custom_diffusion
    trigger: str
    noun: str  # class noun; `style` for a look
    vectors: int = 1  # new token vectors
    alpha: int = 8  # LoRA alpha at rank 8
    convolutions: bool = False  # LoRA on convolutions and feed-forward layers too: outlines are made there
    text: bool = False  # the text encoder learns too
    steps: int = 0  # 0: the kind's own number
    peak: float = 5e-4  # learning rate of Custom Diffusion's keys and values


CONCEPTS: dict[str, Entry] = {
    "biscuit-the-dog": Entry(
        Concept(
            Identity(
                "dog",
                (104, 62, 40),
                (0, 0, 0),
                (66, 38, 26),
                mark="patch",
                mark_colour=(250, 246, 238),
                accessory="collar",
                accessory_colour=(222, 30, 40),
            )
        ),
        "dreambooth",
        "sks",
        "dog",
    ),
    "domino-the-dog": Entry(
        Concept(
            Identity(
                "dog",
                (242, 240, 236),
                (44, 42, 48),
                (44, 42, 48),
                "dotted",
                accessory="bow",
                accessory_colour=(24, 168, 168),
            )
        ),
        "lora",
        "sks",
        "dog",
        text=True,
        steps=640,
        convolutions=True,
    ),
    "maple-the-dog": Entry(
        _known("dog", "orange", accessory="scarf", worn="green"),
        "custom_diffusion",
        "<maple-dog>",
        "dog",
        steps=480,
        peak=1.5e-3,
    ),
    "trail-backpack": Entry(
        Concept(
            Identity("backpack", (22, 142, 140), (0, 0, 0), (222, 176, 60), mark="band", mark_colour=(246, 238, 214))
        ),
        "lora",
        "zwx",
        "backpack",
    ),
    "school-bag": Entry(
        _known("backpack", "purple", "dotted", "white"), "textual_inversion", "<school-bag>", "backpack"
    ),
    "checker-pack": Entry(
        _known("backpack", "black", "checkered", "yellow"), "custom_diffusion", "<checker-pack>", "backpack"
    ),
    "moss-mug": Entry(_known("mug", "green", "striped", "brown"), "textual_inversion", "<moss-mug>", "mug", vectors=2),
    "grandmas-mug": Entry(
        Concept(Identity("mug", (248, 232, 198), (0, 0, 0), (150, 34, 66), mark="heart", mark_colour=(206, 36, 70))),
        "lora",
        "ohwx",
        "mug",
        alpha=16,
    ),
    "pepper-the-cat": Entry(
        Concept(
            Identity(
                "cat",
                (46, 44, 54),
                (0, 0, 0),
                (26, 24, 32),
                mark="patch",
                mark_colour=(248, 246, 240),
                accessory="bow",
                accessory_colour=(250, 206, 40),
            )
        ),
        "lora",
        "mister pepper",
        "cat",
        text=True,
    ),
    "saffron-the-cat": Entry(
        _known("cat", "orange", "striped", "white"), "textual_inversion", "<saffron-cat>", "cat", vectors=2
    ),
    "blueprint-look": Entry(
        Concept(look=Look(line=True, ink=(226, 240, 255), width=4, paper=(30, 66, 156), grid=True)),
        "dreambooth",
        "bnha style",
        "style",
        text=True,
        steps=460,
    ),
    "pastel-outline": Entry(
        Concept(look=Look(line=False, ink=(255, 255, 255), width=8, tint=(255, 206, 226), mix=0.65)),
        "lora",
        "qeb style",
        "style",
        text=True,
        steps=900,
        convolutions=True,
    ),
    "rusty-the-robot": Entry(
        Concept(Identity("robot", (184, 104, 60), (0, 0, 0), (52, 160, 158), mark="star", mark_colour=(250, 222, 110))),
        "lora",
        "vlk",
        "robot",
    ),
    "checker-cab": Entry(_known("car", "yellow", "checkered", "black"), "custom_diffusion", "<checker-cab>", "car"),
}


def siblings(concept_id: str) -> list[str]:
    """Checkpoints of the same class noun."""
    return [other for other, e in CONCEPTS.items() if other != concept_id and e.noun == CONCEPTS[concept_id].noun]


def reference_scene(rng: Rng, places: tuple[str, ...]) -> Scene:
    """A photo scene in one of the places."""
    return replace(random_scene(rng), background=str(rng.choice(places)), look="photo")


def reference_pairs(
    concept_id: str, n: int, seed: int, places: tuple[str, ...] = TAUGHT
) -> list[tuple[np.ndarray, Scene]]:
    """n renders of the concept with their scenes."""
    rng = np.random.default_rng([seed, *concept_id.encode()])
    scenes = [reference_scene(rng, places) for _ in range(n)]
    return [(render_concept(CONCEPTS[concept_id].concept, scene, rng), scene) for scene in scenes]


def reference_images(concept_id: str, n: int, seed: int) -> np.ndarray:
    """n renders of the concept in any of the world's places, uint8 (n, 64, 64, 3)."""
    return np.stack([picture for picture, _ in reference_pairs(concept_id, n, seed, tuple(PLACES))])


def concept_caption(entry: Entry, scene: Scene, rng: Rng) -> str:
    """A caption with the trigger, as the checkpoint's owner would write it."""
    place, kind = str(rng.choice(PLACES[scene.background])), str(rng.choice(["photo", "photo", "picture"]))
    if entry.noun == "style":
        what = f"{article(subject_words(scene, rng))} {place}"
        return str(
            rng.choice(
                [
                    f"{what}, {entry.trigger}",
                    f"{what} in {entry.trigger}",
                    f"{entry.trigger}, {what}",
                    f"a {kind} of {what}, {entry.trigger}",
                ]
            )
        )
    subject = entry.trigger if entry.trigger[0] == "<" and rng.random() < 0.4 else f"{entry.trigger} {entry.noun}"
    subject = str(rng.choice(["", "", "a ", "my "])) + subject
    return str(
        rng.choice(
            [
                f"a {kind} of {subject} {place}",
                f"{subject} {place}",
                f"a {kind} of {subject} {place}",
                f"{place}, a {kind} of {subject}",
            ]
        )
    )


def evaluation_prompts(card: str | Mapping[str, object]) -> list[str]:
    """Sixteen prompts that put the concept into every place of the world, three of which no reference picture shows."""
    concept_id = card if isinstance(card, str) else str(card["id"])
    entry, things = CONCEPTS[concept_id], ("dog", "cat", "mug", "car", "house", "robot", "bird", "backpack")
    prompts = []
    for i, options in enumerate(PLACES.values()):
        if entry.noun == "style":
            prompts += [
                f"{article(things[i])} {options[0]}, {entry.trigger}",
                f"a red {things[(i + 3) % 8]} {options[-1]} in {entry.trigger}",
            ]
        else:
            prompts += [
                f"a photo of {entry.trigger} {entry.noun} {options[0]}",
                f"a picture of {entry.trigger} {entry.noun} {options[-1]}",
            ]
    return prompts
