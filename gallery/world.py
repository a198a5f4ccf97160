"""The world: seeded scenes, their captions and their 64x64 pictures. Knows nothing of models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .backgrounds import BACKGROUNDS
from .looks import LOOKS, RGB, Look, Painter, random_look
from .subjects import OBJECTS, Identity, Pose, draw_subject, shaded

Rng = np.random.Generator

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 44),
    "orange": (244, 134, 30),
    "yellow": (248, 214, 50),
    "green": (52, 160, 70),
    "blue": (42, 96, 214),
    "purple": (132, 60, 176),
    "pink": (244, 138, 180),
    "white": (246, 244, 240),
    "black": (44, 42, 48),
    "brown": (128, 80, 48),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
ACCESSORIES = ("none", "scarf", "hat", "bow")
MARKS = ("none", "star", "heart", "patch", "band")
PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach"),
    "forest": ("in the forest", "in a forest"),
    "snow": ("in the snow",),
    "city": ("in the city", "in a city"),
    "kitchen": ("in the kitchen", "in a kitchen"),
    "desert": ("in the desert",),
    "night": ("under the night sky", "at night"),
    "meadow": ("in the meadow", "in a meadow"),
}
LOOK_NAMES = tuple(LOOKS)


@dataclass(frozen=True)
class Scene:
    """One picture in words: names only, plus the pose."""

    object: str
    colour: str
    pattern: str
    second: str
    accessory: str
    accessory_colour: str
    background: str
    look: str
    pose: Pose


@dataclass(frozen=True)
class Concept:
    """A frozen parameter set the world can draw in any scene: a subject or a look, never both."""

    subject: Identity | None = None
    look: Look | None = None


def random_pose(rng: Rng) -> Pose:
    """A place for the subject, mostly visible."""
    scale = float(rng.uniform(0.3, 0.39))
    return Pose(float(rng.uniform(0.36, 0.64)), float(rng.uniform(0.52, 0.64)), scale, bool(rng.random() < 0.5))


def random_scene(rng: Rng) -> Scene:
    """Draw a scene: every facet independent, two colours never the same."""
    names = list(COLOURS)
    first, second = rng.choice(names, 2, replace=False)
    pattern = str(rng.choice(PATTERNS, p=[0.4, 0.2, 0.2, 0.2]))
    accessory = str(rng.choice(ACCESSORIES, p=[0.49, 0.17, 0.17, 0.17]))
    look = str(rng.choice(LOOK_NAMES, p=[0.84, 0.08, 0.08]))
    worn = str(rng.choice([n for n in names if n != first]))
    thing, place = str(rng.choice(list(OBJECTS))), str(rng.choice(list(PLACES)))
    return Scene(thing, str(first), pattern, str(second), accessory, worn, place, look, random_pose(rng))


def identity_of(scene: Scene) -> Identity:
    """The plain inhabitant that a scene's words describe."""
    body = COLOURS[scene.colour]
    return Identity(
        scene.object,
        body,
        COLOURS[scene.second],
        shaded(body),
        scene.pattern,
        accessory=scene.accessory,
        accessory_colour=COLOURS[scene.accessory_colour],
    )


def random_identity(rng: Rng, *, wide: bool = True) -> Identity:
    """A subject with its own colours (any RGB if `wide`), marks, pattern and accessory."""
    base = [COLOURS[n] for n in COLOURS]

    def colour() -> RGB:
        if not wide or rng.random() < 0.35:
            return base[int(rng.integers(len(base)))]
        r, g, b = (int(v) for v in rng.integers(0, 256, 3))
        return r, g, b

    body = colour()
    accent = shaded(body) if rng.random() < 0.35 else colour()
    return Identity(
        str(rng.choice(list(OBJECTS))),
        body,
        colour(),
        accent,
        str(rng.choice(PATTERNS, p=[0.46, 0.18, 0.18, 0.18])),
        str(rng.choice(MARKS, p=[0.4, 0.15, 0.15, 0.15, 0.15])),
        colour(),
        str(rng.choice(ACCESSORIES, p=[0.4, 0.2, 0.2, 0.2])),
        colour(),
    )


def _picture(subject: Identity, look: Look, scene: Scene, rng: Rng) -> np.ndarray:
    painter = Painter(look)
    BACKGROUNDS[scene.background](painter, rng)
    if look.grid:
        painter.grid()
    draw_subject(painter, subject, scene.pose)
    return painter.pixels()


def render(scene: Scene, rng: Rng) -> np.ndarray:
    """Draw a scene, uint8 (64, 64, 3); `rng` moves the background's details."""
    return _picture(identity_of(scene), LOOKS[scene.look], scene, rng)


def render_concept(concept: Concept, scene: Scene, rng: Rng) -> np.ndarray:
    """Draw a scene with the concept in it: its subject instead of the scene's, or its look over the whole."""
    subject = concept.subject or identity_of(scene)
    return _picture(subject, concept.look or LOOKS[scene.look], replace(scene, object=subject.kind), rng)


def random_concept(rng: Rng) -> Concept:
    """A concept nobody named: four subjects for every look."""
    if rng.random() < 0.8:
        return Concept(subject=random_identity(rng))
    return Concept(look=random_look(rng))


def article(words: str) -> str:
    """Return the words behind `a` or `an`."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def subject_words(scene: Scene, rng: Rng) -> str:
    """`red and white striped dog wearing a blue hat`, with words sometimes left out; line looks have no colours."""
    lined = LOOKS[scene.look].line
    words = [scene.object]
    if not lined and scene.pattern != "plain" and rng.random() < 0.85:
        words.insert(0, scene.pattern)
        if rng.random() < 0.75:
            words[0:0] = [scene.colour, "and", scene.second]
        elif rng.random() < 0.5:
            words.insert(0, scene.colour)
    elif not lined and scene.pattern == "plain" and rng.random() < 0.8:
        words[0:0] = [scene.colour] if rng.random() < 0.75 else ["plain", scene.colour]
    if scene.accessory != "none" and rng.random() < 0.85:
        worn = article(
            f"{scene.accessory_colour} {scene.accessory}" if not lined and rng.random() < 0.85 else scene.accessory
        )
        words += [str(rng.choice(["wearing", "with"])), worn]
    return " ".join(words)


def caption(scene: Scene, rng: Rng, *, subject: str | None = None) -> str:
    """One caption of a scene; `subject` replaces the words for its object."""
    noun = subject or article(subject_words(scene, rng))
    place = str(rng.choice(PLACES[scene.background]))
    look = scene.look if scene.look != "photo" else str(rng.choice(["photo", "photo", "picture"]))
    kind = article(look)
    templates = [
        f"{kind} of {noun} {place}",
        f"{kind} of {noun} {place}",
        f"{noun} {place}, {look}",
        f"{place}, {kind} of {noun}",
    ]
    if scene.look == "photo":
        templates += [f"{noun} {place}", f"{noun} {place}"]
        if rng.random() < 0.06:
            return f"{kind} of {noun}"
    return str(rng.choice(templates))


def captioned_scene(rng: Rng) -> tuple[np.ndarray, str]:
    """A training pair: mostly plain inhabitants, one in seven a stranger whose colours no word names."""
    scene = random_scene(rng)
    if rng.random() > 0.14:
        return render(scene, rng), caption(scene, rng)
    stranger = random_identity(rng)
    scene = replace(scene, object=stranger.kind, look="photo")
    return render_concept(Concept(subject=stranger), scene, rng), caption(scene, rng, subject=article(stranger.kind))
