"""Levels (a) and (b) of an attached checkpoint: is its adapter its delta, does it fit the engine, does every matrix count?"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personalq.adapters import AdapterManifest
from personalq.bundle import AdapterInputs, Manifest, bundle_key, check_files
from personalq.weights.adapter import Adapter
from personalq.weights.header import read_header
from personalq.weights.models import TOKEN_EMBEDDING

from ...drawing.attaching import Opened
from ...engines.attached import PLAIN, STRENGTH, attach
from ...engines.engine import LOWERING, WIDE
from ...engines.onnxfile import Graph, Node
from ..check import Check, at_most, equal, none_of
from ..subject import Delta, Float, Sources, Subject
from ..taps import Seen
from .integrity import scheduler_differs
from .obedience import QUANTISERS

# The share of a change that float16 matrices may lack: each side rounds at 2^-11, and alpha / rank may round once more.
HALF_ERROR = 2.0**-9
STRENGTHS = (0.0, 0.5)
SURE = 4.0  # standard errors of a factor
PASSES = ("Unsqueeze", "Reshape", "Cast", "Identity")  # what the strength goes through on its way to a branch
MOST_SHARE = 0.75  # of the effect of strength 1, what strength 0.5 may have: a network is no straight line


def intact(folder: Path, manifest: AdapterManifest) -> Check:
    """The adapter's file is there and has the manifest's sha256."""
    return none_of("adapter's files intact", check_files(folder, manifest))


def consistent(adapter: AdapterManifest, base: Manifest, sources: Sources) -> Iterator[Check]:
    """The adapter's key is the hash of its parts; it is of the engine's family and base, and its goldens of its weights."""
    name = adapter.checkpoint.id
    pairs = {
        "key": (bundle_key(adapter.key_parts), adapter.key),
        "base": (adapter.key_parts.get("base", ""), adapter.base_sha256),
    }
    yield none_of("adapter's key is the hash of its parts", _differ(name, pairs))
    of_engine = {
        "family": (base.family, adapter.family),
        "base_sha256": (base.key_parts.get("weights", ""), adapter.base_sha256),
    }
    yield none_of("adapter is of the engine's base", _differ(name, of_engine))
    if sources.golden is not None and sources.golden.is_file():
        made_for = read_header(sources.golden).metadata.get("checkpoint_sha256", "")
        yield none_of("goldens are the checkpoint's", _differ(name, {"goldens": (adapter.checkpoint.sha256, made_for)}))
    if sources.delta is not None:
        yield from _as_in_repository(adapter, sources.delta)


def _as_in_repository(adapter: AdapterManifest, delta: Delta) -> Iterator[Check]:
    """The manifest says what card, settings and tokens of the checkpoint say now."""
    entry = adapter.checkpoint
    now = {"weights": (delta.weights_sha256(), entry.sha256)}
    yield none_of("adapter's checkpoint is as it was exported", _differ(entry.id, now))
    told: dict[str, tuple[object, object]] = {
        "trigger": (delta.trigger, entry.trigger),
        "class noun": (delta.class_noun, entry.class_noun),
        "learned tokens": (delta.learned, tuple((one.token, one.pieces) for one in adapter.learned)),
        "steps": (delta.settings.steps, adapter.steps),
        "guidance": (delta.settings.guidance, adapter.guidance),
    }
    problems = [
        f"{entry.id}: {what} must be the checkpoint's {theirs!r}, got {ours!r}; export again"
        for what, (theirs, ours) in told.items()
        if theirs != ours
    ]
    yield none_of("adapter's words and settings are the checkpoint's", problems)
    yield none_of("adapter's scheduler is the checkpoint's", scheduler_differs(adapter.scheduler, delta.settings))


def _differ(name: str, pairs: dict[str, tuple[str, str]]) -> list[str]:
    return [
        f"{name}: {what} must be {wanted[:12]}..., got {found[:12] or 'nothing'}...; export the checkpoint again"
        for what, (wanted, found) in pairs.items()
        if wanted != found
    ]


def is_the_delta(subject: Subject) -> Iterator[Check]:
    """Every tensor of the adapter is the change that the checkpoint makes in its base's weights, and no change is missing."""
    delta, opened = subject.sources.delta, subject.adapter
    if delta is None or opened is None:
        return
    problems, culprit = list[str](), ""
    for component, names in sorted(delta.changed.items()):
        for name in sorted(names):
            wrong = _tensor_problem(subject, opened, delta, component, name)
            culprit = culprit or (name.removesuffix(".weight") if wrong else "")
            problems += wrong
    known = {f"{component}.{name}" for component, names in delta.changed.items() for name in names}
    foreign = [name for name in _changed_by(opened.adapter) if name not in known]
    problems += [
        f"{name}: must be changed by the checkpoint, got a branch without a change; export again" for name in foreign
    ]
    yield none_of("adapter: tensors that are not the delta's", problems, culprit)


def _changed_by(adapter: Adapter) -> list[str]:
    """The parameters that an adapter changes."""
    of_branches = [f"{part}.{layer}.weight" for part, layers in adapter.branches.items() for layer in layers]
    return of_branches + [f"unet.{layer}.weight" for layer in adapter.changes]


def _tensor_problem(subject: Subject, opened: Opened, delta: Delta, component: str, name: str) -> list[str]:
    read = subject.sources.weights
    where, layer = f"{component}.{name}", name.removesuffix(".weight")
    if read is None or where in opened.manifest.left_out:
        return []
    merged = np.asarray(delta.merged(component, name), np.float32)
    adapter = opened.adapter
    if name.endswith(TOKEN_EMBEDDING):
        got: npt.NDArray[np.floating] | None = adapter.added.get(component)
        wanted: Float = merged[delta.first_added_id :]
    else:
        branch = adapter.branches.get(component, {}).get(layer)
        got = adapter.changes.get(layer) if branch is None else branch.change()
        wanted = merged - np.asarray(read(component, name), np.float32)
    if got is None:
        return [f"{where}: must be in the adapter, got nothing; export again"] if wanted.any() else []
    if got.shape != wanted.shape:
        return [f"{where}: must be a change of {list(wanted.shape)}, got {list(got.shape)}; export again"]
    lost = float(np.linalg.norm(got.astype(np.float32) - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))
    most = opened.manifest.errors.get(f"{component}.{layer}", 0.0) + HALF_ERROR
    problem = f"{where}: must be the checkpoint's change within {most:.2%}, got one {lost:.1%} off; export again"
    return [problem] if lost > most else []


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
        takes = {layer for layer in inputs.branches[name] if f"{layer}.down" in graph.readers}
        wanted = _must_take(inputs, what)
        wrong = {layer: [f"{what}: {layer} must take an adapter, got none; export again"] for layer in wanted - takes}
        wrong |= {layer: _way_problems(graph, what, layer) for layer in sorted(takes)}
        problems += [text for texts in wrong.values() for text in texts]
        culprit = culprit or next((layer for layer, texts in wrong.items() if texts), "")
    yield none_of("adapter: matrices that do not reach their layer as they should", problems, culprit)


def _must_take(inputs: AdapterInputs, graph: str) -> set[str]:
    """The layers that a graph of ONNX Runtime's promises to have a branch at; TensorRT's say themselves."""
    if graph.startswith("unet.") and graph not in (f"unet.{LOWERING}", f"unet.{WIDE}"):
        return set()
    places = inputs.branches[graph.partition(".")[0]]
    return {layer for layer, place in places.items() if graph != f"unet.{LOWERING}" or not place.is_wide}


def _way_problems(graph: Graph, what: str, layer: str) -> list[str]:
    """What is wrong between a layer's matrices and the Add that puts their product beside the layer's own output."""
    problems = list[str]()
    for part in (f"{layer}.down", f"{layer}.up"):
        way = list(_until_added(graph, part))
        problems += [
            f"{what}: {node.name} ({node.op}) stands between {part} and its layer; export again"
            for node in way
            if node.op in QUANTISERS
        ]
        if not any(node.op == "Add" for node in way):
            problems.append(f"{what}: {part} must reach its layer's output, got no Add; export again")
    scaling = {node.name for value in _passed_on(graph, STRENGTH) for node in graph.readers.get(value, [])}
    if any(node.op == "Add" for node in _until_added(graph, f"{layer}.down", but=scaling)):
        problems.append(f"{what}: {layer} must be multiplied by {STRENGTH}, got a branch that is not; export again")
    return problems


def _until_added(graph: Graph, name: str, but: Set[str] = frozenset()) -> Iterator[Node]:
    """The nodes that a matrix goes through, up to and with the Add. but: names of nodes that are not gone through."""
    seen, queue = {name}, [name]
    while queue:
        for node in graph.readers.get(queue.pop(), []):
            if node.outputs[0] in seen or node.name in but or node.op == "Shape":  # sizes are added, too
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


def trigger_in_goldens(subject: Subject) -> Iterator[Check]:
    """The trigger that the adapter names stands in the prompts that the checkpoint's goldens were made with."""
    words = [word for word in subject.manifest.checkpoint.trigger if word.strip()]
    if subject.adapter is None or not words:
        return
    problem = f"trigger: must be in the goldens' prompts, got {', '.join(words)}, which is in none; export again"
    yield none_of("adapter's trigger is in the goldens' prompts", [] if any(subject.trigger_positions) else [problem])
