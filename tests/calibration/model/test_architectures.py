"""Stable Diffusion 2.x and XL from the checkpoint to the gate: what calibration tells their UNets, and what it makes of them."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.model.conditioning import encode, encode_guided, heard
from calibration.model.independent import load_by_diffusers
from calibration.model.pipeline import load_pipeline, quantisable_layers
from calibration.rounding import tune
from calibration.statistics.saved import NAME as STATISTICS
from exporters.export import export_checkpoint
from personalq.errors import RepositoryError
from personalq.numerics import cosine
from personalq.repository import Repository
from personalq.spec import read_spec
from personalq.weights.checkpoint import CheckpointWeights, check_fit, open_weights
from runtime.drawing.pipeline import Pipeline
from runtime.engines.ort import OrtEngine
from runtime.gate import run_gate
from runtime.gate.gate import Options
from runtime.gate.request import sources_of
from tests.exporters.families import Made
from tests.exporters.test_policies import reference_prediction

FEW = {"samples": 2, "steps": 2}
TOLERANCE = 1e-5  # FP32 on both sides; only the order of additions differs


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A tiny SDXL base and 'charm', an embedding of two vectors for each text encoder; no family is traced."""
    from tests.exporters import architectures

    root = tmp_path_factory.mktemp("xl")
    architectures.sdxl().save_pretrained(root / "bases" / "tiny")
    add_charm(root)
    return Repository.open(root)


@pytest.fixture(scope="module")
def pipe(xl: Repository) -> Any:
    """'charm', loaded for calibration."""
    return load_pipeline(xl, xl.card("charm"))


def add_charm(root: Path) -> None:
    torch.manual_seed(5)
    write(root, "charm", "textual_inversion", {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 24)})


def write(root: Path, name: str, kind: str, tensors: dict[str, Any]) -> None:
    """A checkpoint of one file, named like the checkpoint, that is also its trigger."""
    folder = root / "checkpoints" / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / f"{name}.safetensors")
    card = {"id": name, "name": name, "kind": kind, "base": "tiny", "trigger": [name], "class_noun": "dog"}
    (folder / "card.json").write_text(json.dumps(card))


def merged(repository: Repository, name: str) -> CheckpointWeights:
    """A checkpoint as the exporter merges it."""
    card = repository.card(name)
    return open_weights(repository.base_dir(card), repository.checkpoint_dir(name), card.kind)


def assert_equal_weights(pipe: Any, weights: CheckpointWeights, changed: set[str]) -> None:
    """Every parameter of every model is diffusers', and the delta touched the models that are named."""
    assert {name for name, component in weights.components.items() if component.changed} == changed
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        ours = weights.component(component)
        theirs = dict(getattr(pipe, component).named_parameters())
        assert set(ours.names()) == set(theirs)
        for name, value in theirs.items():
            assert np.abs(ours.read(name) - value.detach().numpy()).max() <= TOLERANCE, f"{component}.{name}"


def test_the_unet_is_told_what_the_diffusers_pipeline_tells_it(pipe: Any) -> None:
    prompt = "a photo of charm on the beach"
    calls: list[dict[str, Any]] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, __, keywords: calls.append(keywords), with_kwargs=True)
    with torch.no_grad():
        pipe(prompt, num_inference_steps=1, guidance_scale=4.0, output_type="latent")
    handle.remove()
    for ours, theirs in zip(encode_guided(pipe, [prompt]), heard(calls[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    told = encode_guided(pipe, [prompt])
    assert not told.text[0].any() and not told.pooled[0].any()
    assert told.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    ids, plain = encode(pipe, ["", prompt])
    assert plain.text[0].any() and plain.pooled[0].any()
    assert "".join(pipe.tokenizer.convert_ids_to_tokens(ids[1].tolist())).count("charm") == 2  # charm, charm_1


def test_an_embedding_for_two_encoders_is_merged_as_diffusers_loads_it(xl: Repository) -> None:
    weights, pipe = merged(xl, "charm"), load_by_diffusers(xl, xl.card("charm"))
    assert_equal_weights(pipe, weights, {"text_encoder", "text_encoder_2"})
    assert weights.added_tokens == (("charm", ("charm", "charm_1")),)
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert tokenizer.convert_tokens_to_ids("charm") == weights.first_added_id


def test_a_lora_of_both_text_encoders_is_merged_as_diffusers_fuses_it(xl: Repository) -> None:
    torch.manual_seed(6)
    unet, text = (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "text_model.encoder.layers.0.self_attn.q_proj",
    )
    sizes = {f"unet.{unet}": (64, 56), f"text_encoder.{text}": (32, 32), f"text_encoder_2.{text}": (24, 24)}
    tensors = {}
    for name, (out, given) in sizes.items():
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, given), f"{name}.lora_B.weight": torch.randn(out, 2)}
    write(xl.root, "thin", "lora", tensors)
    repository = Repository.open(xl.root)
    fused = load_by_diffusers(repository, repository.card("thin"))
    assert_equal_weights(fused, merged(repository, "thin"), {"unet", "text_encoder", "text_encoder_2"})


REFUSED = {
    "one encoder": {"clip_l": torch.ones(2, 32)},
    "Stable Diffusion 1.x": {"<dog>": torch.ones(32)},
    "more for one than for the other": {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(1, 24)},
}


@pytest.mark.parametrize("tensors", REFUSED.values(), ids=REFUSED)
def test_an_embedding_that_is_not_for_both_encoders_is_refused(
    xl: Repository, tmp_path: Path, tensors: dict[str, Any]
) -> None:
    save_file(tensors, tmp_path / "half.safetensors")
    wanted = (
        r"half.safetensors: must hold clip_l and clip_g, as many vectors for each of SDXL's text encoders, got .*\["
    )
    with pytest.raises(RepositoryError, match=wanted):
        open_weights(xl.root / "bases" / "tiny", tmp_path, "textual_inversion")


def test_vectors_are_compared_with_their_own_encoder(xl: Repository, tmp_path: Path) -> None:
    base, charm = xl.root / "bases" / "tiny", xl.root / "checkpoints" / "charm"
    check_fit(base, charm, [charm / "charm.safetensors"], "textual_inversion")
    save_file({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 32)}, tmp_path / "wide.safetensors")
    with pytest.raises(RepositoryError, match=r"wide.safetensors: clip_g: must be vectors of the base's width 24"):
        check_fit(base, tmp_path, [tmp_path / "wide.safetensors"], "textual_inversion")


def test_an_sdxl_embedding_on_another_base_is_refused(xl: Repository, tiny_base: Path) -> None:
    with pytest.raises(
        RepositoryError, match=r"must be an embedding for one text encoder, got SDXL's 'clip_g'; .*--base"
    ):
        open_weights(tiny_base, xl.root / "checkpoints" / "charm", "textual_inversion")


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Made:
    """A fine-tuned UNet over a base of each architecture, its family traced."""
    made = Made(request.param, tmp_path_factory.mktemp(f"calibrate-{request.param}"), traces)
    settings = made.repository.root / "bases" / "tiny" / "personalq.json"
    settings.write_text('{"steps": 3, "guidance": 2.0}')
    return made


def test_a_calibrated_checkpoint_passes_every_level_of_the_gate(made: Made) -> None:
    repository = made.repository
    result = calibrate(repository, "max", CalibrateOptions(**FEW))
    file = read_spec(result.spec_path)
    assert set(file.spec.layers) == set(quantisable_layers(made.pipe.unet))
    assert [layer for layer in file.spec.layers if layer.startswith("add_embedding")] == (
        ["add_embedding.linear_1", "add_embedding.linear_2"] if made.name == "sdxl" else []
    )
    assert result.kept_tokens[0] == "sks"
    bundle = export_checkpoint(repository, "max", result.spec_path).bundle
    report = run_gate(bundle, Options(threads=1), sources_of(bundle, repository, lambda: open_weights))
    assert report.passed, [check for check in report.checks if not check.passed]
    assert {check.level for check in report.checks} == {"integrity", "obedience", "numerics", "images"}
    assert ("pooled text cosine" in {check.name for check in report.checks}) == (made.name == "sdxl")


@pytest.mark.parametrize("made", ["sdxl"], indirect=True)
def test_tuned_integers_repeat_and_onnx_runtime_computes_them(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """W4A8 over an embedding: measured, tuned and rounded twice from nothing, exported once."""
    monkeypatch.setattr(tune, "STEPS", 3)
    add_charm(made.repository.root)
    repository = Repository.open(made.repository.root)
    options = CalibrateOptions(bits="w4a8", **FEW)
    first = calibrate(repository, "charm", options)
    (first.spec_path.parent / STATISTICS).unlink()
    file = calibrate(repository, "charm", options).spec_file
    assert file.content_sha256() == first.spec_file.content_sha256()
    assert file.spec.tuned and file.spec.rows.kept.trigger
    for name, values in first.spec_file.tensors.items():
        np.testing.assert_array_equal(values, file.tensors[name], err_msg=name)

    pipeline = Pipeline(OrtEngine(export_checkpoint(repository, "charm", first.spec_path).bundle, threads=1))
    prompt = "a photo of charm in the forest"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, told = encode(load_pipeline(repository, repository.card("charm")), [prompt])
    ours = pipeline.embed([prompt])
    for value, wanted in ((ours.states, told.text), (ours.pooled, told.pooled)):
        assert cosine(value, wanted.numpy()) > 0.9999  # float16 weights
    conditioning = pipeline.rows(prompt).conditioning
    assert (conditioning["row_index"] >= 77).sum() >= 2  # both pieces of the trigger are kept
    widths = np.repeat([layer.width for layer in file.spec.rows.layers], 2)
    rest = conditioning["rest"].astype(np.float32) * np.repeat(conditioning["rest_scale"], widths, axis=2)
    both = np.concatenate([rest, conditioning["kept"].astype(np.float32)], axis=1)
    rows = both[:, conditioning["row_index"][0]]
    sample = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    found = pipeline.engine.denoiser(conditioning, 8, 8)(sample, 450.0).copy()
    wanted = reference_prediction(
        repository, file, sample, 450.0, rows, conditioning["text_embeds"], told.time_ids.numpy()
    )
    assert cosine(found, wanted) > 0.99  # values on a rounding edge fall to either side: see test_policies
