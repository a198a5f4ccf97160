"""Which layer causes the error? Restore the float weights and inputs of half of the suspect layers at a time, and measure.

Works on the very graph under test: its weights' Dequantize is replaced by the checkpoint's floats, its activations'
Quantize and Dequantize by nothing. Needs the checkpoint's weights (Sources.weights).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import numpy.typing as npt

from personalq.numerics import snr_db

from ..engines.onnxfile import Array, Edited
from ..engines.sessions import open_session
from .levels.obedience import LayerInGraph
from .subject import Subject

LARGEST_MODEL = 1_500_000_000  # bytes; protobuf ends at 2 GB
N_INPUTS = 2  # golden inputs per run: the noisiest and the cleanest


@dataclass(frozen=True)
class Culprit:
    """layer: whose floats take away most of the error; gain_db: what they give the noise prediction."""

    layer: str
    gain_db: float


def quantised_layers(subject: Subject) -> list[str]:
    """Layers with integer weights, in the order the graph computes them."""
    graph = subject.unet
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    found = [LayerInGraph(graph, name) for name in subject.spec_file.spec.layers]
    quantised = [layer for layer in found if layer.node is not None and layer.weight_dq is not None]
    return [layer.name for layer in sorted(quantised, key=lambda layer: order[layer.node.name] if layer.node else 0)]


def with_floats(subject: Subject, layers: Sequence[str]) -> bytes:
    """The UNet with these layers unquantised."""
    graph, read = subject.unet, subject.sources.weights
    assert read is not None
    edited, floats = Edited(graph), dict[str, str]()  # what a Dequantize makes -> the same before it was quantised
    for name in layers:
        layer = LayerInGraph(graph, name)
        if layer.weight_dq is None or layer.node is None:
            continue
        weight = unquantised(read("unet", f"{name}.weight"), name, subject.spec_file.tensors)
        edited.cut_off(layer.weight_dq.outputs[0])
        edited.add_constant(layer.weight_dq.outputs[0], weight if layer.node.op == "Conv" else weight.T)
        if layer.input_dq is not None:
            floats[layer.input_dq.outputs[0]] = graph.producers[layer.input_dq.inputs[0]].inputs[0]
        if layer.output_q is not None:
            floats |= {node.outputs[0]: layer.node.outputs[0] for node in graph.readers[layer.output_q.outputs[0]]}
    for value, source in floats.items():
        edited.cut_off(value)
        edited.add_node("Identity", [source], value)
    return edited.serialized()


def unquantised(weight: Array, name: str, tensors: dict[str, Array]) -> npt.NDArray[np.float32]:
    """What the integers of a layer stand for: its weight, for a balanced input, without its low-rank branch."""
    found = weight.astype(np.float32)
    balance = tensors.get(f"{name}.input_balance", np.ones(found.shape[1], np.float32))
    found = found * balance.reshape(1, -1, *[1] * (found.ndim - 2))
    if f"{name}.low_rank_up" in tensors:
        down, up = (tensors[f"{name}.low_rank_{part}"].astype(np.float32) for part in ("down", "up"))
        found = found - ((down * balance[:, None]) @ up).T
    return np.asarray(found, np.float32)


def bisect(subject: Subject, among: Sequence[str] = ()) -> Culprit | None:
    """The layer that harms the noise prediction most, by bisection in about log2(layers) runs; None when that is impossible.

    among: the layers to ask about, where some of them are quantised; all otherwise.
    """
    everyone = quantised_layers(subject)
    suspects = [name for name in everyone if name in among] or everyone
    n_bytes = sum(4 * int(np.prod(subject.unet.tensors[f"{name}.weight"].shape)) for name in suspects)
    if subject.sources.weights is None or not suspects or n_bytes > LARGEST_MODEL:
        return None
    noise = cache(partial(_noise, subject))
    everything = noise()
    # What floats in all suspects take away; errors of different layers add up, so the halves share it.
    taken = everything - noise(*suspects)
    while len(suspects) > 1:
        first, second = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        by_first = everything - noise(*first)
        suspects, taken = (first, by_first) if by_first >= taken - by_first else (second, taken - by_first)
    left = noise(*suspects)
    return Culprit(suspects[0], float(10 * np.log10(everything / max(left, 1e-30))))


def _noise(subject: Subject, *layers: str) -> float:
    """Squared error of the noise prediction over squared signal, on a few golden inputs, with these layers in floats."""
    file, golden = subject.unet_path, subject.golden
    session = open_session(file, subject.threads, model=with_floats(subject, layers) if layers else None)
    total = 0.0
    for n in np.linspace(0, len(golden["sample"]) - 1, N_INPUTS).astype(int):
        predicted = session.run(["noise_pred"], subject.feed(int(n)))[0][0]
        total += 10 ** (-snr_db(golden["noise_pred"][n], predicted) / 10)
    return total
