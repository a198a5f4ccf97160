"""Run every rule over a graph. A rule is a function View -> (node, what is wrong, how to fix it); this file lists them.

Sources: TensorRT 10.12 to 11 as documented, and TensorRT for RTX 1.7.1 as compiled (docs/tensorrt.md says which is which).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from personalq.errors import BundleError

from . import operators, quantisation, waste
from .view import View

Problem = tuple[str, str, str]  # node, what is wrong, how to fix it
Rule = Callable[[View], Iterator[Problem]]
ARCHITECTURES = ("sm86", "sm89", "sm120")

# The builder refuses the graph, crashes, or computes something else.
ERRORS: dict[str, Rule] = {
    "zero-point": quantisation.zero_points,
    "int32-bias": quantisation.integer_biases,
    "scale-sign": quantisation.scale_signs,
    "scale-run-time": quantisation.run_time_scales,
    "scale-type": quantisation.scale_types,
    "scale-pair": quantisation.scale_pairs,
    "quantise-input": quantisation.quantise_inputs,
    "block-axis": quantisation.block_axes,
    "block-length": quantisation.block_lengths,
    "block-int8": quantisation.int8_blocks,
    "int4-under-int8": quantisation.int4_under_int8,
    "int4-cancelled": quantisation.cancelled_pairs,
    "quantised-use": quantisation.quantised_uses,
    "four-bit-count": quantisation.odd_counts,
    "uint4": operators.uint4,
    "fp8-format": operators.fp8_formats,
    "operator": operators.unsupported,
    "opset": operators.opsets,
    "mixed-types": operators.mixed_types,
    "layer-norm-outputs": operators.layer_norm_outputs,
    "resize-mode": operators.resize_modes,
    "half-overflow": operators.overflows,
}
# It builds, and is slower, larger or less exact than it looks.
WARNINGS: dict[str, Rule] = {
    "channel-activation": waste.channel_activations,
    "weight-axis": waste.weight_axes,
    "half-quantised": waste.half_quantised,
    "output-quantised": waste.quantised_outputs,
    "attention-quantised": waste.quantised_attention,
    "attention-float32": waste.wide_attention,
    "block-not-fused": waste.unfused_blocks,
    "convolution-expanded": waste.expanded_convolutions,
    "narrow-convolution": waste.narrow_convolutions,
    "channel-scale": waste.channel_scales,
    "packed-nibbles": waste.packed_constants,
    "int8-cast": waste.int8_casts,
    "half-sine": waste.half_sines,
}


@dataclass(frozen=True)
class Finding:
    """One place in one graph. severity: 'error' (will not build or not compute this) or 'warning'."""

    rule: str
    severity: str
    node: str
    message: str
    fix: str

    def line(self) -> str:
        return f"{self.severity}: {self.rule}: {self.node}: {self.message}; {self.fix}"


def lint_trt(path: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[Finding]:
    """Everything wrong with a graph for TensorRT and TensorRT for RTX, errors first. Needs no builder and no GPU.

    architectures: where the engine should run ('sm86', 'sm89' ...). Raises BundleError when the file is no ONNX graph.
    """
    try:
        view = View.load(path)
    except Exception as error:  # protobuf and onnx_ir raise their own classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{path}: must be an ONNX graph, got {reason!r:.120}; export the checkpoint again") from error
    errors = ERRORS | {"hardware-type": partial(operators.hardware_types, architectures=architectures)}
    found = [Finding(name, "error", *problem) for name, rule in errors.items() for problem in rule(view)]
    return found + [Finding(name, "warning", *problem) for name, rule in WARNINGS.items() for problem in rule(view)]
