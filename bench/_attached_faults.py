"""Faults of the attached form, in copies of an adapter's bundle and of its base's: what `bench gate` and the tests inject.

As those of bench/_faults.py: a bug's, with every hash made to fit afterwards. Those that concern a base's graphs are put into
the copy of its bundle by the functions there.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench._faults import FAULTS, UNET, Case, damage_golden, reseal
from personalq.adapters import ADAPTER, read_adapter_manifest
from personalq.bundle import MANIFEST, STRENGTH, FileEntry, bundle_key, file_sha256, manifest_bytes, read_manifest
from personalq.repository import Repository
from personalq.weights.adapter import Adapter, Branch, read_adapter
from runtime.engines.onnxfile import Edited, Graph, Node, read_graph


@dataclass(frozen=True)
class AttachedCase:
    """Copies to be spoiled: engine, the base's bundle; adapter, the checkpoint's; golden, its goldens.

    other: another checkpoint's adapter over the same base.
    """

    repository: Repository
    checkpoint_id: str
    engine: Path
    adapter: Path
    golden: Path
    other: Path


AttachedFault = Callable[[AttachedCase], None]


def rewrite(adapter: Path, tensors: Adapter | None = None, **changes: Any) -> None:
    """Put tensors and fields into an adapter's bundle, and make its hashes and its key fit."""
    if tensors is not None:
        (adapter / ADAPTER).write_bytes(tensors.to_bytes())
    manifest, file = read_adapter_manifest(adapter), adapter / ADAPTER
    size = file.stat().st_size
    told: dict[str, Any] = {
        "files": {ADAPTER: FileEntry(sha256=file_sha256(file), bytes=size)},
        "bytes": size,
        **changes,
    }
    parts = told.get("key_parts", manifest.key_parts)
    told |= {"key_parts": parts, "key": bundle_key(parts)}
    (adapter / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update=told)))


def _read(case: AttachedCase) -> Adapter:
    """In memory: its file is written over."""
    found = read_adapter(case.adapter / ADAPTER)
    branches = {part: dict(layers) for part, layers in found.branches.items()}
    return replace(found, branches=branches, changes={name: np.array(one) for name, one in found.changes.items()})


def _unet(case: AttachedCase) -> dict[str, Branch]:
    """The branches that are inputs of the UNet, as it draws."""
    inputs = read_manifest(case.engine).adapters
    assert inputs is not None
    places = inputs.branches["unet"]
    return {layer: one for layer, one in _read(case).branches.get("unet", {}).items() if layer in places}


def _with(adapter: Adapter, changed: Mapping[str, Branch]) -> Adapter:
    return replace(adapter, branches={**adapter.branches, "unet": {**adapter.branches["unet"], **changed}})


def missing_layer(case: AttachedCase) -> None:
    """One layer's pair is not in the file."""
    adapter, names = _read(case), sorted(_unet(case))
    left = {name: one for name, one in adapter.branches["unet"].items() if name != names[len(names) // 2]}
    rewrite(case.adapter, replace(adapter, branches={**adapter.branches, "unet": left}))


def alpha_twice(case: AttachedCase) -> None:
    """alpha / rank, here 2, is in the matrices already and is multiplied in once more."""
    adapter = _read(case)
    branches = {
        part: {name: replace(one, up=one.up * np.float16(2)) for name, one in layers.items()}
        for part, layers in adapter.branches.items()
    }
    rewrite(case.adapter, replace(adapter, branches=branches))


def two_layers_swapped(case: AttachedCase) -> None:
    """Two layers of the same shapes have each other's matrices, down and up."""
    adapter, found = _read(case), _unet(case)
    first, second = _same_shapes(found)
    rewrite(case.adapter, _with(adapter, {first: found[second], second: found[first]}))


def _same_shapes(found: Mapping[str, Branch]) -> tuple[str, str]:
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for name, one in sorted(found.items()):
        if (other := seen.setdefault((one.down.shape, one.up.shape), name)) != name:
            return other, name
    raise ValueError("the adapter must have two layers of the same shapes, got none")


def strength_ignored(case: AttachedCase) -> None:
    """A branch of the UNet, at a layer that the adapter changes, is not multiplied by the strength."""
    graph = read_graph(case.engine / _drawing(case))
    layer = sorted(_unet(case))[0]
    _by_one(graph, _scaling(graph, layer))


def text_strength_ignored(case: AttachedCase) -> None:
    """The same in the text encoder."""
    graph = read_graph(case.engine / "text_encoder.onnx")
    _by_one(graph, _scaling(graph, sorted(_read(case).branches["text_encoder"])[0]))


def _drawing(case: AttachedCase) -> str:
    """The UNet's file that draws with the adapter: the wide one where it changes a layer of that one alone."""
    manifest = read_manifest(case.engine)
    assert manifest.adapters is not None
    places = manifest.adapters.branches["unet"]
    return "unet.ort_wide.onnx" if any(places[layer].is_wide for layer in _unet(case)) else UNET


def _scaling(graph: Graph, layer: str) -> Node:
    """The Mul of a branch by the strength."""
    (unsqueezed,) = (node.outputs[0] for node in graph.readers[STRENGTH])
    return next(node for node in graph.readers[unsqueezed] if node.name.startswith(f"{layer}.branch_"))


def _by_one(graph: Graph, scaling: Node) -> None:
    edited = Edited(graph)
    edited.cut_off(scaling.outputs[0])
    edited.add_node("Identity", [scaling.inputs[0]], scaling.outputs[0])
    graph.path.write_bytes(edited.serialized())


def others_trigger_kept(case: AttachedCase) -> None:
    """The manifest names the other checkpoint's trigger, whose rows are then kept."""
    mine, other = (read_adapter_manifest(folder).checkpoint for folder in (case.adapter, case.other))
    assert mine.trigger != other.trigger, f"{mine.id} and {other.id}: the same trigger"
    rewrite(case.adapter, checkpoint=mine.model_copy(update={"trigger": other.trigger}))


def adapter_of_another_base(case: AttachedCase) -> None:
    """An honest export, over another base of the family: one whose UNet was trained a little further."""
    from exporters.adapters import export_adapter

    root = case.adapter.parent / "another-base"
    base = case.repository.card(case.checkpoint_id).base
    for part in (f"bases/{base}", f"checkpoints/{case.checkpoint_id}"):
        shutil.copytree(case.repository.root / part, root / part)
    _move(next((root / "bases" / base / "unet").glob("*.safetensors")))
    made = export_adapter(Repository.open(root), case.checkpoint_id).bundle
    shutil.copytree(made, case.adapter, dirs_exist_ok=True)


def _move(file: Path) -> None:
    """Every weight a tenth of a per cent larger."""
    from safetensors.numpy import load_file, save_file

    save_file({name: (one * 1.001).astype(one.dtype) for name, one in load_file(file).items()}, file)


def pieces_swapped(case: AttachedCase) -> None:
    """Two pieces of a learned token have each other's vectors. Needs a token of several pieces."""
    adapter = _read(case)
    added = {encoder: np.array(vectors)[::-1] for encoder, vectors in adapter.added.items()}
    rewrite(case.adapter, replace(adapter, added=added))


def change_negated(case: AttachedCase) -> None:
    """K of one layer was changed the other way: base less checkpoint. Needs a checkpoint that replaces K and V."""
    adapter = _read(case)
    name = sorted(adapter.changes)[0]
    rewrite(case.adapter, replace(adapter, changes={**adapter.changes, name: -adapter.changes[name]}))


def wrong_scheduler(case: AttachedCase) -> None:
    """The adapter's manifest has another base's betas: it is the one that is drawn with."""
    scheduler = read_adapter_manifest(case.adapter).scheduler
    rewrite(case.adapter, scheduler={**scheduler, "beta_schedule": "linear"})


def golden_corrupted(case: AttachedCase) -> None:
    """A tenth of one golden prediction is zeros."""
    damage_golden(case.golden)


def in_engine(name: str) -> AttachedFault:
    """A fault of bench/_faults.py in the base's bundle."""

    def inject(case: AttachedCase) -> None:
        FAULTS[name](Case(case.repository, case.checkpoint_id, case.engine, case.engine, _drawing(case)))

    return inject


LORA, TEXT_LORA, TOKENS, CHANGES = "lora", "lora of the text encoder", "several pieces", "replaced K and V"
ATTACHED_FAULTS: dict[str, AttachedFault] = {
    "missing layer": missing_layer,
    "alpha applied twice": alpha_twice,
    "two layers swapped": two_layers_swapped,
    "strength ignored": strength_ignored,
    "text strength ignored": text_strength_ignored,
    "other's trigger kept": others_trigger_kept,
    "adapter of another base": adapter_of_another_base,
    "pieces of a token swapped": pieces_swapped,
    "change of K negated": change_negated,
    "wrong scheduler in adapter": wrong_scheduler,
    "corrupted golden": golden_corrupted,
}
IN_ENGINE = (
    *("scale x1.1", "zero point off by one", "two channels swapped", "bias dropped"),
    *("trigger index shifted", "wrong tokenizer"),
)
ATTACHED_FAULTS |= {f"base: {name}": in_engine(name) for name in IN_ENGINE}
NEEDS: dict[str, str] = {
    **dict.fromkeys(("missing layer", "alpha applied twice", "two layers swapped", "strength ignored"), LORA),
    "text strength ignored": TEXT_LORA,
    "pieces of a token swapped": TOKENS,
    "change of K negated": CHANGES,
}


def fits(fault: str, adapter: Path) -> bool:
    """Whether an adapter has what a fault spoils."""
    found, manifest = read_adapter(adapter / ADAPTER), read_adapter_manifest(adapter)
    has = {
        LORA: bool(found.branches.get("unet")),
        TEXT_LORA: bool(found.branches.get("text_encoder")),
        TOKENS: any(len(one.pieces) > 1 for one in manifest.learned),
        CHANGES: bool(found.changes),
    }
    return fault not in NEEDS or has[NEEDS[fault]]


def inject_attached(name: str, case: AttachedCase) -> None:
    """Spoil the case's copies, then make every hash of the engine fit; an adapter's are made to fit at once."""
    ATTACHED_FAULTS[name](case)
    reseal(case.engine)
