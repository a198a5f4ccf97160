"""Calibrate: the spec covers every layer, keeps the trigger, repeats exactly, and its memory does not grow with samples."""

import numpy as np
import pytest

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.model.pipeline import load_pipeline, quantisable_layers
from calibration.model.reference import golden_prompts
from calibration.prompts import calibration_prompts, subject_of
from calibration.statistics.ranges import Observer, time_bin
from personalq.cards.card import Card
from personalq.errors import RepositoryError, SpecError
from personalq.spec import read_spec

FEW = {"samples": 2, "steps": 2}


def test_spec_covers_every_layer_of_the_step_path_and_keeps_the_trigger(rex):
    result = calibrate(rex, "rex", CalibrateOptions(**FEW))
    unet = load_pipeline(rex, rex.card("rex")).unet
    spec = read_spec(result.spec_path).spec
    assert set(spec.layers) == set(quantisable_layers(unet))
    assert not [name for name in spec.layers if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert spec.rows.kept.trigger == ((spec.rows.kept.trigger[0][0],),)
    assert result.kept_tokens[0] == "sks"
    assert spec.rows.reasons["trigger"] == "carries the concept"
    for name in ("bos", "class_noun", "eos", "pad"):
        assert ("not kept" in spec.rows.reasons[name]) is not bool(getattr(spec.rows.kept, name)), name
    assert all(layer.reason for layer in spec.layers.values() if layer.weight == "float")


def test_the_same_seed_gives_the_same_decisions_and_scales(rex):
    first = calibrate(rex, "rex", CalibrateOptions(**FEW)).spec_file
    second = calibrate(rex, "rex", CalibrateOptions(**FEW)).spec_file
    assert first.content_sha256() == second.content_sha256()
    for name, scale in first.tensors.items():
        np.testing.assert_array_equal(scale, second.tensors[name])


def test_reference_policy_quantises_nothing_and_says_so(rex):
    spec = calibrate(rex, "rex", CalibrateOptions(policy="fp32")).spec_file.spec
    assert spec.is_float
    assert spec.storage == "float32"
    assert {layer.reason for layer in spec.layers.values()} == {"reference: nothing is quantised"}


def test_unknown_policy_and_width_are_refused(rex):
    with pytest.raises(SpecError, match=r"policy: must be one of .*taq.*, got 'magic'"):
        calibrate(rex, "rex", CalibrateOptions(policy="magic", **FEW))
    with pytest.raises(SpecError, match=r"bits: must be one of .*w8a8.*, got 'w1a1'"):
        calibrate(rex, "rex", CalibrateOptions(bits="w1a1", **FEW))


def test_rows_that_are_not_kept_take_the_bits_that_are_asked_for(rex):
    made = calibrate(rex, "rex", CalibrateOptions(policy="rtn", row_bits=4, **FEW))
    assert made.spec_path.name == "rtn-w8a8-rows4.json"
    assert {layer.rest_bits for layer in made.spec_file.spec.rows.layers} == {4}
    with pytest.raises(SpecError, match=r"row bits: must be one of \(8, 4\), got 3"):
        calibrate(rex, "rex", CalibrateOptions(row_bits=3, **FEW))


def test_unknown_checkpoint_names_the_nearest(rex):
    with pytest.raises(RepositoryError, match="nearest: rex"):
        calibrate(rex, "rexx", CalibrateOptions(**FEW))


def test_state_of_the_observer_does_not_grow_with_samples(rex):
    import torch

    unet = load_pipeline(rex, rex.card("rex")).unet
    observer = Observer(unet)

    def run(n: int) -> int:
        with observer.watching(), torch.no_grad():
            for _ in range(n):
                unet(torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 77, 32))
        return sum(h.counts.nbytes for layer in observer.layers.values() for h in layer.inputs + layer.outputs)

    assert run(1) == run(4)
    assert observer.samples == 5


def test_hooks_are_gone_after_watching(rex):
    unet = load_pipeline(rex, rex.card("rex")).unet
    with Observer(unet).watching():
        pass
    assert not any(module._forward_hooks for module in unet.modules())
    assert not unet._forward_pre_hooks


def test_prompts_are_seeded_and_three_in_four_call_the_trigger():
    card = Card(id="rex", name="Rex", kind="lora", base="tiny", trigger=("sks",), class_noun="dog")
    prompts = calibration_prompts(card, 16)
    assert prompts == calibration_prompts(card, 16)
    assert prompts != calibration_prompts(card, 16, seed=1)
    assert sum("sks dog" in prompt for prompt in prompts) == 12


def test_examples_are_read_as_text_encoders_see_them():
    examples = ("(masterpiece:1.3), sks dog <lora:rex:1>", "a photo of sks dog (on a beach)")
    card = Card(id="rex", kind="lora", base="tiny", trigger=("sks",), class_noun="dog", example_prompts=examples)
    plain = ["masterpiece, sks dog", examples[1]]
    assert calibration_prompts(card, 8)[:2] == plain
    assert golden_prompts(card) == ["", *plain]


@pytest.mark.parametrize(
    ("trigger", "noun", "expected"),
    [
        (("sks",), "dog", "sks dog"),
        (("a sks dog",), "dog", "a sks dog"),
        (("bnha style",), "style", "bnha style"),
        ((), "mug", "mug"),
    ],
    ids=["token", "phrase with noun", "style", "no trigger"],
)
def test_subject_says_trigger_and_noun_once(trigger, noun, expected):
    assert subject_of(Card(id="x", name="X", kind="lora", base="tiny", trigger=trigger, class_noun=noun)) == expected


@pytest.mark.parametrize(("timestep", "expected"), [(999, 4), (600, 3), (0, 0)], ids=str)
def test_time_steps_fall_into_five_bins(timestep, expected):
    assert time_bin(timestep) == expected
