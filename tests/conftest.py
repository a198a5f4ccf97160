"""Shared fixtures: a tiny random Stable-Diffusion pipeline, and a skip that names what is missing."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never downloads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# Files of minutes come first, in this order: a worker that got one last would end alone, and the second, which traces, is
# what the ones after it wait for.
LONG = (
    "tests/test_path.py",
    "tests/exporters/graphs/test_families.py",
    "tests/runtime/serving/test_on_ray.py",
    "tests/fleet/",
)
WORDS = ("a", "photo", "of", "dog", "cat", "mug", "red", "blue", "beach", "forest", "sks", "zwx", "in", "the", "style")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, begin in enumerate(LONG) if item.nodeid.startswith(begin)), len(LONG))

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell .ci/run what was skipped. pytest-xdist's workers have no terminal, so it is called once a run."""
    if file := os.environ.get("PERSONALQ_SKIPS"):
        from tests.skips import record

        record(terminalreporter.stats, Path(file))


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where a Chromium is; skips without one, and fails in CI."""
    from tests.browser import require_browser

    return require_browser()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionPipeline with random weights (seed 0), FP32: 8x8 latents, text 32 wide, 4 attentions.

    Every test shares the folder: copy it before changing it.
    """
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The families that this run traced, for tests that are not about tracing."""
    from tests.repositories import shared_traces

    return shared_traces(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, traces: Path):
    """(repository, {'fp32': ExportResult, 'taq': ExportResult}) of checkpoint 'rex'."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint
    from tests.repositories import tiny_repository

    repository = tiny_repository(tmp_path_factory.mktemp("repo"), tiny_base, tiny_pipeline(), traces)
    results = {}
    for policy in ("fp32", "taq"):
        spec = calibrate(repository, "rex", CalibrateOptions(policy=policy, samples=2, steps=3))
        results[policy] = export_checkpoint(repository, "rex", spec.spec_path)
    return repository, results


def tiny_pipeline(seed: int = 0) -> Any:
    """A StableDiffusionPipeline in memory: UNet (32, 64) with two blocks, CLIP text model 32 wide, VAE (8, 16)."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'personalq[export]'")
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,  # the number of heads, in spite of its name
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_text_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def tiny_tokenizer() -> Any:
    """A real CLIP tokenizer in which each of WORDS is one token; other words fall to characters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        _learn(word, merges)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _learn(word: str, merges: list[tuple[str, str]]) -> None:
    """Add the merges that make `word` one token, after those that earlier words force on it (lowest rank first)."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        known = [pair for pair in merges if pair in pairs]
        if not known:
            merges.append(pairs[0])
        i = pairs.index(known[0] if known else pairs[0])
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
