"""The options of a TensorRT engine: `--set KEY=VALUE`, validated here, and part of the engine's key.

Shapes are static unless a range is given (min:opt:max): a static engine builds sooner, is smaller and runs faster.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from personalq.bundle import Manifest
from personalq.errors import EngineError

from ..manifest import RANKS

Range = tuple[int, int, int]
Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]

HARDWARE = ("none", "ampere_plus", "same_compute_capability")
ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@dataclass(frozen=True)
class BuildSettings:
    """batch: rows of the UNet (a guided picture takes 2). height, width: pixels; 0 = the base's own size.

    level: builder optimisation level 0-5. workspace_mb: 0 = all memory. hardware: compatibility level. strip: weights
    left out. refit: float16 plans whose weights can be replaced by name. architectures: TensorRT for RTX only.
    rank: of the adapters that plans are built for, one plan each; () = 0, and of a base 16 too (tensorrt.ranks_of).
    """

    batch: Range = (2, 2, 2)
    height: Range = (0, 0, 0)
    width: Range = (0, 0, 0)
    level: int = 3
    workspace_mb: int = 0
    hardware: str = "none"
    version_compatible: bool = False
    exclude_lean_runtime: bool = False
    strip: bool = False
    refit: bool = False
    weight_streaming: bool = False
    tf32: bool = True
    architectures: tuple[str, ...] = ("sm86", "sm89", "sm120")
    rank: tuple[int, ...] = ()

    def parts(self) -> dict[str, str]:
        """Every choice that all plans share, as text, for their keys: a plan has one rank, and says it itself."""
        return {field.name: _text(getattr(self, field.name)) for field in fields(self) if field.name != "rank"}


def read_settings(given: Sequence[str]) -> BuildSettings:
    """('height=512:512:768', 'level=5') -> BuildSettings. Raises EngineError naming the key, what it takes and the fix."""
    chosen: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in READERS:
            raise EngineError(f"--set {text}: key must be one of {', '.join(READERS)}, got {key!r}; correct it")
        takes, read = READERS[key]
        try:
            chosen[key] = read(value)
        except ValueError:
            raise EngineError(f"--set {key}: must be {takes}, got {value!r}; correct it") from None
    settings = BuildSettings(**chosen)
    if settings.exclude_lean_runtime and not settings.version_compatible:
        raise EngineError("--set exclude_lean_runtime: needs version_compatible=yes, got no; set both or neither")
    if settings.refit and any(settings.rank):
        raise EngineError(
            f"--set refit: must be used with rank=0, got rank={_listed(settings.rank)}: an adapter is an input; leave one out"
        )
    return settings


def of_merged(settings: BuildSettings) -> BuildSettings:
    """The same for a bundle that takes no adapters: its plan has rank 0. Raises EngineError where only others are asked for."""
    if settings.rank and 0 not in settings.rank:
        raise EngineError(
            f"--set rank: must hold 0 for a merged bundle, which takes no adapters, got {_listed(settings.rank)}; add 0"
        )
    return replace(settings, rank=(0,))


def input_shapes(manifest: Manifest, settings: BuildSettings) -> Shapes:
    """(min, opt, max) of every input of the UNet with open sides. Raises EngineError for sizes the latents cannot have."""
    latent, rows, tokens = manifest.latent, manifest.rows, manifest.text.length
    height = _latent_side("height", settings.height, latent.height, latent.scale)
    width = _latent_side("width", settings.width, latent.width, latent.scale)
    sides: dict[str, Callable[[int], Shape]] = {"rows": lambda i: (settings.batch[i], tokens, rows.width)}
    if rows.form == "split":
        sides = {
            "rest": lambda i: (settings.batch[i], tokens, rows.width),
            "rest_scale": lambda i: (settings.batch[i], tokens, 2 * len(rows.layers)),
            "kept": lambda i: (settings.batch[i], rows.kept.slots, rows.width),
            "row_index": lambda i: (settings.batch[i], tokens),
        }
    sides["sample"] = lambda i: (settings.batch[i], latent.channels, height[i], width[i])
    return {name: (side(0), side(1), side(2)) for name, side in sides.items()}


def _latent_side(name: str, pixels: Range, default: int, scale: int) -> Range:
    if pixels == (0, 0, 0):
        return (default, default, default)
    wrong = next((side for side in pixels if side < scale or side % scale), None)
    if wrong is not None:
        raise EngineError(f"--set {name}: must be a multiple of {scale} pixels, got {wrong}; round it")
    low, middle, high = (side // scale for side in pixels)
    return (low, middle, high)


def _range(text: str) -> Range:
    numbers = [int(part) for part in text.split(":")]
    if len(numbers) == 1:
        numbers *= 3
    low, middle, high = numbers
    if not 0 < low <= middle <= high:
        raise ValueError(text)
    return low, middle, high


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(text)
    return text == "yes"


def _level(text: str) -> int:
    if text not in "012345" or len(text) != 1:
        raise ValueError(text)
    return int(text)


def _size(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError(text)
    return int(text)


def _hardware(text: str) -> str:
    if text not in HARDWARE:
        raise ValueError(text)
    return text


def _ranks(text: str) -> tuple[int, ...]:
    found = tuple(sorted({int(part) for part in text.split(",")}))
    if any(one not in (0, *RANKS) for one in found):
        raise ValueError(text)
    return found


def _listed(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks))


def _architectures(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not found or any(one not in ARCHITECTURES for one in found):
        raise ValueError(text)
    return found


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return (":" if isinstance(value[0], int) else ",").join(str(one) for one in value)
    return str(value)


_RANGE = ("a number or min:opt:max", _range)
_FLAG = ("yes or no", _yes)
READERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "batch": _RANGE,
    "height": _RANGE,
    "width": _RANGE,
    "level": ("a number from 0 to 5", _level),
    "workspace_mb": ("a number of megabytes", _size),
    "hardware": (f"one of {', '.join(HARDWARE)}", _hardware),
    "version_compatible": _FLAG,
    "exclude_lean_runtime": _FLAG,
    "strip": _FLAG,
    "refit": _FLAG,
    "weight_streaming": _FLAG,
    "tf32": _FLAG,
    "architectures": (f"a list of {', '.join(ARCHITECTURES)}", _architectures),
    "rank": (f"a list of {', '.join(map(str, (0, *RANKS)))}", _ranks),
}
