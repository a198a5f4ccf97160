"""The optimum layout: the spec's integers behind the names optimum reads, and pictures drawn by the real optimum.

The last test needs optimum in an environment of its own (it pins an older transformers): `make test-optimum`.
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from cli import cli
from exporters.plain import unquantised_spec
from exporters.targets.optimum import scheduler_class, write_optimum
from personalq.errors import PersonalQError, RepositoryError, SpecError
from personalq.numerics import cosine
from personalq.repository import Repository
from personalq.spec import read_spec

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
from tests.exporters import architectures  # noqa: E402  (needs torch)

PYTHON = os.environ.get("PERSONALQ_OPTIMUM_PYTHON", "")
DRAW = Path(__file__).parents[2] / "optimum" / "draw.py"
DOCS = Path(__file__).parents[3] / "docs" / "export.md"


@pytest.fixture(scope="module")
def folders(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """policy -> the folder of checkpoint 'rex'."""
    place = tmp_path_factory.mktemp("optimum")
    return {
        policy: write_optimum(exported[0], "rex", spec_path(exported[0], name), place / policy).folder
        for policy, name in (("taq", "taq-w8a8"), ("fp32", "fp32"))
    }


def spec_path(repository: Repository, name: str) -> Path:
    return repository.root / "specs" / "rex" / f"{name}.json"


def session(file: Path, optimised: Path | None = None) -> ort.InferenceSession:
    """As optimum opens it, with the one option that docs/export.md asks for on a CPU without VNNI (others ignore it)."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def predictions(folder: Path, golden: dict[str, np.ndarray]) -> np.ndarray:
    """The folder's UNet over the golden's samples, one after another, from text embeddings alone."""
    unet, found = session(folder / "unet" / "model.onnx"), []
    for i in range(len(golden["sample"])):
        given = {
            "sample": golden["sample"][i : i + 1],
            "timestep": np.asarray(golden["timestep"][i], np.float32),
            "encoder_hidden_states": golden["text_embeds"][golden["prompt"][i]][None],
        }
        found.append(unet.run(["out_sample"], given)[0])
    return np.concatenate(found)


def test_the_unet_computes_what_diffusers_computed_from_text_embeddings(exported, folders):
    """FP32: sums in another order. Quantised: the same floor as every lowering (test_lower_trt)."""
    golden = load_file(exported[1]["fp32"].bundle / "golden.safetensors")
    assert np.abs(predictions(folders["fp32"], golden) - golden["noise_pred"]).max() <= 1e-4
    assert cosine(predictions(folders["taq"], golden), golden["noise_pred"]) > 0.99


def test_integers_are_the_bundles_and_key_and_value_projections_stay_float(exported, folders):
    def stored(file: Path, folder: Path) -> dict[str, np.ndarray]:
        return {one.name: numpy_helper.to_array(one, str(folder)) for one in model(file).graph.initializer}

    def model(file: Path) -> onnx.ModelProto:
        return onnx.load(file, load_external_data=False)

    copy = shutil.copytree(exported[1]["taq"].bundle, folders["taq"].parent / "bundle", copy_function=shutil.copyfile)
    ours = stored(folders["taq"] / "unet" / "model.onnx", folders["taq"] / "unet")
    bundle = stored(copy / "unet.ort.onnx", copy)
    spec = read_spec(spec_path(exported[0], "taq-w8a8")).spec
    for name, layer in spec.layers.items():
        if layer.weight != "float":
            weight = f"{name}.weight"
            assert ours[weight].dtype == bundle[weight].dtype and np.array_equal(ours[weight], bundle[weight]), name
    projections = [f"{row.name}.{part}.weight" for row in spec.rows.layers for part in ("to_k", "to_v")]
    assert projections and {ours[name].dtype for name in projections} <= {np.dtype(np.float16), np.dtype(np.float32)}
    assert not set(projections) & set(bundle)


def test_it_runs_on_integer_kernels_however_the_session_is_opened(exported, folders, tmp_path):
    """All but the time embedding's few products, which ONNX Runtime's own optimiser turns into float ones."""
    session(folders["taq"] / "unet" / "model.onnx", tmp_path / "optimised.onnx")
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    kernels = Counter(node.op_type for node in nodes)
    layers = read_spec(spec_path(exported[0], "taq-w8a8")).spec.layers
    wanted = Counter(layer.op for layer in layers.values() if layer.activation == "int8")
    of_time = [name for name, layer in layers.items() if "time_emb" in name and layer.activation == "int8"]
    assert kernels["QLinearConv"] == wanted["conv"] > 0
    assert kernels["MatMulIntegerToFloat"] == wanted["linear"] - len(of_time) > 3 * len(of_time) > 0


def test_inputs_outputs_and_settings_are_those_optimum_reads(folders):
    folder = folders["taq"]
    unet, vae = session(folder / "unet" / "model.onnx"), session(folder / "vae_decoder" / "model.onnx")
    assert {one.name: len(one.shape) for one in unet.get_inputs()} == {
        "sample": 4,
        "timestep": 0,
        "encoder_hidden_states": 3,
    }
    assert [one.name for one in (*unet.get_outputs(), *vae.get_inputs(), *vae.get_outputs())] == [
        "out_sample",
        "latent_sample",
        "sample",
    ]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert json.loads((folder / "vae_decoder" / "config.json").read_text())["scaling_factor"] == 0.18215


def test_learned_tokens_are_in_the_tokenizer_and_the_text_encoder(exported, tmp_path):
    written = write_learned(exported[0], tmp_path)
    vocabulary = json.loads((written / "tokenizer" / "vocab.json").read_text())
    decoder = json.loads((written / "tokenizer" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added = {token["content"]: int(number) for number, token in decoder.items() if "max" in token["content"]}
    assert added == {"<max>": len(vocabulary), "<max>_1": len(vocabulary) + 1}
    encoder = session(written / "text_encoder" / "model.onnx")
    ids = np.full((1, 77), added["<max>_1"], np.int64)
    assert np.isfinite(encoder.run(None, {"input_ids": ids})[0]).all()


def write_learned(repository: Repository, root: Path) -> Path:
    """The folder of a two-vector embedding `<max>` over the same base, nothing quantised."""
    shutil.copytree(repository.root / "bases", root / "repository" / "bases")
    shutil.copytree(repository.root / "families", root / "repository" / "families")
    folder = root / "repository" / "checkpoints" / "max"
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    save_file({"<max>": rows}, folder / "learned_embeds.safetensors")
    card = {"id": "max", "name": "Max", "kind": "textual_inversion", "base": "tiny", "trigger": ["<max>"]}
    (folder / "card.json").write_text(json.dumps(card))
    ran = CliRunner().invoke(
        cli, ["--repo", str(root / "repository"), "export", "max", "--json", "--spec", "fp32", *layout(root / "max")]
    )
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert said["layout"] == "optimum" and said["folder"] == str(root / "max") and said["spec"] == "fp32"
    assert said["bytes"] == sum(file.stat().st_size for file in (root / "max").rglob("*") if file.is_file())
    return root / "max"


def layout(folder: Path) -> list[str]:
    return ["--layout", "optimum", "--out", str(folder)]


def test_an_existing_folder_is_never_written_into(exported, tmp_path):
    (tmp_path / "mine").mkdir()
    ran = CliRunner().invoke(cli, ["--repo", str(exported[0].root), "export", "rex", *layout(tmp_path / "mine")])
    line = f"personalq: {tmp_path / 'mine'}: must not exist yet, got something of that name; name a new --out folder\n"
    assert (ran.exit_code, ran.stderr) == (1, line)
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_failure_leaves_nothing_behind(exported, tmp_path, monkeypatch):
    other = read_spec(spec_path(exported[0], "fp32"))
    spec = other.spec.model_copy(update={"checkpoint": "max"})
    path = type(other)(spec, {}).write(tmp_path / "specs" / "fp32.json")
    with pytest.raises(SpecError, match=r"checkpoint: must be rex, got 'max'; run 'personalq calibrate rex'"):
        write_optimum(exported[0], "rex", path, tmp_path / "out" / "one")

    def full(*_: Any) -> None:
        raise RepositoryError("no space left")

    monkeypatch.setattr("exporters.targets.optimum.write_settings", full)
    with pytest.raises(PersonalQError, match="no space left"):
        write_optimum(exported[0], "rex", spec_path(exported[0], "fp32"), tmp_path / "out" / "two")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", [None, "DDIMScheduler()", "system", 3])
def test_a_scheduler_that_is_none_of_diffusers_is_refused(name):
    with pytest.raises(
        RepositoryError, match=r"_class_name must be a scheduler of diffusers, got .*; copy the base again"
    ):
        scheduler_class({"_class_name": name})


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rex", "--layout", "optimum"], "--layout and --out go together"),
        (["rex", "--out", "there"], "--layout and --out go together"),
        (["rex", *layout(Path("there")), "--lint", "trt"], "--lint goes with a bundle, which --layout does not write"),
        (["rex", *layout(Path("there")), "--target", "openvino"], "--target goes with a bundle, which --layout"),
        (["rex", *layout(Path("there")), "--set", "a=b"], "--set goes with a bundle, which --layout does not write"),
        (
            ["rex", *layout(Path("there")), "--store", "file:///s"],
            "--store goes with a bundle, which --layout does not",
        ),
        (["--all", *layout(Path("there"))], "--layout goes with one ID"),
        (["rex", "--layout", "comfy", "--out", "there"], "'comfy' is not 'optimum'"),
    ],
)
def test_options_that_would_be_ignored_are_usage_errors(exported, arguments, line):
    ran = CliRunner().invoke(cli, ["--repo", str(exported[0].root), "export", *arguments])
    assert ran.exit_code == 2 and line in ran.stderr


def test_the_documented_export_commands_are_understood():
    lines = [
        line.split("#")[0].split() for line in DOCS.read_text().splitlines() if line.startswith("personalq export ")
    ]
    assert any("optimum" in words for words in lines)
    for words in lines:
        cli.commands["export"].make_context("export", words[2:])


@pytest.mark.optimum
@pytest.mark.skipif(not PYTHON, reason="optimum has an environment of its own: make test-optimum")
@pytest.mark.parametrize("case", ["plain", "learned tokens", "sdxl"])
def test_the_real_optimum_draws_our_own_pipelines_picture(exported, folders, tmp_path, case):
    """optimum's from_pretrained gets the folder and nothing else; every pixel within one level of ours."""
    from exporters.export import export_checkpoint
    from runtime.drawing.pipeline import Pipeline, start_noise
    from runtime.engines.ort import OrtEngine

    prompt = "a red mug on the beach, sks"
    if case == "plain":
        repository, checkpoint, folder = exported[0], "rex", folders["fp32"]
    elif case == "learned tokens":
        checkpoint, folder, prompt = "max", write_learned(exported[0], tmp_path), "a photo of <max> in the forest"
        repository = Repository.open(tmp_path / "repository")
    else:
        repository, checkpoint, folder = sdxl(tmp_path)
    spec = repository.root / "specs" / checkpoint / "fp32.json"
    pipeline = Pipeline(OrtEngine(export_checkpoint(repository, checkpoint, spec).bundle, threads=1))
    noise = start_noise(3, (4, 8, 12))
    ours = pipeline.image(prompt, steps=3, guidance=4.0, noise=noise).astype(np.float32)
    np.savez(tmp_path / "case.npz", prompt=prompt, steps=3, guidance=4.0, noise=noise)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [PYTHON, DRAW, folder, tmp_path / "case.npz", tmp_path / "picture.npy"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env={**clean, "HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr
    kind = "ORTStableDiffusionXLPipeline" if case == "sdxl" else "ORTStableDiffusionPipeline"
    assert ran.stdout.split()[-1] == kind
    assert np.abs(np.load(tmp_path / "picture.npy") - ours).max() <= 1


def sdxl(root: Path) -> tuple[Repository, str, Path]:
    """A tiny SDXL repository with checkpoint 'rex' (the base's own UNet), and its folder."""
    from exporters.graphs.family import open_family
    from personalq.repository.identity import weights_sha256

    pipe = architectures.sdxl()
    pipe.save_pretrained(root / "xl" / "bases" / "tiny")
    folder = root / "xl" / "checkpoints" / "rex"
    pipe.unet.save_pretrained(folder / "unet")
    (folder / "card.json").write_text('{"id": "rex", "name": "Rex", "kind": "dreambooth", "base": "tiny"}')
    repository = Repository.open(root / "xl")
    base = repository.base_dir(repository.card("rex"))
    family = open_family(repository.root / "families", base)
    spec = unquantised_spec(family, "rex", weights_sha256(base, folder), "fp32")
    path = spec.write(repository.root / "specs" / "rex" / "fp32.json")
    return repository, "rex", write_optimum(repository, "rex", path, root / "xl-folder").folder
