"""What a file itself says of how its model predicts: marks among its tensors, and its header. Knows names, not schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .header import Header

# Empty or one-element tensors that trainers put among the weights.
_TENSORS: dict[str, tuple[str, object]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
_PREDICTION = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
KEPT = "personalq.marks"  # where an unpacked one-file checkpoint keeps the names of its marks


@dataclass(frozen=True)
class Marks:
    """Scheduler fields that a file fixes: by its tensors, which decide, and by its header, which a config may overrule.

    Each field has its value and where it stands, in words.
    """

    by_tensors: Mapping[str, tuple[object, str]]
    by_header: Mapping[str, tuple[object, str]]


def is_mark(name: str) -> bool:
    """Tell whether a tensor is a mark and no parameter."""
    return name in _TENSORS


def read_marks(header: Header, file: str) -> Marks:
    """The marks of one file; `file` is how messages call it."""
    kept = header.metadata.get(KEPT, "").split(",")
    found = [name for name in _TENSORS if name in header.entries or name in kept]
    by_tensors = {_TENSORS[name][0]: (_TENSORS[name][1], f"tensor {name} of {file}") for name in found}
    said = header.metadata.get("modelspec.prediction_type", "").strip().lower()
    by_header: dict[str, tuple[object, str]] = {}
    if said in _PREDICTION:
        by_header["prediction_type"] = (_PREDICTION[said], f"modelspec.prediction_type of {file}")
    if header.metadata.get("ss_zero_terminal_snr", "").strip().lower() == "true":
        by_header["rescale_betas_zero_snr"] = (True, f"ss_zero_terminal_snr of {file}")
    return Marks(by_tensors, by_header)
