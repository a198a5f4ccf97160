"""Pickles are told by their bytes, never opened, and refused with a command that a shell takes as it is."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from personalq.errors import RepositoryError
from personalq.weights.pickles import content_of, lone_pickles, misnamed, pickle_refusal, refuse_pickles, safe_name

PICKLE = b"\x80\x02}q\x00."
SAFE = save({"w": np.zeros(2, np.float32)})
CONTENTS = {
    "safetensors": SAFE,
    "zip": b"PK\x03\x04rest",
    "pickle": PICKLE,
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "html": b"\n<!DOCTYPE html><html>not found</html>",
    "": b"hello",
}


@pytest.mark.parametrize("content", CONTENTS, ids=lambda name: name or "other")
def test_a_file_is_told_by_its_bytes(tmp_path: Path, content: str) -> None:
    (tmp_path / "x").write_bytes(CONTENTS[content])
    assert content_of(tmp_path / "x") == content


def test_a_header_whose_length_looks_like_a_pickle_is_safetensors(tmp_path: Path) -> None:
    head = b'{"__metadata__":{"a":"' + b"x" * 615 + b'"}}'
    head += b" " * (0x0280 - len(head))
    (tmp_path / "x").write_bytes(len(head).to_bytes(8, "little") + head)
    assert (tmp_path / "x").read_bytes()[:2] == b"\x80\x02"
    assert content_of(tmp_path / "x") == "safetensors"


@pytest.mark.parametrize("content", ["pickle", "zip"])
def test_the_refusal_names_a_command_that_a_shell_takes(tmp_path: Path, content: str) -> None:
    file = tmp_path / "my old; dog's.ckpt"
    file.write_bytes(CONTENTS[content])
    text = str(pickle_refusal(file))
    assert text.startswith(
        f"{file}: must be safetensors, got a pickle, which can run code when opened; convert it, which loads its weights "
        "and nothing else: personalq convert "
    )
    assert shlex.split(text.partition("nothing else: ")[2]) == ["personalq", "convert", str(file)]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("safetensors", "got safetensors named .ckpt; rename it: mv 'a b.ckpt' 'a b.safetensors'"),
        ("lfs", "got a Git LFS pointer and not the weights; fetch them with 'git lfs pull'"),
        ("html", "got a web page; fetch it again"),
        ("", "got a file that is neither safetensors nor a pickle; fetch it again"),
    ],
)
def test_what_is_named_like_a_pickle_and_is_none_is_said_to_be_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, got: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a b.ckpt").write_bytes(CONTENTS[content])
    assert str(pickle_refusal(Path("a b.ckpt"))) == f"a b.ckpt: must be safetensors by name and content, {got}"


def test_what_is_named_safetensors_and_is_none_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    said = {}
    for content, data in CONTENTS.items():
        file.write_bytes(data)
        said[content] = str(misnamed(file) or "")
    assert said["safetensors"] == said[""] == ""  # whole or damaged: the header's reader says which
    other = tmp_path / "x.ckpt"
    assert said["pickle"] == (
        f"{file}: must be safetensors by name and content, got a pickle; rename and convert it: "
        f"mv {file} {other} && personalq convert {other}"
    )
    assert "got a zip archive, as torch saves pickles; rename and convert it" in said["zip"]
    assert "got a Git LFS pointer" in said["lfs"] and "got a web page" in said["html"]


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICKLE)
    return [folder / name for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"],
        ["text_encoder/pytorch_model.bin", "text_encoder/model.safetensors"],
        ["unet/d-00001-of-00002.bin", "unet/d-00002-of-00002.bin", "unet/d-00001-of-00001.safetensors"],
        ["a.safetensors", "optimizer.bin", "scheduler.pt", "random_states_0.pkl", "training_args.bin"],
        ["a.safetensors", "safety_checker/pytorch_model.bin"],
    ],
    ids=["variant", "transformers' name", "shards", "a trainer's files", "an unused part"],
)
def test_a_pickle_whose_weights_are_there_as_safetensors_is_no_loss(tmp_path: Path, names: list[str]) -> None:
    assert lone_pickles(touch(tmp_path, *names)) == []


def test_half_a_checkpoint_as_a_pickle_is_found_and_refused_whole(tmp_path: Path) -> None:
    files = touch(tmp_path, "unet/diffusion_pytorch_model.safetensors", "text_encoder/pytorch_model.bin", "<new1>.bin")
    assert lone_pickles(files) == files[1:]
    command = str(pickle_refusal(*lone_pickles(files))).partition("nothing else: ")[2]
    assert shlex.split(command) == ["personalq", "convert", *map(str, files[1:])]
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "delta.safetensors")
    with pytest.raises(RepositoryError, match=r"<new1>.bin: must be safetensors, got a pickle"):
        refuse_pickles(tmp_path)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("x.y.ckpt", "x.y.safetensors"),
        ("learned_embeds.bin", "learned_embeds.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"),
    ],
)
def test_converted_weights_have_the_name_that_readers_look_for(name: str, safe: str) -> None:
    assert safe_name(Path(name)) == safe
