"""A base's bundle: its graphs with an adapter in their inputs compute what torch does with the adapter in its weights."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from exporters.export import export_base
from exporters.lint import lint_trt
from exporters.plain import unquantised_spec
from exporters.request import is_current, last_spec, reference_spec
from exporters.targets.settings import BuildSettings
from exporters.targets.tensorrt import graph_shapes
from personalq.bundle import BranchPlace, Manifest, read_manifest
from personalq.errors import RepositoryError, SpecError
from personalq.repository.identity import weights_sha256
from personalq.spec import SpecFile, read_spec
from runtime.engines.sessions import open_session
from tests.exporters.adapters import Matrices, branch_feed, merge_, random_adapter

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
from tests.exporters.families import Made, eight_bits, ranges  # noqa: E402  (needs torch)
from tests.exporters.rtx import require_compiles  # noqa: E402

# FP32 on both sides, sums in another order; the changes are as large as the weights.
TOLERANCE = 2e-4
PROMPT_IDS = 77


@pytest.fixture(scope="module", params=("sd1", "sd2", "sdxl"))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(f"base-{request.param}"), traces)


@pytest.fixture(scope="module")
def base(made: Made) -> "Base":
    return Base(made, plain_spec(made))


class Base:
    """A base's bundle, its sessions as the runtime opens them, and inputs for them."""

    def __init__(self, made: Made, spec: SpecFile) -> None:
        path = spec.write(made.repository.root / "specs" / "tiny" / f"{spec.spec.name}.json")
        self.made, self.result = made, export_base(made.repository, "tiny", path)
        self.bundle = self.result.bundle
        self.manifest: Manifest = read_manifest(self.bundle)
        assert self.manifest.adapters is not None
        self.inputs = self.manifest.adapters
        self.sessions: dict[str, Any] = {}

    @property
    def places(self) -> dict[str, BranchPlace]:
        return self.inputs.branches["unet"]

    def run(self, file: str, feed: dict[str, Any]) -> list[np.ndarray]:
        if file not in self.sessions:
            self.sessions[file] = open_session(self.bundle / file, threads=1)
        return self.sessions[file].run(None, feed)

    def predict(
        self, batch: int, adapters: list[dict[str, Matrices]], strengths: list[float], *, is_wide: bool = False
    ) -> np.ndarray:
        feed = {**self.conditions(batch), **branch_feed(self.places, adapters, strengths, is_wide=is_wide)}
        return self.run(self.manifest.graphs.unet["ort_wide" if is_wide else "ort"], feed)[0]

    def conditions(self, batch: int) -> dict[str, np.ndarray]:
        """Everything the UNet takes but adapters."""
        return {**latents(batch), **self.rows(embeddings(self.made, batch)), **size(self.made, batch)}

    def rows(self, embeds: np.ndarray, added: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """What the row encoder makes of embeddings, the first rows kept, by the UNet's names."""
        width, batch = self.manifest.rows.width, len(embeds)
        added = np.zeros((1, 1, width), np.float32) if added is None else added
        if self.manifest.rows.form == "full":
            return {"rows": self.run("text_rows.onnx", {"text_embeds": embeds, "added_rows": added})[0]}
        slots = self.manifest.rows.kept.slots
        index = np.repeat(np.arange(slots, dtype=np.int64)[None], batch, 0)
        feed = {"text_embeds": embeds, "added_rows": added, "kept_index": index}
        _, rest, rest_scale, kept = self.run("text_rows.onnx", feed)
        order = np.concatenate([np.arange(77, 77 + slots), np.arange(slots, 77)])
        places = np.repeat(order[None], batch, 0)
        return {"rest": rest, "rest_scale": rest_scale, "kept": kept, "row_index": places}


def plain_spec(made: Made) -> SpecFile:
    root = made.repository.root / "bases" / "tiny"
    return unquantised_spec(made.family(made.repository), "tiny", weights_sha256(root, None), "fp32")


def latents(batch: int) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(1).standard_normal((batch, 4, 8, 12)).astype(np.float32)
    return {"sample": sample, "timestep": np.array([321.0], np.float32)}


def embeddings(made: Made, batch: int) -> np.ndarray:
    width = made.pipe.unet.config.cross_attention_dim
    return np.random.default_rng(2).standard_normal((batch, 77, width)).astype(np.float32)


def size(made: Made, batch: int) -> dict[str, np.ndarray]:
    """SDXL's two more inputs."""
    if made.name != "sdxl":
        return {}
    pooled = np.random.default_rng(3).standard_normal((batch, 20)).astype(np.float32)
    return {"text_embeds": pooled, "time_ids": np.tile(np.array([16, 24, 0, 0, 16, 24], np.float32), (batch, 1))}


def by_torch(made: Made, batch: int, adapter: dict[str, Matrices], strength: float) -> np.ndarray:
    """diffusers' UNet whose weights hold the adapter."""
    unet = copy.deepcopy(made.pipe.unet)
    merge_(unet, adapter, strength)
    given = latents(batch)
    added = {name: torch.from_numpy(value) for name, value in size(made, batch).items()} or None
    with torch.no_grad():
        sample, states = torch.from_numpy(given["sample"]), torch.from_numpy(embeddings(made, batch))
        return unet(sample, 321.0, states, added_cond_kwargs=added).sample.numpy()


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


def narrow(places: dict[str, BranchPlace]) -> list[str]:
    return [name for name, place in places.items() if not place.is_wide]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
def test_the_unet_with_an_adapter_equals_torch_with_it_in_its_weights(base: Base, strength: float) -> None:
    adapter = random_adapter(base.places, narrow(base.places), rank=3)
    expected = by_torch(base.made, 2, adapter, strength)
    assert largest_difference(base.predict(2, [adapter], [strength]), expected) <= TOLERANCE
    if strength:
        assert largest_difference(expected, by_torch(base.made, 2, {}, 1.0)) > 100 * TOLERANCE


KINDS = {
    "time embedding": lambda name, place: name.startswith("time_embedding") or name.endswith("time_emb_proj"),
    "3x3 convolutions": lambda name, place: place.op == "conv" and place.weight[2:] == (3, 3),
    "1x1 convolutions": lambda name, place: place.op == "conv" and place.weight[2:] == (1, 1),
    "the first and the last": lambda name, place: name in ("conv_in", "conv_out"),
    "everything": lambda name, place: True,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_the_wide_unet_takes_every_layer(base: Base, kind: str, strength: float) -> None:
    chosen = [name for name, place in base.places.items() if KINDS[kind](name, place)]
    adapter = random_adapter(base.places, chosen, rank=2)
    assert chosen
    expected = by_torch(base.made, 2, adapter, strength)
    assert largest_difference(base.predict(2, [adapter], [strength], is_wide=True), expected) <= TOLERANCE


def test_the_manifest_names_every_layer_and_its_shape(base: Base) -> None:
    unet = base.made.pipe.unet
    layers = {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and not name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    assert {name: place.weight for name, place in base.places.items()} == layers
    assert {name for name, place in base.places.items() if not place.is_wide} == {
        n for n in layers if ".attentions." in n
    }
    assert base.manifest.kind == "base" and base.manifest.checkpoint.id == base.manifest.checkpoint.base == "tiny"
    assert base.manifest.key_parts["weights"] == weights_sha256(base.made.root / "bases" / "tiny", None)
    rows = len(base.made.pipe.text_encoder.get_input_embeddings().weight)
    assert base.inputs.first_added_id == rows == len(base.made.pipe.tokenizer)


def test_no_adapter_at_all_is_the_plain_unet(base: Base) -> None:
    plain = base.made.pipeline.engine
    merged = open_session(plain.bundle / "unet.ort.onnx", threads=1).run(None, base.conditions(2))[0]
    for is_wide in (False, True):
        ours = base.predict(2, [{}], [1.0], is_wide=is_wide)
        np.testing.assert_array_equal(ours, merged)


def test_each_picture_of_a_batch_has_its_own_adapter_and_strength(base: Base) -> None:
    adapters = [random_adapter(base.places, narrow(base.places), rank=2, seed=seed) for seed in (1, 2, 3)]
    strengths = [1.0, 0.5, 0.0]
    together = base.predict(3, adapters, strengths)
    for picture, (adapter, strength) in enumerate(zip(adapters, strengths, strict=True)):
        alone = by_torch(base.made, 3, adapter, strength)[picture]
        assert largest_difference(together[picture], alone) <= TOLERANCE


def test_ranks_may_differ_from_layer_to_layer(base: Base) -> None:
    names = narrow(base.places)
    adapter = {
        name: one
        for rank, part in ((1, names[0::3]), (5, names[1::3]))
        for name, one in random_adapter(base.places, part, rank).items()
    }
    assert largest_difference(base.predict(1, [adapter], [1.0]), by_torch(base.made, 1, adapter, 1.0)) <= TOLERANCE


def encoders(base: Base) -> list[str]:
    return [name for name in base.inputs.branches if name != "unet"]


def encoded(base: Base, name: str, ids: np.ndarray, adapter: dict[str, Matrices], strength: float) -> Any:
    """The encoder's states (and pooled text), by torch."""
    module = copy.deepcopy(getattr(base.made.pipe, name))
    merge_(module, adapter, strength)
    with torch.no_grad():
        out = module(input_ids=torch.from_numpy(ids), output_hidden_states=True)
    if base.made.name != "sdxl":
        return [out.last_hidden_state.numpy()]
    states = [out.hidden_states[-2].numpy()]
    return [*states, out.text_embeds.numpy()] if name == "text_encoder_2" else states


def prompt_ids(base: Base, batch: int = 2) -> np.ndarray:
    random, end = np.random.default_rng(4), base.manifest.text.eos_id
    ids = random.integers(0, base.manifest.text.bos_id, (batch, PROMPT_IDS))
    ids[:, 0], ids[:, 9:] = base.manifest.text.bos_id, end
    return ids


def no_vectors(base: Base, name: str) -> np.ndarray:
    return np.zeros((1, getattr(base.made.pipe, name).config.hidden_size), np.float32)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.5])
def test_a_text_encoder_with_an_adapter_equals_transformers(base: Base, strength: float) -> None:
    for name in encoders(base):
        places, ids = base.inputs.branches[name], prompt_ids(base)
        adapter = random_adapter(places, places, rank=2)
        feed = {"input_ids": ids, "added_vectors": no_vectors(base, name), **branch_feed(places, [adapter], [strength])}
        expected = encoded(base, name, ids, adapter, strength)
        found = base.run(f"{name}.onnx", feed)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert largest_difference(ours, theirs) <= TOLERANCE


def test_learned_tokens_have_their_vectors_in_an_input(base: Base) -> None:
    """Three tokens behind the base's own, in any order, one of them twice; the expected side has them in its table."""
    first = base.inputs.first_added_id
    for name in encoders(base):
        module, ids = getattr(base.made.pipe, name), prompt_ids(base)
        vectors = np.random.default_rng(5).standard_normal((3, module.config.hidden_size)).astype(np.float32)
        ids[0, 2:6] = first + 2, first, first + 1, first
        places = base.inputs.branches[name]
        feed = {"input_ids": ids, "added_vectors": vectors, **branch_feed(places, [{}], [1.0])}
        found = base.run(f"{name}.onnx", feed)
        changed = copy.deepcopy(module)
        changed.resize_token_embeddings(first + 3, mean_resizing=False)
        with torch.no_grad():
            changed.get_input_embeddings().weight[first:] = torch.from_numpy(vectors)
            out = changed(input_ids=torch.from_numpy(ids), output_hidden_states=True)
        expected = out.hidden_states[-2] if base.made.name == "sdxl" else out.last_hidden_state
        assert largest_difference(found[0], expected.numpy()) <= TOLERANCE


def test_changes_of_text_k_and_v_are_added_to_the_rows(base: Base) -> None:
    """embeds @ change.T, for one prompt of two, equals torch's rows with the change in to_k and to_v."""
    embeds, random = embeddings(base.made, 2), np.random.default_rng(6)
    added = np.zeros((2, 77, base.manifest.rows.width), np.float32)
    expected = np.zeros_like(added)
    for layer in base.manifest.rows.layers:
        module = base.made.pipe.unet.get_submodule(layer.name)
        for kind, start in (("to_k", layer.offset), ("to_v", layer.offset + layer.width)):
            weight = module.get_submodule(kind).weight.detach().numpy()
            change = random.standard_normal(weight.shape).astype(np.float32) * weight.std()
            part = slice(start, start + layer.width)
            added[1, :, part] = embeds[1] @ change.T
            expected[0, :, part] = embeds[0] @ weight.T
            expected[1, :, part] = embeds[1] @ (weight + change).T
    assert largest_difference(base.rows(embeds, added)["rows"], expected) <= TOLERANCE


def test_a_merged_export_takes_no_adapter(made: Made) -> None:
    bundle = made.bundle
    manifest = read_manifest(bundle)
    assert manifest.kind == "merged" and manifest.adapters is None
    assert sorted(manifest.graphs.unet) == ["ort", "trt"]
    for file in bundle.glob("*.onnx"):
        names = {value.name for value in onnx.load(file, load_external_data=False).graph.input}
        assert not any("adapter" in name or "added" in name or name.endswith((".down", ".up")) for name in names)


# --- quantised


@pytest.fixture(scope="module")
def quantised(base: Base) -> Base:
    """The base in 8 bits, by the ranges of one prediction."""
    made = base.made

    def predict(sample: np.ndarray, timestep: float) -> Any:
        added = {name: torch.from_numpy(value) for name, value in size(made, 1).items()} or None
        with torch.no_grad():
            states = torch.from_numpy(embeddings(made, 1))
            return made.pipe.unet(torch.from_numpy(sample), timestep, states, added_cond_kwargs=added)

    return Base(made, eight_bits(plain_spec(made), made.pipe.unet, ranges(made.pipe.unet, predict)))


@pytest.fixture(scope="module")
def merged(quantised: Base) -> Path:
    """Checkpoint 'rex', whose UNet is the base's, merged under the same decisions."""
    made, folder = quantised.made, quantised.made.repository.root
    spec_file = made.plain("rex", made.repository)
    of_base = read_spec(folder / "specs" / "tiny" / "w8a8.json")
    update = {"checkpoint": "rex", "provenance": spec_file.spec.provenance}
    return made.export("rex", spec=SpecFile(of_base.spec.model_copy(update=update), of_base.tensors))


def test_a_quantised_base_without_adapter_computes_what_the_merged_export_does(quantised: Base, merged: Path) -> None:
    expected = open_session(merged / "unet.ort.onnx", threads=1).run(None, quantised.conditions(2))[0]
    for is_wide in (False, True):
        np.testing.assert_array_equal(quantised.predict(2, [{}], [1.0], is_wide=is_wide), expected)


def test_the_integers_are_those_of_the_merged_export_and_lie_in_one_file(quantised: Base, merged: Path) -> None:
    assert (quantised.bundle / "weights.data").read_bytes() == (merged / "weights.data").read_bytes()
    unets = quantised.manifest.graphs.unet
    assert set(unets) == {"ort", "ort_wide", "trt", "trt_rank16", "trt_rank64"}
    for file in unets.values():
        stored = onnx.load(quantised.bundle / file, load_external_data=False).graph.initializer
        places = {entry.value for one in stored for entry in one.external_data if entry.key == "location"}
        assert places == {"weights.data"}
    assert (quantised.bundle / "unet.trt.onnx").read_bytes() == (merged / "unet.trt.onnx").read_bytes()


@pytest.mark.parametrize("is_wide", [False, True], ids=["narrow", "wide"])
def test_integer_kernels_are_those_of_the_merged_export(
    quantised: Base, merged: Path, tmp_path: Path, is_wide: bool
) -> None:
    """As many, nothing quantised twice, and no sum more than for layers without a bias, and for convolutions."""
    places = quantised.places
    names = list(places) if is_wide else narrow(places)
    adapter = random_adapter(places, names, rank=2)
    feed = {**quantised.conditions(2), **branch_feed(places, [adapter], [1.0], is_wide=is_wide)}
    file = quantised.bundle / quantised.manifest.graphs.unet["ort_wide" if is_wide else "ort"]
    ours, plain = kernels(file, feed, tmp_path), kernels(merged / "unet.ort.onnx", quantised.conditions(2), tmp_path)
    for kind in ("QLinearConv", "MatMulIntegerToFloat"):
        assert ours[kind] == plain[kind] > 0
    assert ours["QuantizeLinear"] <= plain["QuantizeLinear"]
    modules = dict(quantised.made.pipe.unet.named_modules())
    sums = [name for name in names if places[name].op == "conv" or modules[name].bias is None]
    assert ours["Add"] - plain["Add"] == len(sums)
    assert ours["MatMul"] + ours["FusedMatMul"] - plain["MatMul"] - plain["FusedMatMul"] == 2 * len(names) - sum(
        places[name].weight[2:] == (3, 3) for name in names
    )


def kernels(file: Path, feed: dict[str, Any], folder: Path) -> Counter[str]:
    session = open_session(file, threads=1, profile=folder / "profile")
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = {
        (event["name"], event["args"]["op_name"])
        for event in events
        if event["name"].endswith("_kernel_time") and not is_of_shapes(event)
    }
    return Counter(kind for _, kind in ran)


def is_of_shapes(event: dict[str, Any]) -> bool:
    """Whether a node computed with shapes."""
    return event["args"]["op_name"] == "Add" and "int64" in event["args"]["input_type_shape"][0]


def test_an_adapter_changes_a_quantised_base_as_it_changes_the_plain_one(base: Base, quantised: Base) -> None:
    """What is left is the rounding of 8 bits, adapter or not; the adapter itself is a third of the prediction or more."""
    adapter = random_adapter(base.places, narrow(base.places), rank=3)
    for is_wide in (False, True):
        exact = base.predict(2, [adapter], [0.5], is_wide=is_wide)
        ours = quantised.predict(2, [adapter], [0.5], is_wide=is_wide)
        without = base.predict(2, [{}], [1.0])
        assert noise(ours, exact) < 0.2 < 0.3 < noise(without, exact)


def noise(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(((ours - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize("rank", [16, 64])
def test_tensorrt_graphs_take_adapters_padded_with_zeros(quantised: Base, rank: int) -> None:
    """ONNX Runtime computes the graph: types and arithmetic. The branch reads what the integer product reads."""
    adapter = random_adapter(quantised.places, narrow(quantised.places), rank=3)
    file = quantised.bundle / quantised.manifest.graphs.unet[f"trt_rank{rank}"]
    given, plain = quantised.conditions(2), half(quantised.bundle / "unet.trt.onnx", quantised.conditions(2))
    feed = padded(quantised.places, branch_feed(quantised.places, [adapter], [0.5]), rank)
    ours, expected = half(file, {**given, **feed}), quantised.predict(2, [adapter], [0.5])
    assert noise(ours, expected) < 0.2 < 0.3 < noise(plain, expected)
    nothing = padded(quantised.places, branch_feed(quantised.places, [{}], [1.0]), rank)
    assert noise(half(file, {**given, **nothing}), plain) < 1e-3


def test_the_lint_finds_nothing_in_a_bases_tensorrt_graphs(quantised: Base) -> None:
    """Nothing but what the random UNet's few channels bring about, adapters or not."""
    plain, *others = ([f.rule for f in lint_trt(quantised.bundle / file)] for file in trt_graphs(quantised).values())
    assert set(plain) <= {"narrow-convolution"} and others == [plain, plain]


@pytest.mark.trt
def test_a_bases_tensorrt_graphs_compile_to_what_the_spec_says(quantised: Base) -> None:
    spec_file = read_spec(quantised.made.repository.root / "specs" / "tiny" / "w8a8.json")
    for file in trt_graphs(quantised).values():
        require_compiles(quantised.bundle / file, graph_shapes(quantised.bundle, BuildSettings(), file), spec_file)


def trt_graphs(base: Base) -> dict[str, str]:
    return {name: file for name, file in base.manifest.graphs.unet.items() if name.startswith("trt")}


def padded(places: dict[str, BranchPlace], feed: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The same adapter for a graph of one rank, float16."""
    made = {"adapter_strength": feed["adapter_strength"].astype(np.float16)}
    for layer in narrow(places):
        axes = (2, 1) if places[layer].op == "linear" else (1, 2)
        for part, axis in zip(("down", "up"), axes, strict=True):
            value = feed[f"{layer}.{part}"]
            sides = [(0, rank - side if i == axis else 0) for i, side in enumerate(value.shape)]
            made[f"{layer}.{part}"] = np.pad(value, sides).astype(np.float16)
    return made


def half(file: Path, feed: dict[str, Any]) -> np.ndarray:
    """What a graph for TensorRT computes, on ONNX Runtime, kept from moving quantisers of types it then mistakes."""
    options, off = ort.SessionOptions(), ["MatMulAddFusion", "QDQPropagationTransformer"]
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=off)
    return session.run(None, feed)[0]


# --- what is asked for


def test_a_checkpoint_is_not_exported_as_a_base(made: Made, tmp_path: Path) -> None:
    with pytest.raises(
        RepositoryError, match=r"^rex: must be a base, got a checkpoint; export it with 'personalq export"
    ):
        export_base(made.repository, "rex", tmp_path / "no.json")


def test_a_spec_of_something_else_says_how_to_calibrate_the_base(made: Made, tmp_path: Path) -> None:
    spec = made.plain("rex", made.repository)
    path = spec.write(tmp_path / "fp32.json")
    with pytest.raises(SpecError, match=r"checkpoint: must be tiny, got 'rex'; run 'personalq calibrate --base tiny'"):
        export_base(made.repository, "tiny", path)


def test_a_bases_reference_needs_no_calibration_and_is_the_same_bundle_again(base: Base) -> None:
    repository = base.made.repository
    path = reference_spec(repository, "tiny", "fp32")
    assert is_current(path, repository, "tiny") and not is_current(path, repository, "rex")
    assert last_spec(repository, "tiny") in path.parent.iterdir()
    again = export_base(repository, "tiny", path)
    assert again.reused and again.key == base.result.key
