"""Pictures as the bytes a client asked for: PNG, JPEG or WebP. It knows uint8 arrays, not requests."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image as Pillow

from ...drawing.image import Image, png_bytes

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
LOSSLESS = 100
_EFFORT = 20  # put into a lossless WebP's size; 60 takes twice the time (1 s a megapixel) for a seventh fewer bytes
_FULL_COLOUR = 90  # from this quality on, a JPEG keeps the colour of every pixel: 4:2:0 blurs what 90 was asked for


@dataclass(frozen=True)
class Format:
    """name: a key of MEDIA_TYPES; quality: 0 to 100, OpenAI's `output_compression`. 100 loses nothing but a JPEG's rounding."""

    name: str = "png"
    quality: int = LOSSLESS


PNG = Format()


def encode(image: Image, form: Format) -> bytes:
    """(H, W, 3) uint8 -> the bytes of a file. Raises EngineError when it is no such array."""
    if form.name == "png":
        return png_bytes(image)
    options: dict[str, Any] = {"format": form.name, "quality": form.quality}
    if form.name == "jpeg":
        options["subsampling"] = "4:4:4" if form.quality >= _FULL_COLOUR else "4:2:0"
    elif form.quality == LOSSLESS:
        options |= {"lossless": True, "quality": _EFFORT}
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, **options)
    return buffer.getvalue()
