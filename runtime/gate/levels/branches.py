"""Level (b) of what is attached: the branches of a base's graphs. Do they count, by the strength, and add what is lacking?"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

import numpy as np

from personalq.bundle import DOWN, STRENGTH, UP, AdapterInputs

from ...engines.attached import PLAIN, attach
from ...engines.engine import LOWERING, WIDE
from ...engines.onnxfile import Graph, Node
from ..check import Check, at_most, equal, none_of
from ..subject import Float, Subject
from ..taps import Seen
from .obedience import QUANTISERS

STRENGTHS = (0.0, 0.5)
SURE = 4.0  # standard errors of a factor
PASSES = ("Unsqueeze", "Reshape", "Cast", "Identity")  # what the strength goes through on its way to a branch
MOST_SHARE = 0.75  # of the effect of strength 1, what strength 0.5 may have: a network is no straight line


def matrices_way(subject: Subject) -> Iterator[Check]:
    """In every graph each matrix reaches the sum with its layer: times the strength, past no node that rounds to integers."""
    inputs = subject.engine_manifest.adapters
    if inputs is None:
        return
    graphs, problems, culprit = subject.engine_manifest.graphs, list[str](), ""
    files = {f"unet.{lowering}": (file, "unet") for lowering, file in graphs.unet.items()}
    files |= {name: (getattr(graphs, name), name) for name in inputs.branches if name != "unet"}
    for what, (file, name) in files.items():
        graph = subject.unet if file == subject.unet_path.name else subject.graph(file)
        takes = {layer for layer in inputs.branches[name] if f"{layer}{DOWN}" in graph.readers}
        wanted = _must_take(inputs, what)
        wrong = {layer: [f"{what}: {layer} must take an adapter, got none; export again"] for layer in wanted - takes}
        scaled = {node.outputs[0] for value in _passed_on(graph, STRENGTH) for node in graph.readers.get(value, [])}
        wrong |= {layer: _way_problems(graph, what, layer, scaled) for layer in sorted(takes)}
        problems += [text for texts in wrong.values() for text in texts]
        culprit = culprit or next((layer for layer, texts in wrong.items() if texts), "")
    yield none_of("adapter: matrices that do not reach their layer as they should", problems, culprit)


def _must_take(inputs: AdapterInputs, graph: str) -> set[str]:
    """The layers that a graph of ONNX Runtime's promises to have a branch at; TensorRT's say themselves."""
    if graph.startswith("unet.") and graph not in (f"unet.{LOWERING}", f"unet.{WIDE}"):
        return set()
    places = inputs.branches[graph.partition(".")[0]]
    return {layer for layer, place in places.items() if graph != f"unet.{LOWERING}" or not place.is_wide}


def _way_problems(graph: Graph, what: str, layer: str, scaled: Set[str]) -> list[str]:
    """What is wrong between a layer's matrices and the Add that puts their product beside the layer's own output.

    scaled: values that were multiplied by the strength.
    """
    problems = list[str]()
    for part in (f"{layer}{DOWN}", f"{layer}{UP}"):
        way = list(_until_added(graph, part))
        problems += [
            f"{what}: {node.name} ({node.op}) stands between {part} and its layer; export again"
            for node in way
            if node.op in QUANTISERS
        ]
        if not any(node.op == "Add" for node in way):
            problems.append(f"{what}: {part} must reach its layer's output, got no Add; export again")
    if any(node.op == "Add" for node in _until_added(graph, f"{layer}{DOWN}", but=scaled)):
        problems.append(f"{what}: {layer} must be multiplied by {STRENGTH}, got a branch that is not; export again")
    return problems


def _until_added(graph: Graph, name: str, but: Set[str] = frozenset()) -> Iterator[Node]:
    """The nodes that a matrix goes through, up to and with the Add. but: values that are not gone through."""
    seen, queue = {name}, [name]
    while queue:
        for node in graph.readers.get(queue.pop(), []):
            if node.outputs[0] in seen or node.outputs[0] in but or node.op == "Shape":  # sizes are added, too
                continue
            yield node
            seen.add(node.outputs[0])
            queue += [] if node.op == "Add" else node.outputs


def _passed_on(graph: Graph, name: str) -> set[str]:
    """The values that are `name` in another shape or type."""
    found, queue = {name}, [name]
    while queue:
        made = [node.outputs[0] for node in graph.readers.get(queue.pop(), []) if node.op in PASSES]
        queue += [value for value in made if value not in found]
        found.update(made)
    return found


def strength_counts(subject: Subject) -> Iterator[Check]:
    """At strength 0 the prediction is the base's own, bit for bit; at 0.5 the change is smaller than at 1."""
    inputs, opened = subject.engine_manifest.adapters, subject.adapter
    if inputs is None or opened is None or not subject.attached.pairs.get("unet"):
        return
    conditioning, base = subject.conditioning(0), subject.engine_manifest
    worn = subject.chosen[0].worn(base)
    if worn.adapter.correction:  # a correction of the base's rounding does not depend on the strength
        return
    plain = subject.noise_pred(conditioning, 0, replace(PLAIN, is_wide=subject.attached.is_wide))
    whole = subject.noise_pred(conditioning, 0)
    none, half = (
        subject.noise_pred(conditioning, 0, attach(inputs, [replace(worn, strength=strength)]))
        for strength in STRENGTHS
    )
    yield equal("adapter: values that strength 0 leaves changed", int((none != plain).sum()), 0)
    change, smaller = (whole - plain).astype(np.float64), (half - plain).astype(np.float64)
    # along the whole change: the rounding of an 8-bit layer, which does not shrink with the strength, is at right angles to it
    share = float((smaller * change).sum() / max(float((change**2).sum()), 1e-30))
    yield at_most("adapter: effect of strength 0.5 over that of 1", share, MOST_SHARE)


def text_strength_counts(subject: Subject) -> Iterator[Check]:
    """At strength 0 the text encoders give the base's own states, bit for bit, with the adapter's vectors in their places."""
    inputs, opened = subject.engine_manifest.adapters, subject.adapter
    changed = [name for name, pairs in subject.attached.pairs.items() if name != "unet" and pairs]
    if inputs is None or opened is None or not changed:
        return
    ids = subject.pipeline.token_ids(subject.prompts)
    worn = replace(subject.chosen[0].worn(subject.engine_manifest), text_strength=0.0)
    plain, none = (
        subject.engine.encode(*ids, attached).states
        for attached in (replace(PLAIN, added=subject.attached.added), attach(inputs, [worn]))
    )
    yield equal("adapter: text values that strength 0 leaves changed", int((none != plain).sum()), 0)


def branches_fit(golden: Mapping[str, Float], seen: Seen, stray: float) -> Check:
    """Each branch is what its layer lacks beside the goldens: by least squares, neither half nor twice that, nor another's.

    golden: layer -> (N, samples). A branch that is small beside the rounding around it says nothing: the distance from 1 must
    exceed `stray`, which errors before the layer make, and SURE standard errors of the factor.
    """
    problems, culprit = list[str](), ""
    for layer, branch in seen.branches.items():
        added = branch.astype(np.float64).ravel()
        lacking = (golden[layer].astype(np.float64) - seen.layers[layer]).ravel() + added
        square = float(added @ added)
        if square == 0.0:
            continue
        factor = float(lacking @ added) / square
        error = float(np.linalg.norm(lacking - factor * added)) / np.sqrt(square * max(added.size - 1, 1))
        if abs(factor - 1) > stray + SURE * error:
            problems.append(
                f"{layer}: must add what it lacks beside the goldens, of its branch {factor:.2f} times; export again"
            )
            culprit = culprit or layer
    return none_of("adapter: branches that are not what their layers lack", problems, culprit)
