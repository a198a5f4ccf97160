"""Custom Diffusion files to edits: K and V of cross-attention (Q and the output too where they were trained) are replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import RepositoryError
from ..tensorfile import TensorFile
from .edits import ANOTHER_BASE, Delta, Replaced, Shapes, unmatched

_MARK = "_custom_diffusion"
_PROJECTION = re.compile(r"attn2\.(?:processor\.)?to_(?:q|k|v|out\.0)\.(?:weight|bias)$")


def is_custom_diffusion(shapes: Shapes) -> bool:
    """Tell whether a file holds projections as diffusers names them, or cross-attention weights and nothing else."""
    return any(_MARK in name for name in shapes) or (bool(shapes) and all(map(_PROJECTION.search, shapes)))


def replaced_parameter(key: str) -> str:
    """The UNet's parameter that a tensor of such a file takes the place of."""
    return key.removeprefix("unet.").replace(".processor.", ".").replace(_MARK, "")


def custom_diffusion_edits(file: TensorFile, shapes: Mapping[str, Shapes], delta: Delta) -> None:
    """Put the replaced projections into `delta`.

    Names: `...attn2.processor.to_k_custom_diffusion.weight` as diffusers writes, or plain `...attn2.to_k.weight`.
    """
    unet = shapes["unet"]
    unknown = []
    for key in file.names():
        if file.shape(key)[:1] == (0,):
            continue  # an empty tensor: load_attn_procs takes it for "this processor is left as it was"
        name = replaced_parameter(key)
        if name not in unet:
            unknown.append(key)
        elif file.shape(key) != unet[name]:
            got = list(file.shape(key))
            raise RepositoryError(
                f"{file.path.name}: {name}: must fit the base's {list(unet[name])}, got {got}; {ANOTHER_BASE}"
            )
        else:
            delta.put("unet", name, Replaced(file, key))
    if unknown:
        raise unmatched(file, unknown)
