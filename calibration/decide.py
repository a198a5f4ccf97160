"""Apply a policy's rule to the evidence: a decision and its scales for every layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import SpecError
from personalq.numerics import INT8, QTYPES, absmax_scale, mse_scale
from personalq.spec import LayerSpec

from .allocate import allocate
from .evidence import LARGEST_HESSIAN, Evidence
from .gptq import gptq
from .policies import POLICIES, Rule
from .statistics import LayerRanges

Tensors = dict[str, npt.NDArray[Any]]
BITS = {"w8a8": "int8", "w6a8": "int6", "w4a8": "int4"}
FIND = {"mse": mse_scale, "absmax": absmax_scale}
BYTES = {"float": 2.0, "int8": 1.0, "int6": 1.0, "int4": 0.5}  # per weight on disk; 6 bits are simulated in a byte


@dataclass(frozen=True)
class Decisions:
    """layers and tensors of a spec."""

    layers: dict[str, LayerSpec]
    tensors: Tensors


def rule_of(policy: str) -> Rule:
    """The rule of a policy. Raises SpecError for an unknown name."""
    if policy not in POLICIES:
        raise SpecError(f"policy: must be one of {', '.join(['fp32', 'fp16', *POLICIES])}, got {policy!r}")
    return POLICIES[policy]


def decide(evidence: Evidence, rule: Rule, bits: str, budget_bytes: int | None = None) -> Decisions:
    """Widths, scales and integers of every layer. Raises SpecError for an unknown width or a budget that cannot be met."""
    if bits not in BITS:
        raise SpecError(f"bits: must be one of {', '.join(BITS)}, got {bits!r}")
    ranges = evidence.seen.layers
    widths = dict.fromkeys(ranges, BITS[bits])
    if budget_bytes is not None:
        widths = share_out(evidence, rule, budget_bytes)
    layers: dict[str, LayerSpec] = {}
    tensors: Tensors = {}
    for done, (name, layer) in enumerate(ranges.items()):
        evidence.progress("deciding layers", done / len(ranges))
        kept = rule.keep_float(name)
        reason = kept or ("budget: its harm is worth its bytes" if widths[name] == "float" else "")
        if reason:
            layers[name] = LayerSpec(op=layer.op, weight="float", activation="float", reason=reason)
            continue
        wider = widths[name] != BITS[bits] and budget_bytes is not None
        spec, found = decide_layer(evidence, rule, name, layer, widths[name])
        layers[name] = (
            spec.model_copy(update={"reason": "budget: wider than the others by its harm"}) if wider else spec
        )
        tensors |= found
    return Decisions(layers, tensors)


def decide_layer(
    evidence: Evidence, rule: Rule, name: str, layer: LayerRanges, width: str
) -> tuple[LayerSpec, Tensors]:
    """One quantised layer: scales by the rule, integers learnt at 4 bits where the rule says so."""
    qtype, weight = QTYPES[width], layer.weight.float().cpu().numpy()
    scale = FIND[rule.weight_scale](weight, qtype, 0, where=f"{name}.weight")
    tensors: Tensors = {f"{name}.weight_scale": scale}
    tensors[f"{name}.input_scale"] = np.asarray(layer.input().scale(INT8, rule.activation_scale, name))
    if layer.op == "conv":
        tensors[f"{name}.output_scale"] = np.asarray(layer.output().scale(INT8, rule.activation_scale, name))
    found = f"weight {rule.weight_scale}, activation {rule.activation_scale}"
    rounding = "nearest"
    if rule.rounding == "gptq" and qtype.bits < 8:
        if weight[0].size > LARGEST_HESSIAN:
            found += f"; rounded to nearest: {weight[0].size} columns are too many for GPTQ's Hessian"
        else:
            hessian = evidence.hessians[rule.weighting][name]
            integers = gptq(weight.reshape(len(weight), -1), scale, hessian, qtype)
            tensors[f"{name}.weight_q"] = integers.reshape(weight.shape)
            rounding, found = "stored", f"{found}; gptq, {rule.weighting} Hessian"
    spec = LayerSpec(op=layer.op, weight=width, activation="int8", rounding=rounding, found_by=found)
    return spec, tensors


def share_out(evidence: Evidence, rule: Rule, budget_bytes: int) -> dict[str, str]:
    """Widths {float16, int8, int4} per layer with least summed harm in `budget_bytes` of layer weights."""
    ranges, harm = evidence.seen.layers, evidence.sensitivity
    bytes_of, harm_of = {}, {}
    for name, layer in ranges.items():
        numel, rows = layer.weight.numel(), layer.weight.shape[0]
        choices = ("float",) if rule.keep_float(name) else ("float", "int8", "int4")
        bytes_of[name] = {w: int(numel * BYTES[w]) + (0 if w == "float" else 4 * rows) for w in choices}
        of = {w: 0.0 if w == "float" else getattr(harm[name][w], rule.weighting) for w in choices}
        harm_of[name] = of
    return allocate(bytes_of, harm_of, budget_bytes)
