"""Apply a policy's rule to the evidence: a decision and its scales for every layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import SpecError
from personalq.numerics import INT8, QTYPES, SMALLEST_SCALE, QType, absmax_scale, mse_scale, quantize
from personalq.spec import LayerSpec

from .policies import POLICIES, Rule, no_rows
from .rounding.adaround import adaround
from .rounding.allocate import allocate
from .rounding.balance import balanced_hessian, low_rank, shortcut, skip_channels, smooth
from .rounding.finish import correct, tune_decisions
from .rounding.gptq import gptq
from .statistics.evidence import LARGEST_HESSIAN, Evidence
from .statistics.ranges import LayerRanges

Tensors = dict[str, npt.NDArray[Any]]
Array = npt.NDArray[np.float32]
BITS = {
    "w8a8": ("int8", "int8"),
    "w7a8": ("int7", "int8"),
    "w6a8": ("int6", "int8"),
    "w4a8": ("int4", "int8"),
    "w4a16": ("int4", "float"),
}
BLOCKS = (64, 32, 16)  # block lengths that both ONNX Runtime's and TensorRT's 4-bit products support, longest first
FIND = {"mse": mse_scale, "absmax": absmax_scale}
LEARN = {"gptq": gptq, "adaround": adaround}
# Per weight on disk; 7- and 6-bit weights take a byte.
BYTES = {"float": 2.0, "int8": 1.0, "int7": 1.0, "int6": 1.0, "int4": 0.5}
CONTENT = (
    ".attn2.",
    ".ff.",
    "proj_in",
    "proj_out",
)  # MixDQ's 'content' layers; convolutions and self-attention are 'quality'


@dataclass(frozen=True)
class Decisions:
    """layers and tensors of a spec; tuned: vectors whose values changed; corrected: the prediction is corrected."""

    layers: dict[str, LayerSpec]
    tensors: Tensors
    tuned: tuple[str, ...] = ()
    corrected: bool = False


def rule_of(policy: str) -> Rule:
    """The rule of a policy. Raises SpecError for an unknown name."""
    if policy not in POLICIES:
        raise SpecError(f"policy: must be one of {', '.join(['fp32', 'fp16', *POLICIES])}, got {policy!r}")
    return POLICIES[policy]


def decide(evidence: Evidence, rule: Rule, bits: str, budget_bytes: int | None = None) -> Decisions:
    """Widths, scales and integers of every layer; policies that differ in their rows alone share them.

    Raises SpecError for an unknown width or a budget that cannot be met.
    """
    if bits not in BITS:
        raise SpecError(f"bits: must be one of {', '.join(BITS)}, got {bits!r}")
    key = (replace(rule, source="", keep_rows=no_rows), bits, budget_bytes)
    if key not in evidence.decided:
        evidence.decided[key] = decide_layers(evidence, rule, bits, budget_bytes)
    found: Decisions = evidence.decided[key]
    return found


def decide_layers(evidence: Evidence, rule: Rule, bits: str, budget_bytes: int | None) -> Decisions:
    """`decide`, computed."""
    ranges = evidence.seen.layers
    default, activation = BITS[bits]
    widths = dict.fromkeys(ranges, default)
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
        wider = widths[name] != default and budget_bytes is not None
        spec, found = decide_layer(evidence, rule, name, layer, widths[name], activation)
        layers[name] = (
            spec.model_copy(update={"reason": "budget: wider than the others by its harm"}) if wider else spec
        )
        tensors |= found
    return finished(evidence, rule, Decisions(layers, tensors))


def finished(evidence: Evidence, rule: Rule, decisions: Decisions) -> Decisions:
    """The steps that need every layer decided first: tuning of floats, correction of the prediction."""
    if rule.tune and any(QTYPES[d.weight].bits < 7 for d in decisions.layers.values() if d.weight != "float"):
        tensors, tuned = tune_decisions(evidence, decisions.layers, decisions.tensors, rule.weighting)
        layers = {
            name: d if d.weight == "float" else d.model_copy(update={"rounding": "stored"})
            for name, d in decisions.layers.items()
        }
        decisions = replace(decisions, layers=layers, tensors=decisions.tensors | tensors, tuned=tuned)
    if rule.corrected:
        found = correct(evidence, decisions.layers, decisions.tensors)
        decisions = replace(decisions, tensors=decisions.tensors | found, corrected=True)
    return decisions


def decide_layer(
    evidence: Evidence, rule: Rule, name: str, layer: LayerRanges, width: str, activation: str
) -> tuple[LayerSpec, Tensors]:
    """One quantised layer: scales by the rule, integers learnt below 8 bits where the rule says so.

    A 4-bit Linear whose activations stay float has its scales in blocks along K; integer kernels want one per channel.
    """
    qtype, weight = QTYPES[width], layer.weight.float().cpu().numpy()
    vector = balance_of(evidence, rule, name, layer, weight)
    tensors: Tensors = {} if activation == "float" else activation_scales(layer, rule, name, vector)
    if vector is not None:
        weight = weight * vector.reshape(1, -1, *([1] * (weight.ndim - 2)))
        tensors[f"{name}.input_balance"] = vector
    rank = rule.low_rank(weight.shape) if layer.op == "linear" and qtype.bits < 8 else 0
    if rank:
        down, up = low_rank(weight, rank)
        weight = weight - (down.astype(np.float32) @ up.astype(np.float32)).T
        factor = np.ones(len(down), np.float32) if vector is None else vector
        tensors |= {f"{name}.low_rank_down": (down / factor[:, None]).astype(np.float16), f"{name}.low_rank_up": up}
    group = block_length(layer, width, activation)
    scale = weight_scale(rule, weight, qtype, group, f"{name}.weight")
    key = (name, width, group, rank, rule.weight_scale, rule.balance, rule.rounding, rule.weighting)
    if key not in evidence.decided:  # policies that differ in ranges, rows or float layers round alike
        evidence.decided[key] = rounded(evidence, rule, name, weight, scale, vector, width)
    integers, how = evidence.decided[key]
    stored = how != "nearest" or vector is not None or rank > 0 or group is not None
    tensors |= {f"{name}.weight_scale": scale} | ({f"{name}.weight_q": integers} if stored else {})
    spec = LayerSpec(
        op=layer.op,
        weight=width,
        group=group,
        activation=activation,
        rounding="stored" if stored else "nearest",
        balanced=vector is not None,
        low_rank=rank,
        found_by=f"weight {rule.weight_scale}, activation {rule.activation_scale}; {how}",
    )
    return spec, tensors


def activation_scales(layer: LayerRanges, rule: Rule, name: str, vector: Array | None) -> Tensors:
    """The static int8 scales of a layer's input (balanced by `vector`, if any), and of a convolution's output."""
    inputs = input_scale(layer, rule, name) if vector is None else balanced_scale(layer, rule, name, vector)
    tensors: Tensors = {f"{name}.input_scale": np.asarray(inputs)}
    if layer.op == "conv":
        found = layer.output(rule.time_weights).scale(INT8, rule.activation_scale, name)
        tensors[f"{name}.output_scale"] = np.asarray(found)
    return tensors


def block_length(layer: LayerRanges, width: str, activation: str) -> int | None:
    """Length of the weight's blocks along K, or None for one scale per output channel."""
    if layer.op != "linear" or width != "int4" or activation != "float":
        return None
    k = layer.weight.shape[1]
    return next((block for block in BLOCKS if k % block == 0 and block < k), None)


def weight_scale(rule: Rule, weight: Array, qtype: QType, group: int | None, where: str) -> npt.NDArray[np.float32]:
    """Scales by the rule: (O,), or (O, K / group) for a weight (O, K) in blocks."""
    find = FIND[rule.weight_scale]
    if group is None:
        return find(weight, qtype, 0, where=where)
    return find(weight.reshape(-1, group), qtype, 0, where=where).reshape(len(weight), -1)


def rounded(
    evidence: Evidence, rule: Rule, name: str, weight: Array, scale: Array, vector: Array | None, width: str
) -> tuple[npt.NDArray[np.int8], str]:
    """The integers of one weight, and how they were found."""
    qtype, flat = QTYPES[width], weight.reshape(len(weight), -1)
    if rule.rounding == "nearest" or qtype.bits >= 8:
        return nearest(weight, scale, qtype), "nearest"
    if flat.shape[1] > LARGEST_HESSIAN:
        return nearest(weight, scale, qtype), f"nearest: {flat.shape[1]} columns are too many for a Hessian"
    hessian = evidence.hessians[rule.weighting][name]
    hessian = hessian if vector is None else balanced_hessian(hessian, vector)
    integers = LEARN[rule.rounding](flat, scale, hessian, qtype)
    return integers.reshape(weight.shape), f"{rule.rounding}, {rule.weighting} Hessian"


def nearest(weight: Array, scale: Array, qtype: QType) -> npt.NDArray[np.int8]:
    """`quantize` with scales (O,), or (O, blocks) for a weight (O, K)."""
    if scale.ndim == 1:
        return quantize(weight, scale, qtype, 0)
    return quantize(weight.reshape(scale.size, -1), scale.ravel(), qtype, 0).reshape(weight.shape)


def input_scale(layer: LayerRanges, rule: Rule, name: str) -> np.float32:
    """The static int8 scale of a layer's input by the rule."""
    return layer.input(rule.time_weights).scale(INT8, rule.activation_scale, name)


def balance_of(evidence: Evidence, rule: Rule, name: str, layer: LayerRanges, weight: Array) -> Array | None:
    """The factor per input channel that the rule asks for in this layer, or None."""
    if rule.balance == "smooth" and layer.op == "linear":
        return smooth(layer.channel_absmax, weight)
    skips = skip_channels(evidence.pipe.unet) if rule.balance == "shortcut" else {}
    return shortcut(layer.channel_absmax, skips[name]) if name in skips else None


def balanced_scale(layer: LayerRanges, rule: Rule, name: str, vector: Array) -> npt.NDArray[np.float32]:
    """Scale of the balanced input: its largest value, clipped by as much as the rule clips the input itself."""
    histogram = layer.input(rule.time_weights)
    clipped = float(histogram.scale(INT8, rule.activation_scale, name)) * INT8.qmax / histogram.absmax
    peak = float((layer.channel_absmax / vector).max())
    return np.asarray(max(peak * clipped / INT8.qmax, SMALLEST_SCALE), np.float32)


def share_out(evidence: Evidence, rule: Rule, budget_bytes: int) -> dict[str, str]:
    """Widths {float16, int8, int4} per layer with least summed harm in `budget_bytes` of layer weights."""
    ranges, harm = evidence.seen.layers, evidence.sensitivity
    bytes_of, harm_of = {}, {}
    for name, layer in ranges.items():
        numel, rows = layer.weight.numel(), layer.weight.shape[0]
        choices = ("float",) if rule.keep_float(name) else ("float", "int8", "int4")
        bytes_of[name] = {w: int(numel * BYTES[w]) + (0 if w == "float" else 4 * rows) for w in choices}
        harm_of[name] = {w: 0.0 if w == "float" else getattr(harm[name][w], rule.weighting) for w in choices}
    if not rule.decoupled:
        return allocate(bytes_of, harm_of, budget_bytes)
    return decoupled(bytes_of, harm_of, budget_bytes)


def decoupled(
    bytes_of: Mapping[str, Mapping[str, int]], harm_of: Mapping[str, Mapping[str, float]], budget_bytes: int
) -> dict[str, str]:
    """MixDQ's two programmes: content and quality layers split the budget by their smallest bytes; each then spends its own."""
    content = {name for name in bytes_of if any(part in name for part in CONTENT)}
    least = {name: min(widths.values()) for name, widths in bytes_of.items()}
    share = budget_bytes / sum(least.values())
    widths: dict[str, str] = {}
    for names in (content, set(bytes_of) - content):
        part = [{n: table[n] for n in table if n in names} for table in (bytes_of, harm_of)]
        widths |= allocate(part[0], part[1], int(share * sum(least[n] for n in names)))
    return widths
