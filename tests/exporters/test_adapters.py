"""`personalq export ID`: an adapter where that is exact, else merged; the same bytes wherever it is made; whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from click.testing import Result as Ran
from safetensors.numpy import load_file, save_file

from cli import cli
from exporters.adapters import Corrected, export_adapter
from personalq.adapters import ADAPTER, Correction, read_adapter_manifest
from personalq.bundle import check_files
from personalq.errors import RepositoryError
from personalq.repository import Repository
from personalq.repository.forms import form_of
from personalq.repository.identity import delta_sha256, weights_sha256
from personalq.weights.adapter import Branch, Limits, read_adapter
from tests.personalq import toy_checkpoints as make

ROOT = Path(__file__).parents[2]
LAYER = f"{make.LAYER}.to_k"
FILE = "pytorch_lora_weights.safetensors"
KEYS = {"form", "form_reason", "bundle", "bytes", "base_bundle", "seconds", "peak_rss_bytes"}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A base and four checkpoints: a LoRA with values, an embedding, a Custom Diffusion delta, a full fine-tune."""
    made = Repository.open(tmp_path / "repo", create=True)
    made.add_base(make.base(tmp_path / "toy"))
    random = np.random.default_rng(0)
    lora = make.lora(tmp_path / "dog")
    tensors = {k: random.standard_normal(v.shape).astype(np.float32) for k, v in load_file(lora / FILE).items()}
    save_file(tensors, lora / FILE)
    whole = tmp_path / "cat"
    (whole / "unet").mkdir(parents=True)
    tensors = {f"{make.LAYER}.to_{p}.weight": random.standard_normal((4, 8)).astype(np.float32) for p in "qkv"}
    save_file(tensors, whole / "unet" / "diffusion_pytorch_model.safetensors")
    make.write_card(whole, kind="dreambooth")
    for source in (lora, make.embedding(tmp_path / "mug"), make.custom_diffusion(tmp_path / "hat"), whole):
        assert not made.add(source, base="toy").refused
    return made


def folder(repository: Repository, name: str) -> Path:
    return repository.root / "checkpoints" / name


def base_of(repository: Repository) -> Path:
    return repository.root / "bases" / "toy"


def give_engine(repository: Repository, key: str = "e" * 64) -> Path:
    """What the repository reads of a base's engine."""
    place = repository.root / "bundles" / key
    place.mkdir(parents=True)
    told = {"kind": "base", "checkpoint": {"id": "toy"}, "files": {}}
    told |= {"key_parts": {"weights": weights_sha256(base_of(repository), None)}}
    (place / "manifest.json").write_text(json.dumps(told))
    return place


def run(repository: Repository, *arguments: str) -> Ran:
    return CliRunner().invoke(cli, ["--repo", str(repository.root), *arguments])


def exported(repository: Repository, *arguments: str) -> dict[str, Any]:
    ran = run(repository, "export", *arguments, "--json")
    assert ran.exit_code == 0 and ran.stdout.count("\n") == 1, ran.output
    return json.loads(ran.stdout)


def content(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


def leftovers(repository: Repository) -> list[Path]:
    place = repository.root / "bundles"
    return list(place.iterdir()) if place.is_dir() else []


# --- the bundle


def test_an_adapter_says_what_it_is_made_of(repository: Repository) -> None:
    made = export_adapter(repository, "dog")
    manifest = read_adapter_manifest(made.bundle)
    base, checkpoint = base_of(repository), folder(repository, "dog")
    assert made.bundle.parent == repository.root / "bundles" and made.bundle.name == manifest.key == made.key
    assert manifest.key_parts["delta"] == delta_sha256(checkpoint)
    assert manifest.key_parts["base"] == manifest.base_sha256 == weights_sha256(base, None)
    entry = manifest.checkpoint
    assert (entry.id, entry.kind, entry.base, entry.trigger, entry.class_noun) == (
        "dog",
        "lora",
        "toy",
        ("sks",),
        "dog",
    )
    assert entry.sha256 == weights_sha256(base, checkpoint) and entry.files == ("pytorch_lora_weights",)
    assert (manifest.steps, manifest.guidance, manifest.scheduler["prediction_type"]) == (25, 7.5, "epsilon")
    assert (manifest.rank, manifest.errors, manifest.left_out, manifest.correction) == (2, {}, (), None)
    assert {file.name for file in made.bundle.iterdir()} == {"manifest.json", ADAPTER}
    assert manifest.bytes == made.bytes == (made.bundle / ADAPTER).stat().st_size
    assert check_files(made.bundle, manifest) == []
    assert read_adapter(made.bundle / ADAPTER).branches["unet"].keys() == {LAYER}


def test_learned_tokens_and_their_pieces_are_in_the_manifest(repository: Repository) -> None:
    manifest = read_adapter_manifest(export_adapter(repository, "mug").bundle)
    assert [(one.token, one.pieces) for one in manifest.learned] == [("<cat-toy>", ("<cat-toy>", "<cat-toy>_1"))]
    assert manifest.expansions == {"<cat-toy>": "<cat-toy> <cat-toy>_1"} and manifest.rank == 0


def test_exporting_again_reuses_it_and_a_changed_byte_is_mended(repository: Repository) -> None:
    first = export_adapter(repository, "dog")
    assert not first.reused and export_adapter(repository, "dog").reused
    before, file = content(first.bundle), first.bundle / ADAPTER
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    again = export_adapter(repository, "dog")
    assert not again.reused and content(again.bundle) == before


SCRIPT = """
import sys
from pathlib import Path
from exporters.adapters import export_adapter
from personalq.repository import Repository
from personalq.weights.adapter import Limits
print(export_adapter(Repository.open(Path(sys.argv[1])), sys.argv[2], Limits(rank=1)).key)
heavy = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxruntime", "tokenizers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def start(root: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(root), name]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["dog", "mug", "hat", "cat"])
def test_two_processes_in_two_places_make_the_same_bytes_without_torch_or_onnx(
    repository: Repository, tmp_path: Path, name: str
) -> None:
    """Also of what is cut: 'dog' and 'cat' to rank 1."""
    roots = [repository.root, shutil.copytree(repository.root, tmp_path / "elsewhere")]
    found = []
    for root in roots:
        process = start(root, name)
        key, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        found.append((key, content(root / "bundles" / key.strip())))
    assert found[0] == found[1]


def test_two_at_a_time_leave_one_whole_adapter(repository: Repository) -> None:
    processes = [start(repository.root, "dog") for _ in range(3)]
    keys = {process.communicate(timeout=120)[0].strip() for process in processes}
    (key,) = keys
    assert [place.name for place in leftovers(repository)] == [key]
    assert repository.root.joinpath("bundles", key, ADAPTER).is_file()


def test_whatever_it_says_is_in_its_key_and_what_it_does_not_is_not(repository: Repository) -> None:
    base, checkpoint = base_of(repository), folder(repository, "dog")

    def edit(file: Path, **fields: Any) -> None:
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | fields))

    keys = [export_adapter(Repository.open(repository.root), "dog").key]
    for file, fields in (
        (checkpoint / "card.json", {"class_noun": "wolf"}),
        (checkpoint / "card.json", {"trigger": ["zwx"]}),
        (base / "scheduler" / "scheduler_config.json", {"prediction_type": "v_prediction"}),
        (base / "personalq.json", {"steps": 7}),
        (checkpoint / "personalq.json", {"steps": 7}),  # the same, from another source
    ):
        edit(file, **fields)
        keys.append(export_adapter(Repository.open(repository.root), "dog").key)
    keys += [export_adapter(repository, "dog", limits).key for limits in (Limits(rank=1), Limits(energy=0.5))]
    tensors = load_file(checkpoint / FILE)
    save_file({name: value * 2 for name, value in tensors.items()}, checkpoint / FILE)
    keys.append(export_adapter(repository, "dog").key)
    assert len(set(keys)) == len(keys)
    (base / "README.md").write_text("nothing that a picture depends on")
    edit(base / "vae" / "config.json", scaling_factor=0.5)  # of the base's engine, not of what is attached to it
    again = export_adapter(repository, "dog")
    assert again.reused and again.key == keys[-1]
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    assert export_adapter(repository, "dog").key not in keys


def test_alpha_in_a_file_of_its_own_is_in_the_key(repository: Repository, tmp_path: Path) -> None:
    """peft writes it into adapter_config.json, which is no weight file."""
    source = tmp_path / "peft"
    source.mkdir()
    random, module = np.random.default_rng(0), f"base_model.model.{LAYER}"
    tensors = {"lora_A": random.standard_normal((2, 8)), "lora_B": random.standard_normal((4, 2))}
    save_file(
        {f"{module}.{end}.weight": value.astype(np.float32) for end, value in tensors.items()},
        source / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_k"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    make.write_card(source)
    assert not repository.add(source, base="toy").refused
    first = export_adapter(repository, "peft")
    (folder(repository, "peft") / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    second = export_adapter(repository, "peft")
    one, two = (read_adapter(made.bundle / ADAPTER).branches["unet"][LAYER].change() for made in (first, second))
    assert first.key != second.key
    np.testing.assert_allclose(two, 2 * one, rtol=2e-3)


def test_a_correction_is_tensors_of_its_own_and_in_the_key(repository: Repository) -> None:
    half = np.ones((8, 3), np.float16), np.ones((3, 4), np.float16)
    plain = export_adapter(repository, "dog")
    made = export_adapter(
        repository, "dog", None, Corrected({LAYER: Branch(*half)}, Correction(spec_sha256="s", rank=3))
    )
    manifest, adapter = read_adapter_manifest(made.bundle), read_adapter(made.bundle / ADAPTER)
    assert made.key != plain.key and manifest.correction == Correction(spec_sha256="s", rank=3)
    assert adapter.correction.keys() == {LAYER} and adapter.correction[LAYER].rank == 3
    assert adapter.branches["unet"][LAYER].rank == 2


# --- the form


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("dog", "attached", "its change is a low-rank product, layer by layer"),
        ("mug", "attached", "it adds tokens alone"),
        ("hat", "attached", "it changes K and V of the text alone, and adds tokens"),
        ("cat", "merged", f"unet.{make.LAYER}.to_k.weight is replaced: a full fine-tune"),
    ],
)
def test_auto_attaches_what_an_adapter_holds_exactly_and_says_why(
    repository: Repository, name: str, form: str, reason: str
) -> None:
    found = form_of(repository.whole(name))
    assert (found.name, found.reason) == (form, reason)


def test_a_checkpoint_with_its_own_tokenizer_or_latents_is_merged(repository: Repository) -> None:
    base, checkpoint = base_of(repository), folder(repository, "dog")
    vocabulary = {"a</w>": 0, "b</w>": 1}
    for place, tokens in ((base, vocabulary), (checkpoint, vocabulary)):
        (place / "tokenizer").mkdir()
        (place / "tokenizer" / "vocab.json").write_text(json.dumps(tokens))
    assert form_of(repository.whole("dog")).name == "attached"  # a copy of the base's, as training scripts leave it
    (checkpoint / "tokenizer" / "vocab.json").write_text(json.dumps({**vocabulary, "c</w>": 2}))
    found = form_of(repository.whole("dog"))
    assert (found.name, found.reason) == ("merged", "it has its own tokenizer, which its base's engine does not have")
    shutil.rmtree(checkpoint / "tokenizer")
    (checkpoint / "vae").mkdir()
    (checkpoint / "vae" / "config.json").write_text('{"scaling_factor": 0.5}')
    assert form_of(repository.whole("dog")).reason.startswith("it has its own vae scaling_factor")
    assert form_of(repository.whole("dog"), "attached").name == "attached"
    assert export_adapter(repository, "dog").left_out == ("it has its own vae scaling_factor",)


def test_the_command_attaches_and_says_that_the_base_has_no_engine(repository: Repository, caplog: Any) -> None:
    data = exported(repository, "dog")
    assert data.keys() >= KEYS and (data["form"], data["base_bundle"]) == ("attached", "")
    assert Path(data["bundle"], ADAPTER).is_file() and data["bytes"] == Path(data["bundle"], ADAPTER).stat().st_size
    assert "personalq calibrate --base toy && personalq export --base toy" in caplog.text
    caplog.clear()
    engine = give_engine(repository)
    assert exported(repository, "dog")["base_bundle"] == str(engine) and "has no engine" not in caplog.text


def test_what_is_forced_to_attach_says_what_it_lacks(repository: Repository, caplog: Any) -> None:
    data = exported(repository, "cat", "--form", "attached", "--rank", "1")
    assert (data["form"], data["form_reason"], data["rank"]) == ("attached", "--form attached was given", 1)
    layer = f"unet.{make.LAYER}.to_q"
    change = load_file(folder(repository, "cat") / "unet" / "diffusion_pytorch_model.safetensors")
    values = np.linalg.svd(change[f"{make.LAYER}.to_q.weight"], compute_uv=False) ** 2
    assert data["errors"] == {layer: pytest.approx(float(np.sqrt(1 - values[0] / values.sum())), abs=1e-4)}
    assert f"cat: layers cut to rank 1 or less: 1; {layer} lacks" in caplog.text
    assert exported(repository, "cat", "--form", "attached", "--energy", "1")["errors"].keys() <= {layer}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["dog", "--target", "tensorrt"], "--target goes with --form merged; attached, dog is drawn by the engines of its"),
        (["dog", "--form", "attached", "--spec", "fp16"], "--spec goes with --form merged; attached, dog is drawn by"),
        (["dog", "--lint", "trt"], "personalq export --base toy"),
        (["dog", "--form", "merged", "--rank", "4"], "--rank goes with --form attached; dog is merged: --form merged was"),
        (["cat", "--rank", "4"], "--rank goes with --form attached; cat is merged: unet."),
        (["cat", "--correct", "4"], "--correct goes with --form attached"),
        (["dog", "--spec", "fp16", "--energy", "0.5"], "--energy goes with --form attached; dog is merged: --spec was given"),
        (["--base", "toy", "--form", "merged"], "--form goes with one checkpoint, not with --base"),
        (["--base", "toy", "--rank", "4"], "--rank goes with one checkpoint, not with --base"),
        (["dog", "--base", "toy"], "name one of ID, --base ID, --all and --ids FILE"),
        (["--all", "--rank", "4"], "--rank goes with one ID"),
        (["dog", "--layout", "optimum"], "--layout and --out go together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_options_that_do_not_go_with_the_form_are_refused(
    repository: Repository, arguments: list[str], line: str
) -> None:
    ran = run(repository, "export", *arguments)
    assert ran.exit_code == 2 and line in ran.stderr, ran.stderr
    assert leftovers(repository) == []


def test_a_spec_or_merged_means_an_engine_of_its_own(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.export import ExportResult

    asked: list[Any] = []

    def export(_: Repository, id_: str, spec: Path | None, *rest: Any) -> ExportResult:
        asked.append((id_, spec))
        return ExportResult(repository.root / "bundles" / "k", "k", 1, 2, 4, ("onnxruntime",), 0.5, 9, False)

    request = types.ModuleType("exporters.request")
    request.export_request, request.lint_result = export, None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exporters.request", request)
    data = exported(repository, "dog", "--spec", "fp16")
    assert (data["form"], data["form_reason"]) == ("merged", "--spec was given, which is of an engine of its own")
    assert data.keys() >= KEYS | {"bytes_fp16", "bytes_fp32", "engines", "reused"} and data["base_bundle"] == ""
    assert exported(repository, "cat")["form_reason"].endswith("is replaced: a full fine-tune")
    assert exported(repository, "mug", "--form", "merged")["form_reason"] == "--form merged was given"
    assert asked == [("dog", Path("fp16")), ("cat", None), ("mug", None)]


def test_a_correction_is_made_for_the_spec_of_the_bases_engine(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fleet.correcting as room

    asked: list[Any] = []

    def correction(_: Repository, spec: Path, id_: str, rank: int, *rest: Any) -> dict[str, Branch]:
        asked.append((id_, spec, rank))
        return {LAYER: Branch(np.ones((8, rank), np.float16), np.ones((rank, 4), np.float16))}

    module = types.ModuleType("calibration.correction")
    module.correction = correction  # type: ignore[attr-defined]
    calibrate = types.ModuleType("calibration.calibrate")
    calibrate.CalibrateOptions = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "calibration.correction", module)
    monkeypatch.setitem(sys.modules, "calibration.calibrate", calibrate)
    spec = repository.root / "specs" / "toy" / "taq-w8a8.json"
    monkeypatch.setattr(room, "base_spec", lambda *_: spec)
    monkeypatch.setattr(room, "read_spec", lambda _: types.SimpleNamespace(content_sha256=lambda: "5" * 64))
    data = exported(repository, "dog", "--correct", "3")
    manifest = read_adapter_manifest(Path(data["bundle"]))
    assert asked == [("dog", spec, 3)] and manifest.correction == Correction(spec_sha256="5" * 64, rank=3)


def test_an_adapter_goes_to_a_store_and_a_base_that_is_not_there_is_said(
    repository: Repository, tmp_path: Path, caplog: Any
) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'personalq[store]'")
    from personalq.repository.remote import Remote

    url = f"file://{tmp_path}/store"
    data = exported(repository, "dog", "--store", url)
    assert (data["store"], data["base_in_store"]) == (url, False)
    assert f"dog: the store has no engine of base toy; run 'personalq export --base toy --store {url}'" in caplog.text
    listed = Remote(url).listed("dog")
    assert listed is not None and listed.key == Path(data["bundle"]).name


# --- bad input: one line, and nothing half-written


def refusal(repository: Repository, *arguments: str) -> str:
    ran = run(repository, "export", *arguments)
    assert (ran.exit_code, ran.stdout) == (1, "") and ran.stderr.count("\n") == 1, ran.output
    assert leftovers(repository) == []
    return ran.stderr


def test_a_delta_of_another_family_is_one_line(repository: Repository) -> None:
    wrong = {
        f"unet.{LAYER}.lora_A.weight": np.zeros((2, 16), np.float32),
        f"unet.{LAYER}.lora_B.weight": np.zeros((4, 2), np.float32),
    }
    save_file(wrong, folder(repository, "dog") / FILE)
    for arguments in (["dog"], ["dog", "--form", "attached"]):
        text = refusal(repository, *arguments)
        assert "to_k: must fit the base's [4, 8], got up [4, 2] @ down [2, 16]; add it with --base of the model" in text


def test_nan_in_a_matrix_is_one_line(repository: Repository) -> None:
    file = folder(repository, "dog") / FILE
    tensors = load_file(file)
    tensors[f"unet.{LAYER}.lora_A.weight"] = np.full((2, 8), np.nan, np.float32)
    save_file(tensors, file)
    wanted = f"personalq: unet.{LAYER}.weight: the delta must be finite, got NaN or Inf; save the checkpoint again\n"
    assert refusal(repository, "dog") == wanted
    assert refusal(repository, "dog", "--rank", "1") == wanted


def test_a_base_that_is_not_here_is_one_line(repository: Repository) -> None:
    base_of(repository).rename(repository.root / "gone")
    text = refusal(repository, "dog")
    assert "checkpoint 'dog': base must be one in this repository (none), got 'toy'; add it with" in text


def test_a_whole_pipeline_has_nothing_to_attach_to(repository: Repository) -> None:
    shutil.copytree(base_of(repository), folder(repository, "solo"))
    make.write_card(folder(repository, "solo"), kind="dreambooth", base="")
    assert form_of(repository.whole("solo")).reason == "it is a whole pipeline, with no base here to be attached to"
    assert "checkpoint 'solo': must have its base beside it to be attached to, got a whole pipeline" in refusal(
        repository, "solo", "--form", "attached"
    )
    with pytest.raises(RepositoryError, match="checkpoint 'toy': must have its base beside it"):
        export_adapter(repository, "toy")


def test_a_full_disk_leaves_nothing(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export_adapter(repository, "dog")
    assert leftovers(repository) == []
