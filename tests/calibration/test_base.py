"""A base is calibrated over its own prompts and as each checkpoint makes it; what is decided are its own weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from calibration.calibrate import CalibrateOptions, calibrate, gather
from calibration.mixture import choice
from calibration.model.dressing import dressed
from calibration.model.pipeline import load_pipeline, quantisable_layers
from calibration.model.reference import start_noise
from calibration.rounding.gptq import columns
from calibration.statistics import evidence as evidences
from calibration.statistics.evidence import Evidence, Part, Recipe
from personalq.errors import RepositoryError, SpecError
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from personalq.spec import REFERENCE, read_spec
from personalq.weights.header import read_header
from tests.conftest import tiny_pipeline
from tests.repositories import tiny_repository

FEW = CalibrateOptions(samples=2, steps=2, policy="rtn")


def put(repository: Repository, id_: str, kind: str, base: str = "tiny", **card: object) -> Path:
    folder = repository.root / "checkpoints" / id_
    folder.mkdir(parents=True)
    content = {"id": id_, "kind": kind, "base": base, "trigger": [f"<{id_}>"], "class_noun": "mug", **card}
    (folder / "card.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, traces: Path) -> Repository:
    """'rex' (LoRA), 'pot' (an embedding of two vectors) and 'whole' (a full fine-tune) over base 'tiny'."""
    made = tiny_repository(tmp_path_factory.mktemp("base"), tiny_base, tiny_pipeline(), traces)
    torch.manual_seed(3)
    folder = put(made, "pot", "textual_inversion")
    save_file({"<pot>": torch.randn(2, 32)}, folder / "learned_embeds.safetensors")
    tiny_pipeline(4).unet.save_pretrained(put(made, "whole", "dreambooth", trigger=["zwx"]) / "unet")
    return Repository.open(made.root)


def base_of(repository: Repository):
    return load_pipeline(repository, repository.whole("tiny").card)


@pytest.mark.parametrize("id_", ["rex", "pot", "whole"])
def test_a_dressed_base_is_the_checkpoint_and_undressed_the_same_bits_as_before(repository, id_) -> None:
    pipe, theirs = base_of(repository), load_pipeline(repository, repository.card(id_))
    parts = ("unet", "text_encoder", "vae")
    before = {part: {n: v.clone() for n, v in getattr(pipe, part).state_dict().items()} for part in parts}
    objects = {part: getattr(pipe, part) for part in (*parts, "tokenizer", "scheduler")}
    with dressed(pipe, repository.whole(id_)):
        for part in parts:
            for name, value in getattr(theirs, part).state_dict().items():
                assert torch.equal(getattr(pipe, part).state_dict()[name], value), (part, name)
        assert pipe.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
        draw = [
            p("a photo of sks dog <pot>", 2, output_type="np", generator=torch.manual_seed(0)) for p in (pipe, theirs)
        ]
        np.testing.assert_array_equal(draw[0].images, draw[1].images)
    assert all(getattr(pipe, name) is value for name, value in objects.items())
    for part in parts:
        for name, value in getattr(pipe, part).state_dict().items():
            assert torch.equal(value, before[part][name]), (part, name)


def test_a_checkpoint_that_fails_half_way_leaves_the_base_as_it_was(repository, monkeypatch) -> None:
    pipe = base_of(repository)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(KeyError), dressed(pipe, repository.whole("rex")):
        raise KeyError("in the middle")
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def evidence_of(repository: Repository, *names: str) -> Evidence:
    options = CalibrateOptions(samples=2, steps=4, over=names)
    evidence = gather(repository, repository.whole("tiny").card, options)
    evidence.saved = None
    return evidence


def ran(repository: Repository, part: Part, place: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Largest |input|, and X^T X, of every layer when the merged checkpoint draws a part's prompts, the first at `place`."""
    pipe = load_pipeline(repository, repository.card(part.checkpoint))
    peaks, moments = dict[str, float](), dict[str, torch.Tensor]()

    def hook(name: str):
        def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
            x = columns(module, args[0]).flatten(0, 1)
            peaks[name] = max(peaks.get(name, 0.0), float(args[0].abs().max()))
            moments[name] = moments.get(name, 0) + x.T @ x

        return note

    for name, module in quantisable_layers(pipe.unet).items():
        module.register_forward_hook(hook(name))
    for i, prompt in enumerate(part.prompts):
        noise = torch.from_numpy(start_noise(pipe, 100 + place + i))[None]
        pipe(prompt, num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="latent")
    return peaks, moments


def test_ranges_of_the_mixture_are_the_largest_of_its_parts_and_hessians_their_sum(repository, monkeypatch) -> None:
    monkeypatch.setattr(evidences, "HESSIAN_EVERY", 1)
    mixture, own = evidence_of(repository, "rex", "pot"), evidence_of(repository)
    _, rex, pot = mixture.recipe.parts
    first = len(own.recipe.prompts)
    others = [ran(repository, rex, first), ran(repository, pot, first + len(rex.prompts))]
    for name, layer in mixture.seen.layers.items():
        largest = max(own.seen.layers[name].input().absmax, *(peaks[name] for peaks, _ in others))
        assert layer.input().absmax == pytest.approx(largest, rel=1e-5), name
    for name, hessian in mixture.hessians["plain"].items():
        total = own.hessians["plain"][name].total + sum(moments[name] for _, moments in others)
        torch.testing.assert_close(hessian.total, total, rtol=1e-4, atol=1e-5 * float(total.abs().max()))


def test_what_is_decided_are_the_bases_own_weights(repository) -> None:
    evidence, pipe = evidence_of(repository, "rex"), base_of(repository)
    modules = quantisable_layers(pipe.unet)
    for name, layer in evidence.seen.layers.items():
        assert torch.equal(layer.weight, modules[name].weight), name


def test_each_part_has_its_own_trigger_and_the_bases_own_prompts_have_none(repository, monkeypatch) -> None:
    monkeypatch.setattr(evidences, "HESSIAN_EVERY", 1)
    evidence = evidence_of(repository, "rex", "pot")
    own, rex, pot = evidence.recipe.parts
    assert (own.checkpoint, own.trigger, own.class_noun) == ("", (), ())
    tokenizer = StableDiffusionPipeline.from_pretrained(repository.root / "bases" / "tiny").tokenizer
    assert rex.trigger == (tuple(tokenizer("sks", add_special_tokens=False).input_ids),)
    n = len(tokenizer)
    assert pot.trigger == ((n, n + 1),)  # one token of two vectors, new to the base's tokenizer
    plain, weighted = (evidence.hessians[kind]["conv_out"].total for kind in ("plain", "trigger"))
    assert not torch.equal(plain, weighted)
    only = evidence_of(repository).hessians
    assert all(torch.equal(only["plain"][name].total, only["trigger"][name].total) for name in only["plain"])


def test_a_bases_spec_keeps_the_words_of_whatever_is_attached(repository) -> None:
    made = calibrate(repository, "tiny", CalibrateOptions(samples=2, steps=2))
    spec = read_spec(made.spec_path).spec
    base = repository.root / "bases" / "tiny"
    assert made.spec_path == repository.root / "specs" / "tiny" / "taq-w8a8.json"
    assert spec.checkpoint == "tiny"
    assert "trigger" in spec.rows.kept.of_adapter
    assert (spec.rows.kept.trigger, spec.rows.kept.class_noun) == ((), ())
    assert made.kept_tokens[0] == "<TRIGGER>"
    assert spec.provenance.checkpoint_sha256 == weights_sha256(base, None)
    folders = {id_: repository.root / "checkpoints" / id_ for id_ in ("pot", "rex")}
    assert spec.provenance.notes["over"] == {id_: weights_sha256(base, folder) for id_, folder in folders.items()}
    assert made.over == ("pot", "rex")
    assert made.left_out == {"whole": "a full fine-tune is merged, not attached; name it in --over to take it in"}
    assert spec.provenance.prompts == 2 * 2 + 2 * 1
    assert made.checked_against.startswith("diffusers ")
    said = read_header(made.spec_path.parent / REFERENCE).metadata
    assert json.loads(said["prompts"])[0] == ""
    assert said["checkpoint_sha256"] == spec.provenance.checkpoint_sha256


@pytest.mark.parametrize(
    ("policy", "words"), [("no-rows", ()), ("rtn", ()), ("bos-only", ()), ("trigger+eos", ("trigger",))]
)
def test_controls_keep_what_they_name(repository, policy: str, words: tuple[str, ...]) -> None:
    kept = calibrate(repository, "tiny", CalibrateOptions(samples=2, steps=2, policy=policy)).spec_file.spec.rows.kept
    assert kept.of_adapter == words


def test_a_base_is_tuned_at_four_bits_over_its_checkpoints(repository, monkeypatch) -> None:
    from calibration.rounding import tune

    monkeypatch.setattr(tune, "STEPS", 2)
    spec = calibrate(
        repository, "tiny", CalibrateOptions(samples=2, steps=3, bits="w4a8", over=("rex",))
    ).spec_file.spec
    assert spec.tuned
    assert {layer.found_by.rpartition("; ")[2] for layer in spec.layers.values() if layer.weight == "int4"} == {
        "gptq, trigger Hessian"
    }


def test_a_full_fine_tune_is_taken_in_when_it_is_named(repository) -> None:
    evidence = evidence_of(repository, "whole")
    assert [part.checkpoint for part in evidence.recipe.parts] == ["", "whole"]


@pytest.mark.parametrize("steps", [3, 4, 8, 25])
def test_second_moments_are_of_all_parts_of_the_schedule(steps: int) -> None:
    evidence = Evidence(tiny_pipeline(), Recipe((Part(("",) * 8),), steps, 1.0, 0))
    watcher, taken = evidences.Watcher(evidence), set()
    for watcher.calls in range(8 * steps):
        taken |= {watcher.calls % steps} if watcher.has_turn() else set()
    assert taken == set(range(steps))


def test_statistics_are_saved_for_this_list_and_these_weights(repository) -> None:
    one, both = evidence_of(repository, "rex"), evidence_of(repository, "rex", "pot")
    assert one.key != both.key
    folder = repository.root / "checkpoints" / "rex"
    file = next(folder.glob("*.safetensors"))
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[:-4] + b"\0\0\0\0")
        assert evidence_of(repository, "rex").key != one.key
    finally:
        file.write_bytes(kept)
    assert evidence_of(repository, "rex").key == one.key


def test_a_float_policy_writes_the_bases_goldens_and_runs_no_checkpoint(repository) -> None:
    made = calibrate(repository, "tiny", CalibrateOptions(policy="fp32"))
    assert made.over == ()
    assert made.spec_file.spec.provenance.notes == {}
    with pytest.raises(SpecError, match=r"over: must be left out with policy 'fp16'"):
        calibrate(repository, "tiny", CalibrateOptions(policy="fp16", over=("rex",)))


def test_a_list_that_cannot_be_run_is_one_line(repository, tiny_base: Path) -> None:
    with pytest.raises(RepositoryError, match=r"checkpoint 'rexx': must be an id in .*nearest: rex") as unknown:
        calibrate(repository, "tiny", CalibrateOptions(over=("rexx",)))
    shutil.copytree(tiny_base, repository.root / "bases" / "other")
    shutil.copytree(repository.root / "checkpoints" / "rex", repository.root / "checkpoints" / "stranger")
    card = repository.root / "checkpoints" / "stranger" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"id": "stranger", "base": "other"}))
    said = r"over: 'stranger' must be a checkpoint of base 'tiny', got one of 'other'; leave it out"
    with pytest.raises(SpecError, match=said) as foreign:
        calibrate(repository, "tiny", CalibrateOptions(over=("rex", "stranger")))
    with pytest.raises(SpecError, match=r"over: must be given with a base, got it with checkpoint 'rex'") as single:
        calibrate(repository, "rex", CalibrateOptions(over=("pot",)))
    assert not any("\n" in str(one.value) for one in (unknown, foreign, single))


def test_a_checkpoint_that_cannot_be_read_is_left_out_and_said(repository, tmp_path: Path) -> None:
    copy = Repository.open(shutil.copytree(repository.root, tmp_path / "repo"))
    save_file({"<bad>": torch.randn(1, 31)}, put(copy, "bad", "textual_inversion") / "learned_embeds.safetensors")
    found = choice.chosen(copy, copy.whole("tiny"))
    assert [one.card.id for one in found.over] == ["pot", "rex"]
    assert "31" in found.left_out["bad"]
    assert "\n" not in found.left_out["bad"]


def test_parts_are_plain_values_for_the_key() -> None:
    recipe = Recipe((Part(("a",)), Part(("b", "c"), ((1,),), checkpoint="x", sha256="y")), 2, 1.0, 0)
    assert recipe.prompts == ("a", "b", "c")
