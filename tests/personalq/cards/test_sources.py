"""One checkpoint or many: what a folder that somebody names to `add` holds, and that each thing in it is reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from personalq.cards.sources import checkpoints_in
from personalq.repository import Repository
from tests.personalq import toy_checkpoints as make

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    opened = Repository.open(tmp_path / "repo", create=True)
    opened.add_base(make.base(tmp_path / "toy"))
    return opened


def lora(folder: Path, name: str, value: float) -> Path:
    """One LoRA file for the toy base, with values of its own."""
    file = make.lora(folder / f"of-{name}", with_card=False) / LORA
    tensors = {key: np.full(tensor.shape, value, np.float32) for key, tensor in load_file(file).items()}
    file.unlink()
    file.parent.rmdir()
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def kohya(file: Path, target: Path) -> None:
    """The same LoRA as kohya-ss spells it."""
    layer = make.LAYER.replace(".", "_")
    spelt = {"lora_A": f"lora_unet_{layer}_to_k.lora_down.weight", "lora_B": f"lora_unet_{layer}_to_k.lora_up.weight"}
    tensors = {spelt[next(half for half in spelt if half in key)]: value for key, value in load_file(file).items()}
    save_file(tensors | {f"lora_unet_{layer}_to_k.alpha": np.full((), 2, np.float32)}, target)


def names(path: Path) -> list[str]:
    return [part.relative_to(path).as_posix() for part in checkpoints_in(path)]


def test_a_folder_of_many_loras_is_many_checkpoints(repository: Repository, tmp_path: Path) -> None:
    many = tmp_path / "loras"
    many.mkdir()
    for number, name in enumerate(("ann", "bob", "cid")):
        lora(many, name, number + 1)
    (many / "ann.json").write_text(json.dumps({"activation text": "ann person", "sd version": "SD1"}))
    result = repository.add_all(many, base="toy")
    assert [one.id for one in result.added] == ["ann", "bob", "cid"] and not result.refused
    assert result.added[0].trigger == ("ann person",)
    assert repository.check() == []


def test_two_spellings_of_one_lora_are_one(repository: Repository, tmp_path: Path) -> None:
    folder = make.lora(tmp_path / "dog")
    kohya(folder / LORA, folder / "dog.safetensors")
    assert checkpoints_in(folder) == [folder]
    (added,) = repository.add_all(folder).added
    assert added.warnings == ("left out dog.safetensors: the same LoRA in another spelling",)
    kept = sorted(file.name for file in repository.checkpoint_dir("dog").glob("*.safetensors"))
    assert kept == [LORA]


def test_two_different_loras_without_a_card_are_two(tmp_path: Path) -> None:
    lora(tmp_path, "ann", 1)
    lora(tmp_path, "bob", 2)
    assert names(tmp_path) == ["ann.safetensors", "bob.safetensors"]


def test_training_state_beside_a_lora_is_left_out(repository: Repository, tmp_path: Path) -> None:
    folder = make.lora(tmp_path / "dog")
    state = make.lora(folder / "checkpoint-500", with_card=False)
    (state / "optimizer.bin").write_bytes(b"\x80")
    assert checkpoints_in(folder) == [folder]
    (added,) = repository.add_all(folder).added
    assert added.warnings == ("left out checkpoint-500/: training state",)
    assert not (repository.checkpoint_dir("dog") / "checkpoint-500").exists()


def test_an_embedding_of_pivotal_tuning_goes_with_its_lora(repository: Repository, tmp_path: Path) -> None:
    many = tmp_path / "loras"
    many.mkdir()
    lora(many, "ann", 1)
    lora(many, "bob", 2)
    save_file({"clip_l": np.ones((2, 6), np.float32)}, many / "ann_emb.safetensors")
    assert names(many) == ["ann.safetensors", "bob.safetensors"]
    result = repository.add_all(many, base="toy")
    assert not result.refused
    assert result.added[0].trigger == ("<s0><s1>",)
    kept = sorted(file.name for file in repository.checkpoint_dir("ann").glob("*.safetensors"))
    assert kept == ["ann.safetensors", "ann_emb.safetensors"]


def test_a_folder_of_folders_is_each_of_them(repository: Repository, tmp_path: Path) -> None:
    many = tmp_path / "all"
    make.lora(many / "dog")
    make.embedding(many / "toy-cat")
    (many / "empty").mkdir()
    assert names(many) == ["dog", "toy-cat"]
    result = repository.add_all(many)
    assert [one.id for one in result.added] == ["dog", "toy-cat"] and not result.refused


def test_each_of_a_mixed_folder_is_reported(repository: Repository, tmp_path: Path) -> None:
    many = tmp_path / "downloads"
    many.mkdir()
    for number in range(3):
        lora(many, f"dog{number}", number + 1)
    (many / "old.ckpt").write_bytes(b"\x80\x04")
    (many / "broken.safetensors").write_bytes(b"\x00" * 20)
    (many / "picture.png").write_bytes(b"PNG")
    seen: list[str] = []
    result = repository.add_all(many, lambda text, fraction=None: seen.append(text), base="toy")
    assert [one.id for one in result.added] == ["dog0", "dog1", "dog2"]
    reasons = {Path(one.source).name: one.reason for one in result.refused}
    assert reasons.keys() == {"old.ckpt", "broken.safetensors"}
    assert "got a pickle" in reasons["old.ckpt"] and "must be a whole safetensors file" in reasons["broken.safetensors"]
    parts = ["broken.safetensors", *(f"dog{number}.safetensors" for number in range(3)), "old.ckpt"]
    assert seen == [f"adding {name}" for name in parts]


def test_a_repository_inside_the_folder_is_not_taken_in_again(repository: Repository, tmp_path: Path) -> None:
    lora(tmp_path, "ann", 1)
    lora(tmp_path, "bob", 2)
    for _ in range(2):
        result = repository.add_all(tmp_path, base="toy", replace=True)
        taken = {one.id for one in result.added}
        assert {"ann", "bob"} <= taken and not result.refused
    assert sorted(card.id for card in repository.cards()) == ["ann", "bob", "toy"]


def test_an_id_is_for_one_checkpoint(repository: Repository, tmp_path: Path) -> None:
    many = tmp_path / "loras"
    many.mkdir()
    lora(many, "ann", 1)
    lora(many, "bob", 2)
    (refused,) = repository.add_all(many, card_id="one").refused
    assert refused.reason.endswith("must be one checkpoint to take an id, got 2; add them without --id")


def test_half_a_checkpoint_as_a_pickle_is_refused(repository: Repository, tmp_path: Path) -> None:
    folder = make.lora(tmp_path / "dog")
    (folder / "learned_embeds.bin").write_bytes(b"\x80\x04")
    (refused,) = repository.add_all(folder).refused
    assert "learned_embeds.bin: must be safetensors, got a pickle" in refused.reason
    (folder / "learned_embeds.bin").rename(folder / "pytorch_lora_weights.bin")
    (added,) = repository.add_all(folder).added
    assert added.warnings == ("left out pytorch_lora_weights.bin: a pickle",)
    pipeline = make.base(tmp_path / "tuned")
    (pipeline / "model_index.json").unlink()
    (pipeline / "text_encoder" / "model.safetensors").unlink()
    (pipeline / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (refused,) = repository.add_all(pipeline, base="toy").refused
    assert "pytorch_model.bin: must be safetensors, got a pickle" in refused.reason


def test_a_trigger_that_the_card_spells_otherwise_is_the_token_of_the_file(
    repository: Repository, tmp_path: Path
) -> None:
    folder = make.embedding(tmp_path / "thing")
    make.write_card(folder, kind="textual_inversion", trigger=["<my-cat>"])
    (added,) = repository.add_all(folder).added
    assert added.trigger == ("<cat-toy>",)
    said = "trigger: the card says '<my-cat>', its files add '<cat-toy>': what they add is the trigger"
    assert said in added.warnings


def test_a_trigger_that_should_be_an_added_token_and_is_not_is_refused(repository: Repository, tmp_path: Path) -> None:
    base = repository.root / "bases" / "toy" / "tokenizer"
    base.mkdir()
    (base / "vocab.json").write_text(json.dumps({"dog</w>": 0, "sks</w>": 1}))
    folder = make.lora(tmp_path / "pivotal")
    make.write_card(folder, trigger=["<s0><s1>"])
    (refused,) = repository.add_all(folder).refused
    assert "trigger '<s0>' must be a token that its files add, got none that they add" in refused.reason
    make.write_card(folder, trigger=["zwxq"])
    (added,) = repository.add_all(folder).added
    assert "trigger 'zwxq' is several tokens to the base's tokenizer: all of them are kept" in added.warnings


def test_an_embedding_for_a1111_is_called_by_its_file(repository: Repository, tmp_path: Path) -> None:
    save_file({"emb_params": np.ones((2, 6), np.float32)}, tmp_path / "my-style.safetensors")
    (added,) = repository.add_all(tmp_path / "my-style.safetensors", base="toy").added
    assert (added.kind, added.trigger) == ("textual_inversion", ("my-style",))
