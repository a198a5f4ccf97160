"""The eight objects of the world as shapes with roles, and an identity that says how each role is painted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .looks import CANVAS, RGB, Painter, draw_primitive, mixed

Shape = tuple[str, str, list[tuple[float, float]]]  # (role, primitive, points) in a -1..1 frame, y down


@dataclass(frozen=True)
class Identity:
    """Everything that makes one subject itself, whatever the scene."""

    kind: str
    body: RGB
    second: RGB  # the other colour of the pattern
    accent: RGB  # ears, feet, handle, wheels' hub, roof ...
    pattern: str = "plain"
    mark: str = "none"
    mark_colour: RGB = (255, 255, 255)
    accessory: str = "none"
    accessory_colour: RGB = (255, 255, 255)


@dataclass(frozen=True)
class Pose:
    """Where the subject stands: centre and half size in canvas fractions."""

    x: float
    y: float
    scale: float
    flip: bool


OBJECTS: dict[str, list[Shape]] = {
    "dog": [
        ("body", "poly", [(0.5, 0.25), (0.95, -0.25), (1.0, -0.1), (0.7, 0.5)]),
        ("body", "round", [(-0.5, 0.02), (0.75, 0.62)]),
        ("accent", "round", [(-0.48, 0.5), (-0.2, 1.0)]),
        ("accent", "round", [(0.42, 0.5), (0.7, 1.0)]),
        ("body", "ellipse", [(-0.95, -0.75), (-0.05, 0.15)]),
        ("accent", "ellipse", [(-0.3, -0.75), (0.02, 0.05)]),
        ("light", "ellipse", [(-1.08, -0.35), (-0.55, 0.05)]),
        ("dark", "ellipse", [(-1.12, -0.34), (-0.9, -0.14)]),
        ("dark", "ellipse", [(-0.68, -0.52), (-0.5, -0.34)]),
    ],
    "cat": [
        ("body", "poly", [(0.45, 0.85), (0.95, 0.75), (1.0, -0.1), (0.84, -0.1), (0.78, 0.58), (0.4, 0.6)]),
        ("body", "ellipse", [(-0.55, -0.1), (0.55, 1.0)]),
        ("accent", "poly", [(-0.58, -0.45), (-0.52, -1.05), (-0.08, -0.72)]),
        ("accent", "poly", [(0.58, -0.45), (0.52, -1.05), (0.08, -0.72)]),
        ("body", "ellipse", [(-0.62, -0.85), (0.62, 0.15)]),
        ("light", "ellipse", [(-0.42, -0.5), (-0.14, -0.2)]),
        ("light", "ellipse", [(0.14, -0.5), (0.42, -0.2)]),
        ("dark", "ellipse", [(-0.32, -0.5), (-0.2, -0.2)]),
        ("dark", "ellipse", [(0.2, -0.5), (0.32, -0.2)]),
        ("dark", "poly", [(-0.1, -0.15), (0.1, -0.15), (0.0, -0.02)]),
    ],
    "backpack": [
        ("accent", "round", [(-0.3, -1.0), (0.3, -0.5)]),
        ("light", "round", [(-0.16, -0.86), (0.16, -0.5)]),
        ("accent", "round", [(-0.92, -0.1), (-0.5, 0.8)]),
        ("accent", "round", [(0.5, -0.1), (0.92, 0.8)]),
        ("body", "round", [(-0.7, -0.75), (0.7, 0.95)]),
        ("accent", "round", [(-0.48, 0.25), (0.48, 0.82)]),
        ("dark", "rect", [(-0.48, 0.36), (0.48, 0.42)]),
    ],
    "mug": [
        ("accent", "ellipse", [(0.2, -0.4), (1.05, 0.55)]),
        ("hole", "ellipse", [(0.42, -0.16), (0.82, 0.3)]),
        ("body", "round", [(-0.75, -0.7), (0.55, 0.9)]),
        ("light", "ellipse", [(-0.75, -0.88), (0.55, -0.48)]),
        ("dark", "ellipse", [(-0.62, -0.8), (0.42, -0.55)]),
    ],
    "car": [
        ("body", "poly", [(-0.6, -0.05), (-0.35, -0.6), (0.4, -0.6), (0.7, -0.05)]),
        ("glass", "poly", [(-0.42, -0.08), (-0.25, -0.48), (0.0, -0.48), (0.0, -0.08)]),
        ("glass", "poly", [(0.1, -0.08), (0.1, -0.48), (0.34, -0.48), (0.5, -0.08)]),
        ("body", "round", [(-1.05, -0.12), (1.05, 0.5)]),
        ("dark", "ellipse", [(-0.8, 0.2), (-0.28, 0.72)]),
        ("accent", "ellipse", [(-0.66, 0.34), (-0.42, 0.58)]),
        ("dark", "ellipse", [(0.3, 0.2), (0.82, 0.72)]),
        ("accent", "ellipse", [(0.44, 0.34), (0.68, 0.58)]),
        ("light", "ellipse", [(-1.08, 0.0), (-0.88, 0.2)]),
    ],
    "house": [
        ("accent", "rect", [(0.35, -1.0), (0.6, -0.4)]),
        ("body", "rect", [(-0.75, -0.2), (0.75, 0.95)]),
        ("accent", "poly", [(-1.0, -0.15), (0.0, -0.95), (1.0, -0.15)]),
        ("dark", "rect", [(-0.18, 0.35), (0.18, 0.95)]),
        ("glass", "rect", [(-0.6, 0.05), (-0.28, 0.4)]),
        ("glass", "rect", [(0.28, 0.05), (0.6, 0.4)]),
    ],
    "robot": [
        ("accent", "rect", [(-0.05, -1.1), (0.05, -0.75)]),
        ("accent", "ellipse", [(-0.13, -1.15), (0.13, -0.92)]),
        ("accent", "round", [(-0.95, 0.0), (-0.6, 0.65)]),
        ("accent", "round", [(0.6, 0.0), (0.95, 0.65)]),
        ("accent", "rect", [(-0.42, 0.6), (-0.12, 1.0)]),
        ("accent", "rect", [(0.12, 0.6), (0.42, 1.0)]),
        ("body", "rect", [(-0.6, -0.05), (0.6, 0.75)]),
        ("body", "rect", [(-0.5, -0.8), (0.5, -0.1)]),
        ("light", "ellipse", [(-0.36, -0.62), (-0.06, -0.32)]),
        ("light", "ellipse", [(0.06, -0.62), (0.36, -0.32)]),
        ("dark", "ellipse", [(-0.26, -0.53), (-0.14, -0.4)]),
        ("dark", "ellipse", [(0.14, -0.53), (0.26, -0.4)]),
    ],
    "bird": [
        ("dark", "rect", [(-0.15, 0.6), (-0.07, 1.0)]),
        ("dark", "rect", [(0.15, 0.6), (0.23, 1.0)]),
        ("accent", "poly", [(0.5, 0.1), (1.1, -0.2), (1.05, 0.35)]),
        ("body", "ellipse", [(-0.55, -0.2), (0.75, 0.75)]),
        ("beak", "poly", [(-0.75, -0.5), (-1.1, -0.28), (-0.72, -0.2)]),
        ("body", "ellipse", [(-0.85, -0.8), (-0.1, 0.0)]),
        ("accent", "ellipse", [(0.0, 0.0), (0.7, 0.45)]),
        ("light", "ellipse", [(-0.68, -0.58), (-0.4, -0.3)]),
        ("dark", "ellipse", [(-0.6, -0.52), (-0.46, -0.36)]),
    ],
}

# hat: middle of its brim and half width; neck: middle and half width; chest: middle of a mark
ANCHORS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float]]] = {
    "dog": ((-0.5, -0.7, 0.4), (-0.33, 0.1, 0.32), (0.15, 0.32)),
    "cat": ((0.0, -0.78, 0.42), (0.0, 0.14, 0.42), (0.0, 0.58)),
    "backpack": ((0.0, -0.82, 0.45), (0.0, -0.32, 0.74), (0.0, -0.02)),
    "mug": ((-0.1, -0.84, 0.5), (-0.1, -0.28, 0.7), (-0.1, 0.3)),
    "car": ((0.0, -0.58, 0.42), (0.0, -0.02, 0.8), (0.0, 0.2)),
    "house": ((0.0, -0.8, 0.4), (0.0, -0.1, 0.85), (0.0, -0.45)),
    "robot": ((0.0, -0.8, 0.45), (0.0, -0.08, 0.52), (0.0, 0.36)),
    "bird": ((-0.46, -0.74, 0.36), (-0.42, 0.02, 0.36), (0.05, 0.45)),
}

FIXED: dict[str, RGB] = {
    "dark": (34, 30, 36),
    "light": (250, 248, 242),
    "glass": (190, 226, 244),
    "beak": (248, 170, 40),
    "hole": (250, 248, 242),
}


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.45 * r, r)
    return [(float(x + q * np.cos(a)), float(y + q * np.sin(a))) for a, q in zip(angles, radii, strict=True)]


def mark_shapes(identity: Identity) -> list[Shape]:
    """A star, heart, patch or band on the subject's chest."""
    x, y = ANCHORS[identity.kind][2]
    if identity.mark == "star":
        return [("mark", "poly", _star(x, y, 0.34))]
    if identity.mark == "heart":
        tip = [(x - 0.3, y - 0.05), (x, y + 0.3), (x + 0.3, y - 0.05)]
        lobes: list[Shape] = [
            ("mark", "ellipse", [(x + d - 0.16, y - 0.24), (x + d + 0.16, y + 0.08)]) for d in (-0.15, 0.15)
        ]
        return [("mark", "poly", tip), *lobes]
    if identity.mark == "patch":
        return [("mark", "ellipse", [(x - 0.32, y - 0.26), (x + 0.32, y + 0.3)])]
    if identity.mark == "band":
        half = ANCHORS[identity.kind][1][2]
        return [("mark", "rect", [(x - half * 0.9, y - 0.12), (x + half * 0.9, y + 0.14)])]
    return []


def accessory_shapes(identity: Identity) -> list[Shape]:
    """A hat, scarf, collar or bow at the subject's head or neck."""
    (hx, hy, hw), (nx, ny, nw), _ = ANCHORS[identity.kind]
    if identity.accessory == "hat":
        return [
            ("worn", "rect", [(hx - hw * 0.62, hy - 0.42), (hx + hw * 0.62, hy)]),
            ("worn", "round", [(hx - hw, hy - 0.1), (hx + hw, hy + 0.1)]),
        ]
    if identity.accessory == "scarf":
        return [
            ("worn", "rect", [(nx + nw * 0.25, ny), (nx + nw * 0.25 + 0.26, ny + 0.55)]),
            ("worn", "round", [(nx - nw, ny - 0.14), (nx + nw, ny + 0.14)]),
        ]
    if identity.accessory == "collar":
        return [("worn", "round", [(nx - nw, ny - 0.11), (nx + nw, ny + 0.11)])]
    if identity.accessory == "bow":
        wings: list[Shape] = [
            ("worn", "poly", [(nx, ny), (nx + s * 0.42, ny - 0.24), (nx + s * 0.42, ny + 0.24)]) for s in (-1, 1)
        ]
        return [*wings, ("dark", "ellipse", [(nx - 0.1, ny - 0.1), (nx + 0.1, ny + 0.1)])]
    return []


def pattern_tile(identity: Identity, scale: float, origin: tuple[float, float]) -> Image.Image:
    """The body's paint as a canvas-sized picture, anchored to the subject."""
    tile = Image.new("RGB", (CANVAS, CANVAS), identity.body)
    draw, step = ImageDraw.Draw(tile), max(6.0, 0.34 * scale)
    if identity.pattern == "plain":
        return tile
    cells = np.arange(-6, 7)
    for i in cells:
        x = origin[0] + i * step
        if identity.pattern == "striped":
            if i % 2 == 0:
                draw.rectangle((x, 0, x + step * 0.95, CANVAS), fill=identity.second)
            continue
        for j in cells:
            y = origin[1] + j * step
            if identity.pattern == "checkered" and (i + j) % 2 == 0:
                draw.rectangle((x, y, x + step, y + step), fill=identity.second)
            if identity.pattern == "dotted":
                s = (j % 2) * step * 0.5
                draw.ellipse((x + s, y, x + s + step * 0.62, y + step * 0.62), fill=identity.second)
    return tile


def draw_subject(p: Painter, identity: Identity, pose: Pose) -> None:
    """Draw the subject: outline first, then every shape in its role's paint."""
    cx, cy, s = pose.x * CANVAS, pose.y * CANVAS, pose.scale * CANVAS
    sign = -1 if pose.flip else 1
    shapes = [*OBJECTS[identity.kind], *mark_shapes(identity), *accessory_shapes(identity)]
    placed = [(role, kind, [(cx + sign * x * s, cy + y * s) for x, y in points]) for role, kind, points in shapes]
    paint = {
        **FIXED,
        "body": identity.body,
        "accent": identity.accent,
        "mark": identity.mark_colour,
        "worn": identity.accessory_colour,
    }
    if p.look.line:
        for role, kind, points in placed:
            p.shape(kind, points, paint[role])
        return
    for _, kind, points in placed:
        draw_primitive(p.draw, kind, points, p.look.ink, p.look.ink, p.look.width * 2)
    for role, kind, points in placed:
        if role == "body" and identity.pattern != "plain":
            _paste_pattern(p, identity, kind, points, s, (cx, cy))
        else:
            p.shape(kind, points, paint[role])


def _paste_pattern(
    p: Painter, identity: Identity, kind: str, points: list[tuple[float, float]], s: float, at: tuple[float, float]
) -> None:
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw_primitive(ImageDraw.Draw(mask), kind, points, 255, None, 0)
    tile = pattern_tile(identity, s, at)
    if p.look.mix:
        tile = Image.blend(tile, Image.new("RGB", tile.size, p.look.tint), p.look.mix)
    p.image.paste(tile, (0, 0), mask)


def shaded(colour: RGB) -> RGB:
    """The accent the world gives to a plain-coloured object."""
    return mixed(colour, (0, 0, 0), 0.28)
