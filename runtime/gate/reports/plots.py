"""Small drawings for the HTML page, as SVG and PNG in text form; no library, nothing loaded from elsewhere."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]

# A dark-to-bright ramp that people with any colour vision read in order (viridis at 0, 1/4, 1/2, 3/4, 1).
_RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)
FULL_SCALE = 64  # of 255: the difference that is drawn brightest
WIDTH, HEIGHT, LEFT, BOTTOM = 1080, 230, 44, 30


def png(image: Images) -> str:
    """(H,W,3) uint8 -> a data: URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat_map(reference: Images, drawn: Images) -> Images:
    """Where two pictures differ: mean absolute difference of the channels, 0 dark, FULL_SCALE and more bright."""
    difference = np.abs(reference.astype(np.float64) - drawn).mean(axis=2)
    place = np.clip(difference / FULL_SCALE, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    share = (place - low)[..., None]
    return np.asarray(_RAMP[low] * (1 - share) + _RAMP[low + 1] * share, np.uint8)


def layers_plot(now: Mapping[str, float], before: Mapping[str, float], marked: str = "") -> str:
    """SNR in dB of every layer in the order it is computed; the baseline behind it; `marked` in red."""
    names = list(now)
    values = [min(value, 60.0) for value in [*now.values(), *before.values()]]
    top, low = 10 * np.ceil(max(values) / 10), 10 * np.floor(min([*values, 20.0]) / 10)

    def place(i: int, value: float) -> tuple[float, float]:
        x = LEFT + (i + 0.5) * (WIDTH - LEFT - 8) / len(names)
        y = 8 + (top - min(value, 60.0)) / (top - low) * (HEIGHT - BOTTOM - 8)
        return round(x, 1), round(float(y), 1)

    parts = [*_grid(low, top), *_groups(names, lambda i: place(i, low)[0])]
    old = [place(i, before[name]) for i, name in enumerate(names) if name in before]
    parts.append(f'<polyline class="before" points="{_points(old)}"/>' if old else "")
    parts.append(f'<polyline class="now" points="{_points([place(i, now[name]) for i, name in enumerate(names)])}"/>')
    for i, name in enumerate(names):
        x, y = place(i, now[name])
        was = f", baseline {before[name]:.1f}" if name in before else ""
        kind = "dot marked" if name == marked else "dot"
        radius = 5 if name == marked else 2.5
        title = f"<title>{escape(name)}: {now[name]:.1f} dB{was}</title>"
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius}">{title}</circle>')
    if marked in now:
        x, y = place(names.index(marked), now[marked])
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(
            f'<text class="marked" x="{x}" y="{min(y + 18, HEIGHT - BOTTOM)}" text-anchor="{anchor}">{escape(marked)}</text>'
        )
    title = "Signal-to-noise ratio of each layer's output, in dB"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def _grid(low: float, top: float) -> list[str]:
    parts = []
    for value in np.arange(low, top + 1, 10):
        y = round(8 + (top - value) / (top - low) * (HEIGHT - BOTTOM - 8), 1)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.0f}</text>')
    return [*parts, f'<text x="4" y="{HEIGHT - BOTTOM + 18}">dB</text>']


def _groups(names: Sequence[str], x_of: Callable[[int], float]) -> list[str]:
    """A line and a label where the next block of the UNet begins."""
    parts, last = [], ""
    for i, name in enumerate(names):
        pieces = name.split(".")
        group = ".".join(pieces[:2]) if pieces[0] in ("down_blocks", "up_blocks") else pieces[0]
        if group != last and group not in ("conv_in", "conv_out", "time_embedding"):
            x, label = x_of(i), group.replace("_blocks.", " ").replace("_block", "")
            parts.append(f'<line class="group" x1="{x}" x2="{x}" y1="8" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x + 2}" y="{HEIGHT - BOTTOM + 18}">{escape(label)}</text>')
        last = group
    return parts


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)


def strip(values: Sequence[float], before: Sequence[float] = ()) -> str:
    """The single values of one metric as dots on a line, the baseline's as rings."""
    both = [min(v, 200.0) for v in [*values, *before]]
    low, high = min(both), max(both)
    span = max(high - low, 1e-9)

    def dot(value: float, kind: str) -> str:
        x = 6 + (min(value, 200.0) - low) / span * 148
        return f'<circle class="{kind}" cx="{x:.1f}" cy="9" r="3"><title>{value:.4g}</title></circle>'

    dots = [dot(v, "ring") for v in before] + [dot(v, "dot") for v in values]
    return f'<svg class="strip" viewBox="0 0 160 18"><line class="grid" x1="6" x2="154" y1="9" y2="9"/>{"".join(dots)}</svg>'
