"""From prompt to picture: reproducible, obedient to the manifest, clear about prompts that do not fit."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.errors import EngineError, PromptError
from personalq.numerics import psnr_db
from runtime.drawing.pipeline import Picture, Pipeline, Settings, guide, start_noise, to_uint8
from runtime.drawing.samplers import SAMPLERS
from runtime.engines.ort import OrtEngine

PROMPT = "a photo of sks dog on the beach"


@pytest.fixture
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline(OrtEngine(bundle, threads=1))


def test_a_picture_has_the_manifests_size(pipeline: Pipeline) -> None:
    image = pipeline.image(PROMPT)
    assert (image.shape, image.dtype) == ((16, 16, 3), np.uint8)
    assert image.flags.c_contiguous


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(pipeline: Pipeline) -> None:
    assert (pipeline.image(PROMPT, seed=3) == pipeline.image(PROMPT, seed=3)).all()
    assert (pipeline.image(PROMPT, seed=3) != pipeline.image(PROMPT, seed=4)).any()


def test_start_noise_is_pinned_for_all_time() -> None:
    noise = start_noise(0, (4, 2, 2))
    assert (noise.shape, noise.dtype) == ((4, 2, 2), np.float32)
    assert noise.ravel()[:3].tolist() == pytest.approx([0.1257302, -0.1321049, 0.6404226], abs=1e-6)


def test_steps_arrive_one_by_one_and_may_be_abandoned(pipeline: Pipeline) -> None:
    steps = list(pipeline.denoise([Picture(PROMPT)], Settings(steps=3)))
    assert [(step.index, step.n_steps, step.timestep) for step in steps] == [(0, 3, 999), (1, 3, 666), (2, 3, 332)]
    assert len({step.latents.tobytes() for step in steps}) == 3
    assert steps[-1].latents.shape == steps[-1].predicted.shape == (1, 4, 8, 8)
    assert (next(iter(pipeline.denoise([Picture(PROMPT)], Settings(steps=3)))).latents == steps[0].latents).all()


def test_the_last_latents_are_the_predicted_ones_when_the_schedule_ends_clean(pipeline: Pipeline) -> None:
    last = list(pipeline.denoise([Picture(PROMPT)]))[-1]
    assert np.allclose(last.latents, last.predicted, atol=1e-6)


def test_guidance_one_runs_one_half(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    original = pipeline.engine.denoiser

    def spy(conditioning: Any, *more: Any) -> Any:
        batches.append(len(conditioning["rest"]))
        return original(conditioning, *more)

    monkeypatch.setattr(pipeline.engine, "denoiser", spy)
    pipeline.image(PROMPT, guidance=1.0, steps=1)
    pipeline.image(PROMPT, guidance=2.0, steps=1)
    assert batches == [1, 2]


def test_guidance_is_uncond_plus_scale_times_difference() -> None:
    halves = np.array([1.0, 3.0, 2.0, 2.5], dtype=np.float32).reshape(4, 1, 1, 1)
    assert guide(halves, 2, 4.0).ravel().tolist() == [9.0, 4.0]
    assert guide(halves[:1], 1, 4.0).ravel().tolist() == [1.0]


def test_a_batch_of_two_equals_two_runs(pipeline: Pipeline) -> None:
    """Classifier-free guidance in one batch, against each half alone."""
    noise = start_noise(1, (4, 8, 8))
    alone = [
        pipeline.engine.denoiser(pipeline.rows(prompt).conditioning, 8, 8)(noise[None], 999.0)[0].copy()
        for prompt in ("", PROMPT)
    ]
    step = next(iter(pipeline.denoise([Picture(PROMPT, noise=noise)], Settings(steps=1, guidance=3.0))))
    expected = -guide(np.stack(alone), 1, 3.0)  # v-prediction at zero SNR: x_0 = -v
    assert np.allclose(step.latents, expected, atol=1e-5)


def test_a_negative_prompt_changes_the_picture(pipeline: Pipeline) -> None:
    assert (pipeline.image(PROMPT) != pipeline.image(PROMPT, negative_prompt="snow")).any()


def test_other_sizes_are_drawn_and_wrong_ones_refused(pipeline: Pipeline) -> None:
    assert pipeline.image(PROMPT, width=24, height=8, steps=1).shape == (8, 24, 3)
    with pytest.raises(EngineError) as error:
        pipeline.denoise([Picture(PROMPT)], Settings(width=15))
    assert str(error.value) == "width: must be a multiple of 2, got 15; nearest: 14 or 16"


def test_a_batch_of_prompts_draws_what_each_draws_alone(pipeline: Pipeline) -> None:
    pictures = [Picture(PROMPT, seed=1), Picture("a cat", "snow", seed=2), Picture("", seed=3)]
    settings = Settings(steps=3, sampler="euler_a")
    together = list(pipeline.denoise(pictures, settings))[-1].latents
    for picture, latents in zip(pictures, together, strict=True):
        alone = list(pipeline.denoise([picture], settings))[-1].latents[0]
        assert np.allclose(alone, latents, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_by_its_seed(pipeline: Pipeline, sampler: str) -> None:
    images = [pipeline.image(PROMPT, seed=seed, steps=3, sampler=sampler) for seed in (1, 1, 2)]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 0.5}, "guidance: must be 1 (none) or more, got 0.5; 4 to 8 is usual"),
        ({"guidance": math.nan}, "guidance: must be 1 (none) or more, got nan; 4 to 8 is usual"),
        ({"seed": -1}, "seed: must be 0 or more, got -1; choose another seed"),
        ({"steps": 0}, "steps: must be between 1 and 1000, got 0; choose another number"),
        (
            {"sampler": "plms"},
            "sampler: must be one of ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, pndm, lcm, got 'plms'; choose one of them",
        ),
        ({"height": 0}, "height: must be a multiple of 2, got 0; nearest: 2"),
    ],
    ids=["guidance", "guidance nan", "seed", "steps", "sampler", "height"],
)
def test_wrong_settings_are_refused_before_the_first_step(
    pipeline: Pipeline, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError) as error:
        pipeline.image(PROMPT, **settings)
    assert str(error.value) == message


def test_rows_are_computed_once_per_prompt(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = pipeline.engine.encode
    monkeypatch.setattr(pipeline.engine, "encode", lambda *ids: computed.append(1) or original(*ids))
    for _ in range(2):
        pipeline.image(PROMPT, steps=1)
    assert len(computed) == 2  # the prompt and the empty prompt


def test_the_cache_forgets_the_prompt_used_longest_ago(bundle: Path) -> None:
    pipeline = Pipeline(OrtEngine(bundle, threads=1), cached_prompts=2)
    first = pipeline.rows("a dog")
    pipeline.rows("a cat")
    assert pipeline.rows("a dog") is first
    pipeline.rows("a mug")
    assert pipeline.rows("a dog") is first and pipeline.prompts.cached.keys() == {"a dog", "a mug"}


def test_trigger_and_begin_are_kept_and_the_empty_prompt_keeps_begin_only(pipeline: Pipeline) -> None:
    assert pipeline.rows(PROMPT).kept == (4, 0)
    assert pipeline.rows("a <moss-mug>").kept == (2, 3, 0)
    assert pipeline.rows("").kept == (0,)
    index = pipeline.rows(PROMPT).conditioning["row_index"][0]
    assert (index[4], index[0], index[1]) == (77, 78, 1)


def test_kept_rows_are_closer_to_the_full_rows_than_the_rest(pipeline: Pipeline, reference: Path) -> None:
    full = Pipeline(OrtEngine(reference, threads=1)).rows(PROMPT).conditioning["rows"][0]
    kept = pipeline.rows(PROMPT).conditioning["kept"][0]
    assert (kept[0] == full[4].astype(np.float16)).all() and (kept[1] == full[0].astype(np.float16)).all()


def test_the_quantised_picture_is_close_to_the_reference(pipeline: Pipeline, reference: Path) -> None:
    full = Pipeline(OrtEngine(reference, threads=1)).image(PROMPT)
    assert psnr_db(full, pipeline.image(PROMPT), peak=255) > 25


def test_a_long_prompt_warns_each_time_with_what_was_cut(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a photo of sks dog " + "in the snow " * 30
    with caplog.at_level(logging.WARNING, "personalq.runtime"):
        rows = [pipeline.rows(prompt), pipeline.rows(prompt)]
    assert rows[0].cut == "the snow" + " in the snow" * 6
    assert caplog.messages == ["prompt: only 77 tokens fit; 20 words are cut, from 'the' on; shorten it"] * 2


@pytest.mark.parametrize("tail", ["of sks dog", "<moss-mug> snow"], ids=["one token", "half of two tokens"])
def test_a_prompt_whose_trigger_is_cut_is_refused(pipeline: Pipeline, tail: str) -> None:
    prompt = "snow " * 74 + tail
    with pytest.raises(PromptError) as error:
        pipeline.denoise([Picture(prompt)])
    trigger, cut = ("sks", "sks dog") if "sks" in tail else ("<moss-mug>", "<moss-mug>_1 snow")
    assert str(error.value) == (
        f"prompt: its trigger {trigger!r} must be within the first 77 tokens, got it in what is cut ({cut!r}); "
        "shorten the prompt or put the trigger earlier"
    )


def test_a_trigger_that_also_stands_early_may_be_cut_late(pipeline: Pipeline) -> None:
    assert pipeline.rows("sks " + "snow " * 80 + "sks").cut.endswith("sks")


def test_predictions_that_explode_are_refused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.full((2, 4, 8, 8), np.nan, np.float32)
    monkeypatch.setattr(pipeline.engine, "denoiser", lambda *_: lambda *_: broken)
    with pytest.raises(EngineError) as error:
        list(pipeline.denoise([Picture(PROMPT)]))
    assert str(error.value) == (
        "noise_pred: must be finite, got NaN or Inf at step 1 of 4; run 'personalq verify moss-mug'"
    )


def test_pixels_are_rounded_as_diffusers_rounds() -> None:
    image = np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0], np.float32).reshape(1, 1, 6).repeat(3, axis=0)
    assert to_uint8(image)[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]
