"""Pictures on disk: PNG files and comparisons. It knows uint8 arrays, not latents or prompts."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError, MissingExtraError
from personalq.repository.atomic import write_atomic

Image = npt.NDArray[np.uint8]

_GAP = 4  # white pixels around each picture of a comparison
_LABEL_HEIGHT = 14


def png_bytes(image: Image) -> bytes:
    """(H, W, 3) uint8 -> the bytes of a PNG file."""
    try:
        from PIL import Image as Pillow
    except ImportError:
        raise MissingExtraError("pillow", "cpu") from None
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise EngineError(f"image: must be (H, W, 3) uint8, got {image.shape} {image.dtype}; decode it first")
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path, image: Image) -> Path:
    """Write (H, W, 3) uint8 as PNG, atomically; folders are made. Raises RepositoryError when it cannot be written."""
    content = png_bytes(image)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{path}: folder must be writable, got {error.strerror}; choose another place") from error
    write_atomic(path, content)
    return path


def side_by_side(images: Sequence[Image], labels: Sequence[str] = (), *, scale: int = 1) -> Image:
    """Put pictures of one height in a row on white, each enlarged `scale` times, with a line of text under each."""
    if len({image.shape[0] for image in images}) != 1:
        heights = [image.shape[0] for image in images]
        raise EngineError(f"images: must be one or more of the same height, got heights {heights}; resize them")
    large = [image.repeat(scale, axis=0).repeat(scale, axis=1) for image in images]
    height = large[0].shape[0] + 2 * _GAP + (_LABEL_HEIGHT if labels else 0)
    width = sum(image.shape[1] + _GAP for image in large) + _GAP
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    lefts, left = [], _GAP
    for image in large:
        canvas[_GAP : _GAP + image.shape[0], left : left + image.shape[1]] = image
        lefts.append(left)
        left += image.shape[1] + _GAP
    return _labelled(canvas, lefts, labels, top=large[0].shape[0] + _GAP) if labels else canvas


def _labelled(canvas: Image, lefts: Sequence[int], labels: Sequence[str], *, top: int) -> Image:
    try:
        from PIL import Image as Pillow
        from PIL import ImageDraw
    except ImportError:
        raise MissingExtraError("pillow", "cpu") from None
    picture = Pillow.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for left, label in zip(lefts, labels, strict=False):
        draw.text((left, top + 1), label, fill=(30, 30, 30))
    return np.asarray(picture, dtype=np.uint8)
