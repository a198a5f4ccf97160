"""Faults a bundle can have, each as a function that puts it into a copy: what `bench gate` and the tests inject.

A fault is what a bug in an exporter, a runtime or a copy job would leave behind, so every hash in the manifest is made
to fit afterwards (see `reseal`): none is found by its bytes alone. Bench-only: the gate itself never writes a bundle.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from personalq.bundle import MANIFEST, FileEntry, bundle_key, file_sha256, manifest_bytes, read_manifest
from personalq.goldens import GOLDEN
from personalq.numerics import INT4, mse_scale
from personalq.repository import Repository
from personalq.spec import SpecFile, read_spec
from runtime.engines.onnxfile import Edited, Graph, Tensor, read_graph, read_model
from runtime.gate.levels.obedience import LayerInGraph

UNET, TEXT_ENCODER = "unet.ort.onnx", "text_encoder.onnx"


@dataclass(frozen=True)
class Case:
    """Where a fault is put. folder: a copy of the bundle, to be spoiled. other: another checkpoint's, of the same family.

    unet: the graph that draws: a base has two.
    """

    repository: Repository
    checkpoint_id: str
    folder: Path
    other: Path
    unet: str = UNET


Fault = Callable[[Case], None]


def overwrite(graph: Graph, name: str, array: npt.NDArray[Any]) -> None:
    """Put values of the same bytes in an initializer's place, in the graph's file or beside it."""
    tensor, blob = graph.tensors[name], np.ascontiguousarray(array).tobytes()
    assert len(blob) == tensor.length, f"{name}: {len(blob)} bytes in place of {tensor.length}"
    if tensor.raw is None:
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(blob)
        return
    model = read_model(graph.path)
    (held,) = (one for one in model.graph.initializer if one.name == name)
    held.raw_data = blob
    graph.path.write_bytes(model.SerializeToString())


def reseal(folder: Path, **changes: Any) -> None:
    """Write the manifest so that every hash, and the key, fits what lies in the folder now."""
    manifest = read_manifest(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    files = {name: FileEntry(sha256=file_sha256(folder / name), bytes=(folder / name).stat().st_size) for name in names}
    spec = manifest.spec.model_copy(update={"sha256": read_spec(folder / "spec.json").content_sha256()})
    golden = {"reference": file_sha256(folder / GOLDEN)} if (folder / GOLDEN).is_file() else {}
    parts = {**manifest.key_parts, "spec": spec.sha256, **golden}
    new = {"files": files, "spec": spec, "key_parts": parts, "key": bundle_key(parts), **changes}
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update=new)))


def quantised_layer(case: Case, op: str) -> tuple[Graph, LayerInGraph, Tensor]:
    """The middle quantised layer of a kind, and its weight."""
    graph, spec = read_graph(case.folder / case.unet), read_spec(case.folder / "spec.json").spec
    names = [name for name, layer in spec.layers.items() if layer.op == op and layer.weight == "int8"]
    name = names[len(names) // 2]
    return graph, LayerInGraph(graph, name), graph.tensors[f"{name}.weight"]


def scale_times_1_1(case: Case) -> None:
    """One layer's weight scales are 10 % too large."""
    graph, layer, _ = quantised_layer(case, "conv")
    scale = layer.weight_dq.inputs[1]
    overwrite(graph, scale, graph.constant(scale) * np.float32(1.1))


def zero_point_off_by_one(case: Case) -> None:
    """One layer's weights are read with zero point 1."""
    graph, layer, _ = quantised_layer(case, "linear")
    zero = layer.weight_dq.inputs[2]
    overwrite(graph, zero, graph.constant(zero) + np.int8(1))


def channels_swapped(case: Case) -> None:
    """Two output channels of one convolution changed places."""
    graph, _, tensor = quantised_layer(case, "conv")
    weight = tensor.read().copy()
    weight[[0, 1]] = weight[[1, 0]]
    overwrite(graph, tensor.name, weight)


def wrong_row_kept(case: Case) -> None:
    """Spec and manifest agree on keeping the row of another word than the trigger."""
    spec_file, manifest = read_spec(case.folder / "spec.json"), read_manifest(case.folder)
    kept = manifest.rows.kept
    other = kept.model_copy(update={"trigger": tuple(tuple(i - 1 for i in ids) for ids in kept.trigger)})
    rows = spec_file.spec.rows.model_copy(update={"kept": other})
    SpecFile(spec_file.spec.model_copy(update={"rows": rows}), spec_file.tensors).write(case.folder / "spec.json")
    reseal(case.folder, rows=manifest.rows.model_copy(update={"kept": other}))


def trigger_index_shifted(case: Case) -> None:
    """The UNet puts each kept row one place too late, and reads the rest row at its own.

    (Shifting every index would be no fault: attention does not ask for the order of the rows.)
    """
    graph = read_graph(case.folder / case.unet)
    edited, reader = Edited(graph), graph.readers["row_index"][0]
    value, tokens = reader.outputs[0], read_manifest(case.folder).text.length
    edited.cut_off(value)
    numbers = {"last": [-1], "start": [0], "far": [10**6], "one": [1], "tokens": [tokens], "own": [range(tokens)]}
    for name, number in numbers.items():
        edited.add_constant(f"fault_{name}", np.array(number, np.int64))
    edited.add_node("Slice", ["row_index", "fault_last", "fault_far", "fault_one"], "fault_tail")
    edited.add_node("Slice", ["row_index", "fault_start", "fault_last", "fault_one"], "fault_head")
    edited.add_node("Concat", ["fault_tail", "fault_head"], "fault_late", axis=1)
    edited.add_node("GreaterOrEqual", ["fault_late", "fault_tokens"], "fault_kept")
    edited.add_node("Where", ["fault_kept", "fault_late", "fault_own"], "fault_index")
    edited.add_node(reader.op, ["fault_index", *reader.inputs[1:]], value)
    graph.path.write_bytes(edited.serialized())


def bias_dropped(case: Case) -> None:
    """One convolution lost its bias."""
    graph, layer, _ = quantised_layer(case, "conv")
    bias = f"{layer.name}.bias"
    overwrite(graph, bias, np.zeros_like(graph.constant(bias)))


def other_checkpoints_weights(case: Case) -> None:
    """The UNet is another checkpoint's."""
    for name in (UNET, "weights.data"):
        shutil.copyfile(case.other / name, case.folder / name)


def stale_text_encoder(case: Case) -> None:
    """The trigger's embedding is the class noun's, as before training."""
    manifest = read_manifest(case.folder)
    graph = read_graph(case.folder / TEXT_ENCODER)
    table = next(tensor for name, tensor in graph.tensors.items() if "token_embedding" in name)
    values, kept = table.read().copy(), manifest.rows.kept
    noun = kept.class_noun[0][0] if kept.class_noun else 0
    values[kept.trigger[0][0]] = values[noun]
    overwrite(graph, table.name, values)


def nibbles_swapped(case: Case) -> None:
    """A 4-bit weight was packed high nibble first. Needs a bundle with a 4-bit layer, see `with_int4`."""
    graph = read_graph(case.folder / UNET)
    tensor = next(t for t in graph.tensors.values() if t.kind == "int4")
    packed = np.frombuffer(tensor.read_bytes(), np.uint8)
    overwrite(graph, tensor.name, packed << 4 | packed >> 4)


def lora_merged_twice(case: Case) -> None:
    """The UNet was exported with the LoRA's delta added twice. Needs a LoRA checkpoint."""
    root = case.folder.parent / "merged-twice"
    for part in ("bases", "families", f"checkpoints/{case.checkpoint_id}"):
        shutil.copytree(case.repository.root / part, root / part, dirs_exist_ok=True)
    doubled = Repository.open(root)
    folder = doubled.checkpoint_dir(case.checkpoint_id)
    for file in folder.glob("*.safetensors"):
        _double_lora(file)
    made = export_with(doubled, case.checkpoint_id, read_spec(case.folder / "spec.json"))
    for name in (UNET, "weights.data", "text_rows.onnx", "text_rows.data"):
        shutil.copyfile(made / name, case.folder / name)


def wrong_prediction_type(case: Case) -> None:
    """The manifest's scheduler says v_prediction where the base says epsilon, or the other way."""
    scheduler = dict(read_manifest(case.folder).scheduler)
    is_v = scheduler.get("prediction_type", "epsilon") == "v_prediction"
    reseal(case.folder, scheduler={**scheduler, "prediction_type": "epsilon" if is_v else "v_prediction"})


def wrong_scheduler(case: Case) -> None:
    """The manifest's noise schedule is another base's: linear betas."""
    reseal(case.folder, scheduler={**read_manifest(case.folder).scheduler, "beta_schedule": "linear"})


def wrong_tokenizer(case: Case) -> None:
    """Two words of the trigger's prompts have each other's ids, as in the tokenizer of another model."""
    file = case.folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = "photo</w>", "a</w>"
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))


def golden_corrupted(case: Case) -> None:
    """A tenth of one golden prediction is zeros."""
    damage_golden(case.folder / GOLDEN)


def damage_golden(file: Path) -> None:
    """Write the same goldens with a part of them zeros."""
    with safe_open(str(file), framework="numpy") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    flat = tensors["noise_pred"][0].reshape(-1)
    flat[: flat.size // 10] = 0
    save_file(tensors, file, metadata)


FAULTS: dict[str, Fault] = {
    "scale x1.1": scale_times_1_1,
    "zero point off by one": zero_point_off_by_one,
    "two channels swapped": channels_swapped,
    "wrong row kept": wrong_row_kept,
    "trigger index shifted": trigger_index_shifted,
    "bias dropped": bias_dropped,
    "another checkpoint's weights": other_checkpoints_weights,
    "stale text encoder": stale_text_encoder,
    "int4 nibbles swapped": nibbles_swapped,
    "LoRA merged twice": lora_merged_twice,
    "wrong prediction type": wrong_prediction_type,
    "wrong scheduler": wrong_scheduler,
    "wrong tokenizer": wrong_tokenizer,
    "corrupted golden": golden_corrupted,
}
NEEDS_INT4, NEEDS_LORA = ("int4 nibbles swapped",), ("LoRA merged twice",)


def inject(name: str, case: Case) -> None:
    """Spoil the case's folder, then make every hash fit."""
    FAULTS[name](case)
    reseal(case.folder)


def with_int4(repository: Repository, checkpoint_id: str, spec_file: SpecFile, layers: list[str]) -> SpecFile:
    """The spec with these layers at 4 bits, rounded to nearest: worse on purpose, and honest about it."""
    from personalq.weights.checkpoint import open_weights

    card = repository.card(checkpoint_id)
    weights = open_weights(repository.base_dir(card), repository.checkpoint_dir(card.id), card.kind).component("unet")
    decisions, tensors = dict(spec_file.spec.layers), dict(spec_file.tensors)
    for name in layers:
        weight = weights.read(f"{name}.weight").astype(np.float32)
        decisions[name] = decisions[name].model_copy(update={"weight": "int4", "rounding": "nearest"})
        tensors[f"{name}.weight_scale"] = mse_scale(weight, INT4, 0, where=name)
        tensors.pop(f"{name}.weight_q", None)
    return SpecFile(spec_file.spec.model_copy(update={"layers": decisions}), tensors)


def export_with(repository: Repository, checkpoint_id: str, spec_file: SpecFile) -> Path:
    """Export a checkpoint, as it lies in the repository, under a spec that may have been made for another one."""
    from exporters.export import export_checkpoint
    from personalq.repository.identity import weights_sha256

    card = repository.card(checkpoint_id)
    sha256 = weights_sha256(repository.base_dir(card), repository.checkpoint_dir(card.id))
    provenance = spec_file.spec.provenance.model_copy(update={"checkpoint_sha256": sha256})
    spec = spec_file.spec.model_copy(update={"provenance": provenance})
    path = repository.root / "specs" / checkpoint_id / f"{spec.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return export_checkpoint(repository, checkpoint_id, SpecFile(spec, spec_file.tensors).write(path)).bundle


def _double_lora(file: Path) -> None:
    """Every up-projection times two: the delta up @ down is added twice."""
    with safe_open(str(file), framework="numpy") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    changed = {n: t * 2 if ".lora_up." in n or ".lora_B." in n or ".lora.up." in n else t for n, t in tensors.items()}
    assert any(not np.array_equal(changed[name], tensors[name]) for name in tensors), f"{file}: no LoRA in it"
    save_file({name: np.ascontiguousarray(value) for name, value in changed.items()}, file, metadata)
