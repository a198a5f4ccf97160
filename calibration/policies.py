"""Policies: named rules that turn statistics into the decisions of a spec. Data in, data out; no model is run here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import SpecError
from personalq.numerics import INT8, QTYPES, absmax_scale, mse_scale
from personalq.rows import KeptTokens
from personalq.spec import LayerSpec

from .statistics import LayerRanges

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Tokens:
    """Token-id sequences of the card's words, for the kept rows."""

    trigger: tuple[tuple[int, ...], ...]
    class_noun: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rule:
    """How a policy finds scales, and which rows it keeps. Float layers carry their reason."""

    weight_scale: str
    activation_scale: str
    kept: Callable[[Tokens], KeptTokens]
    keep_float: Callable[[str], str]
    row_reasons: dict[str, str]


def keep_nothing(_: str) -> str:
    return ""


def keep_edges(name: str) -> str:
    """The first and last convolution: 4 latent channels wide, a few KB, and every error there is an error of the picture."""
    if name in ("conv_in", "conv_out"):
        return "first or last layer: 4 latent channels, few bytes, its error is the picture's error"
    return ""


def trigger_and_bos(tokens: Tokens) -> KeptTokens:
    return KeptTokens(trigger=tokens.trigger, bos=True)


POLICIES: dict[str, Rule] = {
    "taq": Rule(
        "mse",
        "mse",
        trigger_and_bos,
        keep_edges,
        {"trigger": "carries the concept", "bos": "prompt-independent row, an outlier in web-scale CLIP"},
    ),
}
BITS = {"w8a8": "int8", "w4a8": "int4"}


def decide(
    ranges: dict[str, LayerRanges], policy: str, bits: str
) -> tuple[dict[str, LayerSpec], Tensors]:
    """Layer decisions and their scales under a policy. Raises SpecError for an unknown policy or width."""
    if policy not in POLICIES:
        raise SpecError(f"policy: must be one of {', '.join(POLICIES)}, got {policy!r}")
    if bits not in BITS:
        raise SpecError(f"bits: must be one of {', '.join(BITS)}, got {bits!r}")
    rule, layers, tensors = POLICIES[policy], {}, {}
    for name, layer in ranges.items():
        reason = rule.keep_float(name)
        if reason:
            layers[name] = LayerSpec(op=layer.op, weight="float", activation="float", reason=reason)
            continue
        weight = layer.weight.float().cpu().numpy()
        find = {"mse": mse_scale, "absmax": absmax_scale}[rule.weight_scale]
        tensors[f"{name}.weight_scale"] = find(weight, QTYPES[BITS[bits]], 0, where=f"{name}.weight")
        tensors[f"{name}.input_scale"] = np.asarray(layer.input().scale(INT8, rule.activation_scale, name))
        if layer.op == "conv":
            tensors[f"{name}.output_scale"] = np.asarray(layer.output().scale(INT8, rule.activation_scale, name))
        found = f"weight {rule.weight_scale}, activation {rule.activation_scale}"
        layers[name] = LayerSpec(op=layer.op, weight=BITS[bits], activation="int8", found_by=found)
    return layers, tensors


def float_layers(ranges: dict[str, Any], reason: str) -> dict[str, LayerSpec]:
    """Every layer unquantised: the reference policy."""
    return {name: LayerSpec(op=layer.op, weight="float", activation="float", reason=reason) for name, layer in ranges.items()}
