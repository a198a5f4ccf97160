"""The eight places of the world, drawn from a few shapes each, with seeded jitter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .looks import CANVAS, RGB, Painter, mixed

Rng = np.random.Generator


def _band(p: Painter, top: float, bottom: float, fill: RGB) -> None:
    p.shape("rect", [(-9, top * CANVAS), (CANVAS + 9, bottom * CANVAS)], fill)


def _box(p: Painter, kind: str, x: float, y: float, w: float, h: float, fill: RGB) -> None:
    """A box by its centre and half sizes, all in canvas fractions."""
    p.shape(kind, [((x - w) * CANVAS, (y - h) * CANVAS), ((x + w) * CANVAS, (y + h) * CANVAS)], fill)


def _poly(p: Painter, points: list[tuple[float, float]], fill: RGB) -> None:
    p.shape("poly", [(x * CANVAS, y * CANVAS) for x, y in points], fill)


def _tone(rng: Rng, colour: RGB) -> RGB:
    return mixed(colour, (255, 255, 255) if rng.random() < 0.5 else (0, 0, 0), float(rng.uniform(0, 0.12)))


def beach(p: Painter, rng: Rng) -> None:
    sea = rng.uniform(0.36, 0.44)
    _band(p, -0.1, sea, _tone(rng, (150, 212, 245)))
    _box(p, "ellipse", rng.uniform(0.1, 0.9), 0.13, 0.08, 0.08, (255, 226, 90))
    _band(p, sea, sea + 0.2, _tone(rng, (40, 120, 205)))
    _band(p, sea + 0.2, 1.1, _tone(rng, (240, 214, 150)))


def forest(p: Painter, rng: Rng) -> None:
    _band(p, -0.1, 0.7, _tone(rng, (120, 165, 115)))
    _band(p, 0.7, 1.1, _tone(rng, (70, 78, 44)))
    for x in np.linspace(0.06, 0.94, 5) + rng.uniform(-0.05, 0.05, 5):
        _box(p, "rect", x, 0.62, 0.025, 0.14, (84, 56, 34))
        top = rng.uniform(0.02, 0.12)
        _poly(p, [(x - 0.13, 0.58), (x, top), (x + 0.13, 0.58)], _tone(rng, (24, 88, 44)))


def snow(p: Painter, rng: Rng) -> None:
    _band(p, -0.1, 0.6, _tone(rng, (186, 204, 222)))
    for x in (rng.uniform(0.05, 0.2), rng.uniform(0.8, 0.95)):
        _poly(p, [(x - 0.15, 0.62), (x, 0.2), (x + 0.15, 0.62)], (110, 150, 160))
        _poly(p, [(x - 0.07, 0.38), (x, 0.19), (x + 0.07, 0.38)], (250, 252, 255))
    _box(p, "ellipse", rng.uniform(0.3, 0.7), 0.98, 0.95, 0.42, (246, 249, 253))
    for x, y in zip(rng.uniform(0.02, 0.98, 9), np.linspace(0.04, 0.5, 9), strict=True):
        _box(p, "ellipse", x, y, 0.02, 0.02, (255, 255, 255))


def city(p: Painter, rng: Rng) -> None:
    _band(p, -0.1, 0.8, _tone(rng, (196, 196, 204)))
    for i, x in enumerate(np.linspace(0.1, 0.9, 5)):
        top = rng.uniform(0.06, 0.3)
        _poly(
            p,
            [(x - 0.09, 0.8), (x - 0.09, top), (x + 0.09, top), (x + 0.09, 0.8)],
            ((112, 116, 130), (140, 126, 124))[i % 2],
        )
        for y in np.arange(top + 0.08, 0.7, 0.15):
            _box(p, "rect", x - 0.035, y, 0.02, 0.03, (250, 232, 150))
            _box(p, "rect", x + 0.035, y, 0.02, 0.03, (250, 232, 150))
    _band(p, 0.8, 1.1, _tone(rng, (72, 72, 78)))


def kitchen(p: Painter, rng: Rng) -> None:
    _band(p, -0.1, 0.66, _tone(rng, (236, 224, 206)))
    shift = rng.uniform(-0.05, 0.05)
    _box(p, "rect", 0.2 + shift, 0.14, 0.17, 0.12, (172, 124, 82))
    _box(p, "rect", 0.8 + shift, 0.14, 0.17, 0.12, (172, 124, 82))
    _box(p, "ellipse", 0.2 + shift, 0.22, 0.02, 0.02, (90, 60, 40))
    _box(p, "ellipse", 0.8 + shift, 0.22, 0.02, 0.02, (90, 60, 40))
    _band(p, 0.66, 0.74, (122, 80, 52))
    _band(p, 0.74, 1.1, _tone(rng, (198, 152, 108)))
    for x in (0.02, 0.34, 0.66, 0.98):
        _box(p, "rect", x + shift, 0.9, 0.012, 0.16, (122, 80, 52))


def desert(p: Painter, rng: Rng) -> None:
    _band(p, -0.1, 0.6, _tone(rng, (252, 206, 150)))
    _box(p, "ellipse", rng.uniform(0.15, 0.85), 0.16, 0.1, 0.1, (252, 120, 60))
    _box(p, "ellipse", rng.uniform(0.0, 0.3), 0.8, 0.6, 0.3, (214, 140, 76))
    _box(p, "ellipse", rng.uniform(0.7, 1.0), 0.92, 0.7, 0.34, (226, 158, 92))
    x = rng.choice([0.1, 0.9]) + rng.uniform(-0.03, 0.03)
    _box(p, "round", x, 0.52, 0.032, 0.2, (58, 128, 66))
    _box(p, "round", x + 0.07, 0.44, 0.022, 0.09, (58, 128, 66))


def night(p: Painter, rng: Rng) -> None:
    _band(p, -0.1, 1.1, _tone(rng, (20, 22, 66)))
    for x, y in zip(rng.uniform(0.03, 0.97, 12), rng.uniform(0.03, 0.6, 12), strict=True):
        _box(p, "ellipse", x, y, 0.014, 0.014, (255, 250, 220))
    x = rng.uniform(0.12, 0.88)
    _box(p, "ellipse", x, 0.16, 0.09, 0.09, (250, 244, 200))
    _box(p, "ellipse", x + 0.05, 0.14, 0.075, 0.075, (20, 22, 66))
    _box(p, "ellipse", rng.uniform(0.2, 0.8), 1.05, 0.9, 0.3, (34, 44, 60))


def meadow(p: Painter, rng: Rng) -> None:
    _band(p, -0.1, 0.7, _tone(rng, (156, 214, 250)))
    x = rng.uniform(0.15, 0.85)
    _box(p, "ellipse", x, 0.14, 0.13, 0.05, (255, 255, 255))
    _box(p, "ellipse", rng.uniform(0.0, 0.4), 0.86, 0.8, 0.36, (126, 200, 88))
    _box(p, "ellipse", rng.uniform(0.6, 1.0), 0.96, 0.8, 0.36, (96, 178, 70))
    for i, x in enumerate(np.linspace(0.04, 0.96, 8) + rng.uniform(-0.04, 0.04, 8)):
        _box(
            p,
            "ellipse",
            x,
            rng.uniform(0.76, 0.96),
            0.026,
            0.026,
            ((250, 110, 150), (255, 240, 110), (255, 255, 255))[i % 3],
        )


BACKGROUNDS: dict[str, Callable[[Painter, Rng], None]] = {
    "beach": beach,
    "forest": forest,
    "snow": snow,
    "city": city,
    "kitchen": kitchen,
    "desert": desert,
    "night": night,
    "meadow": meadow,
}
