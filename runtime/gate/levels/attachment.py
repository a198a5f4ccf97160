"""Levels (a) and (b) of an attached checkpoint: is its adapter its delta, does it fit the engine, does every matrix count?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personalq.adapters import AdapterManifest
from personalq.bundle import Manifest, bundle_key, check_files
from personalq.rows import find_sequence
from personalq.weights.adapter import Adapter
from personalq.weights.header import read_header
from personalq.weights.models import TOKEN_EMBEDDING

from ...drawing.attaching import Chosen, Opened
from ...engines.attached import PLAIN, STRENGTH, attach
from ...engines.onnxfile import Graph
from ..check import Check, at_most, equal, none_of
from ..subject import Delta, Float, Sources, Subject
from .obedience import QUANTISERS

# The share of a change that float16 matrices may lack: each side rounds at 2^-11, and alpha / rank may round once more.
HALF_ERROR = 2.0**-9
STRENGTHS = (0.0, 0.5)
LINEAR_SHARE = 1.5  # of the effect of strength 1, how much at most strength 0.5 may have: a network is no straight line


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
    if sources.golden is not None and sources.golden.is_file():  # files alone can be checked without goldens
        made_for = read_header(sources.golden).metadata.get("checkpoint_sha256", "")
        yield none_of("goldens are the checkpoint's", _differ(name, {"goldens": (adapter.checkpoint.sha256, made_for)}))
    if sources.weights_sha256 is not None:
        now = {"weights": (sources.weights_sha256(), adapter.checkpoint.sha256)}
        yield none_of("checkpoint is as it was exported", _differ(name, now))
    if sources.delta is not None:
        entry, delta = adapter.checkpoint, sources.delta
        said = {"trigger": (delta.trigger, entry.trigger), "class noun": (delta.class_noun, entry.class_noun)}
        odd = [(what, card, ours) for what, (card, ours) in said.items() if card != ours]
        problems = [
            f"{name}: {what} must be the card's {card!r}, got {ours!r}; export again" for what, card, ours in odd
        ]
        yield none_of("adapter's words are the card's", problems)


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


def no_quantiser(subject: Subject) -> Iterator[Check]:
    """No node between an adapter's matrices and the sum with its layer rounds to integers, and each is read."""
    inputs, opened = subject.engine_manifest.adapters, subject.adapter
    if inputs is None or opened is None:
        return
    problems = []
    for name in sorted(subject.attached.feed(inputs, "unet", is_wide=subject.attached.is_wide)):
        if name != STRENGTH:
            problems += _way_problems(subject.unet, name)
    yield none_of("adapter: matrices that are not read, or pass a quantiser", problems)


def _way_problems(graph: Graph, name: str) -> list[str]:
    """What is wrong on the way from a matrix to the Add that puts its branch beside the layer's own output."""
    seen, queue, is_added, problems = {name}, [name], False, list[str]()
    while queue:
        for node in graph.readers.get(queue.pop(), []):
            if node.op in QUANTISERS:
                problems.append(f"unet: {node.name} ({node.op}) stands between {name} and its layer; export again")
            if node.op == "Add" or node.outputs[0] in seen:
                is_added = is_added or node.op == "Add"
                continue
            seen.add(node.outputs[0])
            queue.append(node.outputs[0])
    return problems if is_added else [*problems, f"{name}: must reach its layer's output, got no Add; export again"]


def strength_counts(subject: Subject) -> Iterator[Check]:
    """At strength 0 the prediction is the base's own, bit for bit; at 0.5 the change is smaller than at 1."""
    inputs, opened = subject.engine_manifest.adapters, subject.adapter
    if inputs is None or opened is None or not subject.attached.pairs.get("unet"):
        return
    conditioning = subject.conditioning(0)
    whole = subject.noise_pred(conditioning, 0)
    none, half = (
        subject.noise_pred(conditioning, 0, attach(inputs, [Chosen(opened, strength).worn(subject.engine_manifest)]))
        for strength in STRENGTHS
    )
    plain = subject.noise_pred(conditioning, 0, PLAIN)
    worn = subject.wearing.chosen[0].worn(subject.engine_manifest)
    if not worn.adapter.correction:  # a correction of the base's rounding does not depend on the strength
        yield equal("adapter: values that strength 0 leaves changed", int((none != plain).sum()), 0)
    change, smaller = float(np.linalg.norm(whole - plain)), float(np.linalg.norm(half - plain))
    yield at_most("adapter: effect of strength 0.5 over that of 1", smaller / max(change, 1e-12), LINEAR_SHARE / 2)


def trigger_in_goldens(subject: Subject) -> Iterator[Check]:
    """The trigger whose rows are kept stands in the prompts that the checkpoint's goldens were made with."""
    if subject.adapter is None or not subject.manifest.rows.kept.trigger:
        return
    ids = subject.golden["ids"].tolist()
    found = any(find_sequence(row, trigger) for trigger in subject.manifest.rows.kept.trigger for row in ids)
    words = ", ".join(subject.manifest.checkpoint.trigger)
    problem = f"rows.kept.trigger: must be in the goldens' prompts, got {words}, which is in none; export again"
    yield none_of("kept trigger is in the goldens' prompts", [] if found else [problem])
