"""Level (b), run: kept rows through the engine's own graphs, and the kernels that ONNX Runtime chose, from its profile."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ...engines.sessions import open_session
from ..check import Check, at_least, at_most, equal
from ..subject import Subject

CONV_KERNELS = ("QLinearConv", "ConvInteger")
LINEAR_KERNELS = (
    *("MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulNBits"),
    *("QGemm", "QAttention"),
)
FLOAT_CONV_KERNELS = ("Conv", "FusedConv", "NhwcFusedConv")
FLOAT_LINEAR_KERNELS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")


def kept_rows(subject: Subject) -> Iterator[Check]:
    """Kept rows are the graph's own rows rounded to FP16, and close to the goldens."""
    if subject.manifest.rows.form != "split":
        return
    changed, worst = 0, 0.0
    for i, prompt in enumerate(subject.rows):
        index = np.zeros((1, subject.manifest.rows.kept.slots), dtype=np.int64)
        rows = subject.engine.text_rows(subject.golden["text_embeds"][i : i + 1], index, subject.attached)["rows"][0]
        for slot, position in enumerate(prompt.kept):
            kept, golden = prompt.conditioning["kept"][0, slot], subject.golden["rows"][i, position]
            changed += int((kept != rows[position].astype(np.float16)).sum())
            error = np.abs(kept.astype(np.float64) - golden).max() / max(float(np.abs(golden).max()), 1e-12)
            worst = max(worst, float(error))
    yield at_most("kept rows: values that are not FP16 roundings", changed, 0)
    yield at_most("kept rows: largest error / largest value", worst, subject.limits.kept_error)


def kept_rows_matter(subject: Subject) -> Iterator[Check]:
    """Changing only a used slot changes the prediction; changing only an unused one does not."""
    slots = subject.manifest.rows.kept.slots
    used = [i for i, prompt in enumerate(subject.rows) if prompt.kept]
    if used:
        count = sum(_changes_prediction(subject, i, 0) for i in used)
        yield at_least("kept rows: prompts whose prediction they change", count, len(used))
    spare = [i for i, prompt in enumerate(subject.rows) if len(prompt.kept) < slots]
    if spare and subject.manifest.rows.form == "split":
        count = sum(_changes_prediction(subject, i, slots - 1) for i in spare)
        yield at_most("kept rows: unused slots that change the prediction", count, 0)


def _changes_prediction(subject: Subject, prompt: int, slot: int) -> bool:
    conditioning = dict(subject.rows[prompt].conditioning)
    before = subject.noise_pred(conditioning, 0)
    kept = conditioning["kept"].copy()
    kept[:, slot] = 1 - 2 * kept[:, slot]
    conditioning["kept"] = kept
    return not np.array_equal(before, subject.noise_pred(conditioning, 0))


def kernels(subject: Subject) -> Iterator[Check]:
    """Every layer that the manifest calls quantised ran as an integer kernel, and no other ran as a float one."""
    ran = kernels_that_run(subject)
    census = subject.manifest.census
    convs = _count(census, "conv", lambda weight, activation: activation != "float" and weight != "float")
    linears = _count(census, "linear", lambda weight, _: weight != "float")
    attentions = 2 * len(subject.manifest.rows.layers)  # a block attends to itself and to the text
    float_convs = _count(census, "conv") - convs
    branches = sum(name.endswith(".low_rank_up") for name in subject.unet.tensors)  # two float products each
    float_linears = _count(census, "linear") - linears + 2 * attentions + 2 * branches  # attention: Q.K^T and .V
    small, large = adapter_branches(subject)
    float_convs, float_linears = float_convs + large, float_linears + 2 * small + large
    yield equal("conv layers on integer kernels", sum(ran[kind] for kind in CONV_KERNELS), convs)
    yield equal("linear layers on integer kernels", sum(ran[kind] for kind in LINEAR_KERNELS), linears)
    yield at_most("float conv kernels", sum(ran[kind] for kind in FLOAT_CONV_KERNELS), float_convs)
    yield at_most("float matmul kernels", sum(ran[kind] for kind in FLOAT_LINEAR_KERNELS), float_linears)


def adapter_branches(subject: Subject) -> tuple[int, int]:
    """How many branches the graph has for adapters: of two products each, and of a convolution and a product."""
    inputs, is_wide = subject.engine_manifest.adapters, subject.attached.is_wide
    places = [] if inputs is None else [one for one in inputs.branches["unet"].values() if is_wide or not one.is_wide]
    large = sum(one.op == "conv" and tuple(one.weight[2:]) != (1, 1) for one in places)
    return len(places) - large, large


def kernels_that_run(subject: Subject) -> Counter[str]:
    """How many nodes of each kind ran in one step of the UNet, from ONNX Runtime's own profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(subject.unet_path, subject.threads, profile=Path(folder) / "profile")
        session.run(None, subject.feed(0))
        events = json.loads(Path(session.end_profiling()).read_text())
    names = {
        (event["name"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return Counter(kind for _, kind in names)


def _count(census: dict[str, int], op: str, wanted: Callable[[str, str], bool] = lambda *_: True) -> int:
    """Layers of `op` in a census ('conv int8/int8': 40) whose (weight, activation) is wanted."""
    total = 0
    for key, count in census.items():
        kind, _, types = key.partition(" ")
        weight, _, activation = types.partition("/")
        total += count if kind == op and wanted(weight, activation) else 0
    return total
