"""Calibration compares the reader's weights with diffusers' own loaders, and the spec says what came of it."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.model.independent import checked_against
from calibration.model.pipeline import load_pipeline
from personalq.errors import RepositoryError
from personalq.repository import Repository
from personalq.weights.deltas.edits import LowRank
from tests.personalq.weights.test_deltas import LORAS, load, make_lora, processors

TOOL = f"diffusers {version('diffusers')}"
MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(base: Path, folder: Path) -> None:
    make_lora(base, folder, **LORAS["convolutions, alpha by module"])


def dora(base: Path, folder: Path) -> None:
    make_lora(base, folder, **LORAS["DoRA, convolutions too"])


def embedding(base: Path, folder: Path) -> None:
    save_file({"<dog>": torch.randn(2, 32)}, folder / "learned_embeds.safetensors")


def fine_tune(base: Path, folder: Path) -> None:
    pipe = load(base)
    pipe.unet.conv_in.weight.data.add_(0.1)
    pipe.unet.save_pretrained(folder / "unet")


def custom_diffusion(base: Path, folder: Path) -> None:
    trained = processors(base, with_q_and_out=False).unet
    trained.save_attn_procs(folder)
    file = folder / "pytorch_custom_diffusion_weights.safetensors"
    untouched = {name: torch.empty(0) for name in trained.attn_processors if "attn1" in name}
    save_file(load_file(file) | untouched, file)
    save_file({"<dog>": torch.randn(1, 32)}, folder / "<dog>.safetensors")


def kohya(base: Path, folder: Path, **more: Any) -> None:
    """A LoRA of one layer as kohya-ss writes it, and more of its tensors."""
    halves = {"lora_down.weight": torch.randn(4, 64), "lora_up.weight": torch.randn(64, 4), "alpha": torch.tensor(2.0)}
    save_file({f"{MODULE}.{end}": value for end, value in (halves | more).items()}, folder / "kohya.safetensors")


@pytest.fixture
def repository(tiny_base: Path, tmp_path: Path) -> Repository:
    shutil.copytree(tiny_base, tmp_path / "repo" / "bases" / "tiny")
    return Repository.open(tmp_path / "repo")


def written(repository: Repository, kind: str, write: Callable[[Path, Path], None]) -> Any:
    """The card of a new checkpoint 'one' whose files `write` made."""
    torch.manual_seed(1)
    folder = repository.root / "checkpoints" / "one"
    folder.mkdir(parents=True)
    write(repository.root / "bases" / "tiny", folder)
    card = {"id": "one", "kind": kind, "base": "tiny", "trigger": ["<dog>"], "class_noun": "dog"}
    (folder / "card.json").write_text(json.dumps(card))
    return Repository.open(repository.root).card("one")


KINDS = {
    "lora": lora,
    "lora, DoRA": dora,
    "lora, kohya": kohya,
    "textual_inversion": embedding,
    "custom_diffusion": custom_diffusion,
    "dreambooth": fine_tune,
}


@pytest.mark.parametrize(("name", "write"), KINDS.items(), ids=KINDS)
def test_diffusers_loads_the_weights_that_the_reader_gives(
    repository: Repository, name: str, write: Callable[[Path, Path], None]
) -> None:
    card = written(repository, name.partition(",")[0], write)
    assert checked_against(repository, card) == TOOL


def test_a_reader_that_merges_something_else_is_told_by_the_layer(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = written(repository, "lora", kohya)
    monkeypatch.setattr(LowRank, "apply", lambda self, base: base + 0.5)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert checked_against(repository, card).startswith(f"differs from {TOOL}: {layer} by ")


def test_what_diffusers_drops_is_not_compared_with_it(repository: Repository) -> None:
    card = written(repository, "lora", lambda base, folder: kohya(base, folder, dora_scale=torch.ones(64, 1)))
    key = f"{MODULE}.dora_scale"
    assert checked_against(repository, card) == f"not checked: {TOOL} drops the lengths of this DoRA ({key})"


def test_names_that_diffusers_passes_over_are_not_compared_with_it(repository: Repository) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

    def without_component(base: Path, folder: Path) -> None:
        halves = {f"{name}.lora_A.weight": torch.randn(4, 64), f"{name}.lora_B.weight": torch.randn(64, 4)}
        save_file(halves, folder / "lora.safetensors")

    card = written(repository, "lora", without_component)
    said = f"not checked: {TOOL} passes over some names of this LoRA ({name}.lora_A.weight)"
    assert checked_against(repository, card) == said


def test_what_diffusers_cannot_load_is_said_in_one_line(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("to_k\nof nothing")

    card = written(repository, "lora", kohya)
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", fails)
    said = checked_against(repository, card)
    assert said == f"not checked: {TOOL} does not load it (KeyError: 'to_k\\nof nothing')"


def test_what_our_own_reader_fails_at_is_not_said_of_diffusers(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("of ours")

    card = written(repository, "lora", kohya)
    monkeypatch.setattr("calibration.model.independent.read_settings", fails)
    with pytest.raises(ValueError, match="of ours"):
        checked_against(repository, card)


def test_a_base_is_compared_as_it_is(repository: Repository) -> None:
    base = repository.whole("tiny").card
    assert checked_against(repository, base) == TOOL
    folder = repository.root / "bases" / "tiny" / "unet"
    file = folder / "diffusion_pytorch_model.safetensors"
    assert load_pipeline(repository, base).unet.conv_in.weight.equal(load_file(file)["conv_in.weight"])


def test_the_spec_says_what_its_reference_was_checked_against(repository: Repository) -> None:
    written(repository, "textual_inversion", embedding)
    made = calibrate(Repository.open(repository.root), "one", CalibrateOptions(policy="fp32"))
    assert made.checked_against == TOOL
    assert made.spec_file.spec.provenance.reference == {"checked_against": TOOL}
    again = calibrate(Repository.open(repository.root), "one", CalibrateOptions(policy="fp16"))
    assert again.checked_against == TOOL  # from the reference, which is not made twice


def test_a_library_that_fails_is_one_line(repository: Repository) -> None:
    card = written(repository, "lora", kohya)
    config = repository.root / "bases" / "tiny" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_num_groups": 5}))  # of 32 channels
    with pytest.raises(
        RepositoryError, match=r"one: must load into the models of its base's configs, got \w+: "
    ) as one:
        load_pipeline(repository, card)
    assert "\n" not in str(one.value)
