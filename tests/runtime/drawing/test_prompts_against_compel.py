"""Chunks and pictures equal compel's and diffusers', for Stable Diffusion 1.x, 2.x and XL; weights are A1111's, beside compel's.

compel weighs otherwise on purpose (away from the empty prompt's embedding), so weights are compared by their direction.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.numerics import cosine
from runtime.drawing.pipeline import start_noise

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
compel = pytest.importorskip("compel", reason="compel is not installed: pip install 'personalq[dev]'")
from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode  # noqa: E402

from tests.exporters.families import Made  # noqa: E402  (needs torch)
from tests.runtime.drawing.test_emphasis import a1111  # noqa: E402

TOLERANCE = 1e-4  # FP32 on both sides, sums in another order
NOUNS = ("dog", "red", "mug", "beach", "forest")
LONG = "a photo of sks " + " ".join(NOUNS[i % 5] for i in range(160))
COMMAS = ", ".join(["a photo of sks dog", *(f"{NOUNS[i % 5]} on the {NOUNS[i % 3]}" for i in range(40))])


@pytest.fixture(scope="module", params=("sd1", "sd2", "sdxl"))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Made:
    """Final layer norms get a bias: trained ones have means that are not zero, which A1111's formula divides by."""
    made = Made(request.param, tmp_path_factory.mktemp(request.param), traces)
    for _, encoder in encoders(made):
        for name, parameter in encoder.named_parameters():
            if name.endswith("final_layer_norm.bias"):
                parameter.data.add_(0.2)
    return made


def encoders(made: Made) -> list[tuple[Any, Any]]:
    """(tokenizer, text encoder), two for SDXL."""
    pipe = made.pipe
    second = [(pipe.tokenizer_2, pipe.text_encoder_2)] if made.name == "sdxl" else []
    return [(pipe.tokenizer, pipe.text_encoder), *second]


def theirs(made: Made, pieces: list[str], weights: list[float], mode: Any = SplitLongTextMode.WORDS) -> np.ndarray:
    """(1,77n,C) as compel embeds weighted pieces, each text encoder with its tokenizer, side by side."""
    kind = ReturnedEmbeddingsType
    states = (
        kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if made.name == "sdxl" else kind.LAST_HIDDEN_STATES_NORMALIZED
    )
    found = []
    for tokenizer, encoder in encoders(made):
        provider = EmbeddingsProvider(
            tokenizer, encoder, truncate=False, returned_embeddings_type=states, split_long_text_mode=mode
        )
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers: a prompt longer than the model
            found.append(provider.get_embeddings_for_weighted_prompt_fragments([pieces], [weights]).numpy())
    return np.concatenate(found, axis=-1)


@pytest.mark.parametrize("prompt", ["", "a red mug on the beach! sks", "snow " * 75], ids=["empty", "short", "full"])
def test_a_prompt_without_weights_is_embedded_as_compel_does(made: Made, prompt: str) -> None:
    ours = made.pipeline.prompts.rows(prompt).text_embeds if prompt else made.pipeline.embed([""]).states
    assert np.abs(ours - theirs(made, [prompt], [1.0])).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "mode"),
    [
        (LONG, SplitLongTextMode.WORDS),
        ("unknownword " * 30, SplitLongTextMode.WORDS),
        (COMMAS, SplitLongTextMode.PHRASES),
    ],
    ids=["words", "words of many tokens", "commas"],
)
def test_a_long_prompt_is_embedded_as_compel_does(made: Made, prompt: str, mode: Any) -> None:
    ours, expected = made.pipeline.rows(prompt).text_embeds, theirs(made, [prompt], [1.0], mode)
    assert ours.shape == expected.shape and ours.shape[1] >= 154
    assert np.abs(ours - expected).max() <= TOLERANCE


def test_pooled_text_is_that_of_the_first_chunk(made: Made) -> None:
    """What diffusers and compel give the pooled text for: the prompt cut at 75 tokens."""
    told = made.pipeline.rows(LONG).conditioning
    if made.name != "sdxl":
        assert "text_embeds" not in told
        return
    with torch.no_grad():
        expected = EmbeddingsProvider(*encoders(made)[1]).get_pooled_embeddings([LONG]).numpy()
    assert np.abs(told["text_embeds"] - expected).max() <= TOLERANCE


@pytest.mark.parametrize("weight", [0.5, 0.9, 1.1, 1.3, 1.6])
def test_weights_follow_a1111s_formula_and_point_where_compels_do(made: Made, weight: float) -> None:
    ours = made.pipeline.rows(f"a photo of a (red mug:{weight}) on the beach").text_embeds
    plain = theirs(made, ["a photo of a red mug on the beach"], [1.0])
    weights = np.ones(77)
    weights[5:7] = weight
    width = made.pipe.text_encoder.config.hidden_size
    expected = np.concatenate(
        [a1111(part, weights) for part in np.split(plain[0], [width], axis=1) if part.size], axis=1
    )
    assert np.abs(ours[0] - expected).max() <= TOLERANCE
    compels = theirs(made, ["a photo of a", "red mug", "on the beach"], [1.0, weight, 1.0])
    assert cosine(ours, compels) >= 0.98


@pytest.mark.parametrize("negative", ["", "a blue forest"])
def test_pictures_of_long_prompts_equal_diffusers_with_compels_embeddings(made: Made, negative: str) -> None:
    noise = start_noise(3, (4, 8, 12))
    ours = made.pipeline.image(LONG, negative_prompt=negative, steps=3, guidance=4.0, noise=noise)
    embeds, blank = (torch.from_numpy(theirs(made, [text], [1.0])) for text in (LONG, ""))
    other = torch.cat(
        [torch.from_numpy(theirs(made, [negative], [1.0])), *[blank] * (embeds.shape[1] // 77 - 1)], dim=1
    )
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": other}
    if made.name == "sdxl":
        pooled = [torch.from_numpy(made.pipeline.rows(text).conditioning["text_embeds"]) for text in (LONG, negative)]
        given |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
        if not negative:  # SDXL's prompt that was not given is zeros, of every length
            given["negative_prompt_embeds"] = torch.zeros_like(embeds)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 16, "width": 24, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = made.pipe(**given, **settings, latents=torch.from_numpy(noise)[None]).images[0]
    assert np.abs(ours / 255 - drawn).max() <= 1.01 / 255
