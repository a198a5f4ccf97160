"""Levels (a) and (b) of an attached checkpoint: is its adapter its delta, in its words, and of the engine's base?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personalq.adapters import AdapterManifest
from personalq.bundle import Manifest, bundle_key, check_files
from personalq.weights.adapter import Adapter
from personalq.weights.header import read_header
from personalq.weights.models import TOKEN_EMBEDDING

from ...drawing.attaching import Opened
from ..check import Check, none_of
from ..subject import Delta, Float, Sources, Subject
from .integrity import hashes_differ, scheduler_differs

# The share of a change that float16 matrices may lack: each side rounds at 2^-11, and alpha / rank may round once more.
HALF_ERROR = 2.0**-9


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
    return hashes_differ({f"{name}: {what}": pair for what, pair in pairs.items()})


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


def trigger_in_goldens(subject: Subject) -> Iterator[Check]:
    """The trigger that the adapter names stands in the prompts that the checkpoint's goldens were made with."""
    words = [word for word in subject.manifest.checkpoint.trigger if word.strip()]
    if subject.adapter is None or not words:
        return
    problem = f"trigger: must be in the goldens' prompts, got {', '.join(words)}, which is in none; export again"
    yield none_of("adapter's trigger is in the goldens' prompts", [] if any(subject.trigger_positions) else [problem])
