"""SDXL reads the states before its text encoders' last layers: adapters change those too, and that is left out and told."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.adapters import AdapterManifest
from personalq.bundle import BranchPlace, CheckpointEntry
from personalq.weights.adapter import Adapter, Branch
from runtime.drawing.attaching import Chosen, Opened
from runtime.drawing.pipeline import Pipeline
from runtime.engines.ort import OrtEngine
from tests.exporters.adapters import Matrices, merge_, random_adapter

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
from tests.exporters.families import Made  # noqa: E402  (needs torch)

TOLERANCE = 2e-4  # FP32 on both sides, sums in another order; the changes are as large as the weights
ENCODERS = ("text_encoder", "text_encoder_2")
LAST = "encoder.layers.1."  # of two; whether a prefix comes before depends on the version of transformers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Made:
    return Made("sdxl", tmp_path_factory.mktemp("sdxl"), traces)


@pytest.fixture(scope="module")
def engine(made: Made) -> OrtEngine:
    from exporters.export import export_base
    from exporters.request import reference_spec

    spec = reference_spec(made.repository, "tiny", "fp32")
    return OrtEngine(export_base(made.repository, "tiny", spec).bundle, threads=1)


@pytest.fixture(scope="module")
def changes(made: Made) -> dict[str, dict[str, Matrices]]:
    """Of every Linear of both text encoders, as kohya's trainer makes them."""
    found = {}
    for graph in ENCODERS:
        linears = {
            name: BranchPlace(op="linear", weight=tuple(module.weight.shape))
            for name, module in getattr(made.pipe, graph).named_modules()
            if isinstance(module, torch.nn.Linear) and name != "text_projection"
        }
        found[graph] = random_adapter(linears, linears, rank=2)
    return found


def attached_to(engine: OrtEngine, changes: dict[str, dict[str, Matrices]]) -> Pipeline:
    branches = {
        graph: {layer: Branch(one.down.astype(np.float16), one.up.astype(np.float16)) for layer, one in layers.items()}
        for graph, layers in changes.items()
    }
    manifest = AdapterManifest(
        key="a" * 64,
        key_parts={},
        checkpoint=CheckpointEntry(id="rex", name="Rex", kind="lora", base="tiny", sha256="b" * 64),
        base_sha256=engine.manifest.key_parts["weights"],
        family=engine.manifest.family,
        exporter_version="1",
        scheduler=engine.manifest.scheduler,
    )
    return Pipeline(engine, [Chosen(Opened(manifest, Adapter(branches)))])


def by_transformers(made: Made, graph: str, ids: np.ndarray, changes: dict[str, Matrices]) -> Any:
    """(states before the last layer, pooled text or None), the changes in the weights as float16 has them."""
    module = copy.deepcopy(getattr(made.pipe, graph))
    halves = {
        name: Matrices(*(part.astype(np.float16).astype(np.float32) for part in (one.down, one.up)))
        for name, one in changes.items()
    }
    merge_(module, halves, 1.0)
    with torch.no_grad():
        out = module(input_ids=torch.from_numpy(ids), output_hidden_states=True)
    return out.hidden_states[-2].numpy(), out.text_embeds.numpy() if graph == "text_encoder_2" else None


def test_the_text_is_transformers_with_every_layer_changed(
    made: Made, engine: OrtEngine, changes: dict[str, dict[str, Matrices]]
) -> None:
    pipeline = attached_to(engine, changes)
    texts = ["a red mug", "a sks dog on the beach"]
    first, second = pipeline.token_ids(texts)
    assert second is not None
    found = pipeline.embed(texts)
    states, _ = by_transformers(made, "text_encoder", first, changes["text_encoder"])
    more, pooled = by_transformers(made, "text_encoder_2", second, changes["text_encoder_2"])
    expected = np.concatenate([states, more], axis=-1)
    assert np.abs(found.states - expected).max() <= TOLERANCE
    assert found.pooled is not None and np.abs(found.pooled - pooled).max() <= TOLERANCE
    assert np.abs(Pipeline(engine).embed(texts).states - expected).max() > 100 * TOLERANCE


def test_one_line_tells_how_many_layers_are_left_out_and_the_first(
    engine: OrtEngine, changes: dict[str, dict[str, Matrices]]
) -> None:
    told = attached_to(engine, changes).wearing.warnings
    last = [layer for layer in changes["text_encoder"] if LAST in layer]
    assert len(last) == 6 and told == (
        f"rex: 6 of its text encoder layers are not in this engine's graphs and not used, the first text_encoder.{last[0]}",
    )


def test_nothing_is_told_when_every_layer_has_a_place(
    engine: OrtEngine, changes: dict[str, dict[str, Matrices]]
) -> None:
    inside = {name: one for name, one in changes["text_encoder"].items() if LAST not in name}
    assert attached_to(engine, {**changes, "text_encoder": inside}).wearing.warnings == ()
