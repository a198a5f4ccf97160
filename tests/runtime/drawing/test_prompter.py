"""What a bundle does with a prompt: chunks, warnings before drawing, refusals, and rows as many as the partner's."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from personalq.errors import PromptError
from personalq.prompts import literal
from runtime.drawing.pipeline import Picture, Pipeline, Settings, guide, start_noise
from runtime.drawing.prompter import MOST_CHUNKS
from runtime.engines.ort import OrtEngine

PROMPT = "a photo of sks dog on the beach"
LONG = "a photo of sks dog " + "in the snow " * 30


@pytest.fixture
def pipeline(open_bundle: Path) -> Pipeline:
    return Pipeline(OrtEngine(open_bundle, threads=1))


@pytest.fixture
def fixed(bundle: Path) -> Pipeline:
    """A bundle from before graphs took more than 77 rows."""
    return Pipeline(OrtEngine(bundle, threads=1))


def test_a_prompt_without_marks_has_the_rows_that_it_always_had(pipeline: Pipeline, fixed: Pipeline) -> None:
    for prompt in (PROMPT, "", "a <moss-mug>, red: 1.3", "snow " * 75):
        ids = pipeline.tokenizer.encode(prompt).ids
        alone = pipeline.rows_of_ids(ids, embeds=pipeline.embed([prompt]))
        for found in (pipeline.rows(prompt), fixed.rows(prompt)):
            assert (found.ids == ids).all() and found.kept == alone.kept
            for name, value in alone.conditioning.items():
                assert found.conditioning[name].tobytes() == value.tobytes(), name


def test_weights_change_the_weighed_rows_and_scale_the_others_alike(pipeline: Pipeline) -> None:
    plain, weighed = (pipeline.rows(f"a photo of {dog} on the beach").text_embeds[0] for dog in ("dog", "(dog:1.5)"))
    scale = weighed[0] / plain[0]
    assert np.allclose(scale, scale[0], rtol=1e-5)
    factors = np.ones(77)
    factors[4] = 1.5
    assert np.allclose(weighed, plain * scale[0] * factors[:, None], rtol=1e-5)


def test_a_long_prompt_has_the_rows_of_its_chunks(pipeline: Pipeline) -> None:
    found = pipeline.rows(LONG)
    chunks = [" ".join(LONG.split()[:75]), " ".join(LONG.split()[75:])]
    assert found.text_embeds.shape[1] == found.n_rows == found.conditioning["rest"].shape[1] == 154
    expected = pipeline.embed(chunks).states.reshape(1, 154, -1)
    assert found.text_embeds.tobytes() == expected.tobytes()
    assert found.kept == (4, 0, 77) and found.cut == ""
    index = found.conditioning["row_index"][0]
    assert index[[4, 0, 77, 1, 153]].tolist() == [154, 155, 156, 1, 153]


def test_a_trigger_in_a_later_chunk_is_found(pipeline: Pipeline) -> None:
    assert pipeline.rows("snow " * 74 + "<moss-mug> snow").kept == (78, 79, 0, 77)
    assert pipeline.rows("snow BREAK snow BREAK (sks:1.2)").kept == (155, 0, 77, 154)


def test_both_halves_of_guidance_have_equally_many_rows(pipeline: Pipeline) -> None:
    noise = start_noise(1, (4, 8, 8))
    long, short = pipeline.rows(LONG), pipeline.rows("a cat")
    states = np.concatenate([short.text_embeds, pipeline.embed([""]).states], axis=1)
    ids = np.concatenate([short.ids, pipeline.tokenizer.encode("").ids])
    padded = pipeline.rows_of_ids(ids, embeds=type(pipeline.embed([""]))(states))
    alone = [pipeline.engine.denoiser(r.conditioning, 8, 8)(noise[None], 999.0)[0].copy() for r in (padded, long)]
    for picture, halves in (
        (Picture(LONG, "a cat", noise=noise), alone),
        (Picture("a cat", LONG, noise=noise), alone[::-1]),
    ):
        (step,) = pipeline.denoise([picture], Settings(steps=1, guidance=3.0))
        assert np.allclose(step.latents, -guide(np.stack(halves), 1, 3.0), atol=1e-5)  # v-prediction at zero SNR
    unguided = next(iter(pipeline.denoise([Picture("a cat", LONG, noise=noise)], Settings(steps=1, guidance=1.0))))
    assert np.allclose(
        unguided.latents, -pipeline.engine.denoiser(short.conditioning, 8, 8)(noise[None], 999.0), atol=1e-5
    )


def test_a_picture_does_not_depend_on_longer_prompts_of_its_batch(pipeline: Pipeline) -> None:
    pictures = [
        Picture(PROMPT, seed=1),
        Picture(LONG, "snow", seed=2),
        Picture("", LONG, seed=3),
        Picture("a dog", seed=4),
    ]
    settings = Settings(steps=3, sampler="euler_a")
    together = list(pipeline.denoise(pictures, settings))[-1].latents
    for picture, latents in zip(pictures, together, strict=True):
        alone = list(pipeline.denoise([picture], settings))[-1].latents[0]
        assert np.allclose(alone, latents, atol=1e-5)


def test_warnings_are_known_before_anything_is_encoded(
    pipeline: Pipeline, fixed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (pipeline, fixed):
        monkeypatch.setattr(one.engine, "encode", lambda *_: pytest.fail("encoded"))
    picture = Picture("a (dog AND sks BREAK snow", "a [cat|dog]")
    open_bracket = "prompt: '(' at character 2 is never closed: it is read as a bracket"
    composed = "prompt: AND: prompts cannot be composed: it is read as the word 'and'"
    negative = (
        "negative_prompt: [cat|dog]: words cannot change between steps: all of it is read as words, divided by 1.1"
    )
    left_out = "prompt: BREAK: this bundle takes one chunk of text on this target: it is left out"
    assert pipeline.warnings(picture) == (open_bracket, composed, negative)
    assert fixed.warnings(picture) == (open_bracket, composed, left_out, negative)
    assert pipeline.warnings(Picture(LONG)) == pipeline.warnings(Picture(PROMPT)) == ()
    (told,) = fixed.warnings(Picture(LONG))
    assert told == "prompt: only 77 tokens fit; 20 words are cut, from 'the' on; shorten it"


def test_a_flood_of_chunks_ends_and_is_told(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "personalq.runtime"):
        rows = pipeline.rows("snow BREAK " * 100 + "dog")
    assert rows.n_rows == 77 * MOST_CHUNKS
    assert caplog.messages == ["prompt: only 616 tokens fit; 93 words are cut, from 'snow' on; shorten it"]
    with pytest.raises(
        PromptError, match="its trigger 'sks' must be within the first 616 tokens, got it in what is cut"
    ):
        pipeline.denoise([Picture("snow BREAK " * 100 + "sks")])


def test_a_literal_prompt_is_read_as_diffusers_reads_it(pipeline: Pipeline) -> None:
    ids = pipeline.tokenizer.encode("a (dog:1.3) BREAK").ids
    assert (pipeline.rows(literal("a (dog:1.3) BREAK")).ids == ids).all()
    assert (pipeline.rows(literal(LONG)).ids == pipeline.tokenizer.encode(LONG).ids).all()


@pytest.mark.parametrize("tag", ["<lora:moss-mug:1>", "<lora:Moss Mug>", "<lora:Moss_V2:1:1>"])
def test_the_bundles_own_checkpoint_may_be_named_and_is_no_text(
    make_bundle: Callable[..., Path], tag: str, bundle: Path
) -> None:
    checkpoint = Pipeline(OrtEngine(bundle, threads=1)).manifest.checkpoint
    named = make_bundle("named000", is_open=True, checkpoint=checkpoint.model_copy(update={"files": ("moss_v2",)}))
    pipeline = Pipeline(OrtEngine(named, threads=1))
    assert (pipeline.rows(f"a dog {tag} on the beach").ids == pipeline.rows("a dog on the beach").ids).all()
    assert pipeline.rows(tag) is pipeline.rows("")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_another_adapter_is_refused_before_the_first_step(pipeline: Pipeline, field: str) -> None:
    picture = Picture(**{"prompt": "a dog", field: "a <lora:rusty:0.8> dog"})
    for asked in (pipeline.warnings, lambda one: pipeline.denoise([one])):
        with pytest.raises(PromptError) as error:
            asked(picture)
        assert str(error.value).startswith("prompt: <lora:rusty:0.8> must name what draws, 'moss-mug'; ")


def test_rows_for_a_longer_partner_are_computed_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = pipeline.engine.text_rows
    monkeypatch.setattr(pipeline.engine, "text_rows", lambda *given: computed.append(1) or original(*given))
    for _ in range(2):
        list(pipeline.denoise([Picture(LONG)], Settings(steps=1)))
    assert len(computed) == 3  # the prompt, the empty prompt, and that followed by an empty chunk


def test_a_long_prompt_takes_the_place_of_several_in_memory(open_bundle: Path) -> None:
    pipeline = Pipeline(OrtEngine(open_bundle, threads=1), cached_prompts=3)
    for prompt in ("a dog", "a cat", LONG):
        pipeline.rows(prompt)
    assert pipeline.prompts.cached.keys() == {"a cat", LONG}
    flood = "snow BREAK " * 8
    assert pipeline.rows(flood).n_rows == 616 and pipeline.prompts.cached.keys() == {flood}
