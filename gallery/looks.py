"""Looks: how a whole scene is rendered (fills, outlines, line drawings). A style concept is a look of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
SIZE = 64
OVER = 3  # supersampling: scenes are drawn at 192 px and box-filtered to 64 px
CANVAS = SIZE * OVER


@dataclass(frozen=True)
class Look:
    """A rendering rule for a whole scene."""

    line: bool  # True: only outlines in `ink` on `paper`
    ink: RGB
    width: int  # outline width in canvas pixels
    paper: RGB = (245, 240, 230)
    tint: RGB = (255, 255, 255)
    mix: float = 0.0  # how far every fill moves towards `tint`
    grid: bool = False


LOOKS: dict[str, Look] = {
    "photo": Look(line=False, ink=(42, 36, 40), width=3),
    "sketch": Look(line=True, ink=(70, 66, 72), width=3),
    "poster": Look(line=False, ink=(10, 8, 12), width=7, tint=(255, 214, 90), mix=0.4),
}


def mixed(colour: RGB, other: RGB, share: float) -> RGB:
    """Return `colour` moved towards `other` by `share` in 0..1."""
    a, b, c = (round(x + (y - x) * share) for x, y in zip(colour, other, strict=True))
    return a, b, c


def random_look(rng: np.random.Generator) -> Look:
    """Draw a look that no caption names; the VAE and the identity judge see these."""
    ink, paper, tint = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(3))
    line = bool(rng.random() < 0.5)
    if line:  # lines must be visible: push ink and paper apart
        light, dark = mixed(ink, (255, 255, 255), 0.7), mixed(paper, (0, 0, 0), 0.5)
        ink, paper = (light, dark) if rng.random() < 0.6 else (dark, light)
    return Look(
        line, ink, int(rng.integers(3, 9)), paper, tint, float(rng.uniform(0.2, 0.65)), bool(rng.random() < 0.4)
    )


class Painter:
    """Draws primitives on one canvas under one look. Coordinates are canvas pixels."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.image = Image.new("RGB", (CANVAS, CANVAS), look.paper)
        self.draw = ImageDraw.Draw(self.image)

    def colour(self, fill: RGB) -> RGB:
        """The colour this look gives to a fill."""
        return self.look.paper if self.look.line else mixed(fill, self.look.tint, self.look.mix)

    def shape(self, kind: str, points: list[tuple[float, float]], fill: RGB, *, outline: bool = False) -> None:
        """Draw one `ellipse`, `rect`, `round` or `poly`; line looks always outline it."""
        drawn = self.look.line or outline
        draw_primitive(
            self.draw,
            kind,
            points,
            self.colour(fill),
            self.look.ink if drawn else None,
            self.look.width if drawn else 0,
        )

    def grid(self) -> None:
        """Draw the thin squared paper of a blueprint."""
        soft = mixed(self.look.paper, self.look.ink, 0.3)
        for at in range(12, CANVAS, 24):
            self.draw.line([(at, 0), (at, CANVAS)], fill=soft, width=2)
            self.draw.line([(0, at), (CANVAS, at)], fill=soft, width=2)

    def pixels(self) -> np.ndarray:
        """Return the finished picture, uint8 (64, 64, 3)."""
        return np.asarray(self.image.reduce(OVER))


def draw_primitive(
    draw: ImageDraw.ImageDraw,
    kind: str,
    points: list[tuple[float, float]],
    fill: RGB | int,
    ink: RGB | int | None,
    width: int,
) -> None:
    """Draw a primitive; two points are a box for every kind but `poly`."""
    if kind == "poly":
        draw.polygon(points, fill=fill)
        if ink is not None:
            draw.line([*points, points[0]], fill=ink, width=width, joint="curve")
        return
    (x0, y0), (x1, y1) = points
    box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    if kind == "ellipse":
        draw.ellipse(box, fill=fill, outline=ink, width=width)
    elif kind == "round":
        draw.rounded_rectangle(
            box, radius=min(box[2] - box[0], box[3] - box[1]) * 0.3, fill=fill, outline=ink, width=width
        )
    else:
        draw.rectangle(box, fill=fill, outline=ink, width=width)
