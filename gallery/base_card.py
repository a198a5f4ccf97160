"""Write the prompts of the base's card: captions that span what the world can draw. What calibrates a base runs them.

python -m gallery.base_card
"""

from __future__ import annotations

import json
import re

import numpy as np

from .record import BASE, write_text
from .subjects import OBJECTS
from .world import ACCESSORIES, COLOURS, LOOK_NAMES, PATTERNS, PLACES, Scene, caption, random_pose

PAGE = BASE / "README.md"
N_PROMPTS = 32
SEED = 18


def widget_prompts(count: int = N_PROMPTS) -> list[str]:
    """Captions in which objects, places, colours, patterns, accessories and looks take turns, each at a pace of its own."""
    rng = np.random.default_rng(SEED)
    return [caption(_scene(i, rng), rng) for i in range(count)]


def _scene(i: int, rng: np.random.Generator) -> Scene:
    objects, places, colours = tuple(OBJECTS), tuple(PLACES), tuple(COLOURS)
    return Scene(
        object=objects[i % len(objects)],
        colour=colours[i % len(colours)],
        pattern=PATTERNS[(i + i // 8 + i // 4) % len(PATTERNS)],
        second=colours[(i + 4) % len(colours)],
        accessory=ACCESSORIES[(i // 2 + i // 8) % len(ACCESSORIES)],
        accessory_colour=colours[(3 * i + 7) % len(colours)],
        background=places[(3 * i + i // 8) % len(places)],
        look=LOOK_NAMES[max((5 * i + 3 * (i // 8)) % 8 - 5, 0)],  # three in four are photographs
        pose=random_pose(rng),
    )


def with_widget(page: str, prompts: list[str]) -> str:
    """The card with these prompts as the `widget:` of its front matter."""
    lines = "".join(f"- text: {json.dumps(prompt)}\n" for prompt in prompts)
    end = page.index("\n---\n", 4) + 1
    before = re.sub(r"^widget:\n(?:- .*\n)*", "", page[:end], flags=re.M)
    return f"{before}widget:\n{lines}{page[end:]}"


def main() -> None:
    """Write the card."""
    write_text(PAGE, with_widget(PAGE.read_text(encoding="utf-8"), widget_prompts()))


if __name__ == "__main__":
    main()
