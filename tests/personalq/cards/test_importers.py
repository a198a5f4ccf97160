"""Importers: each kind is recognised, each bad source is refused with one line, garbage never crashes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from personalq.cards.importers import read_source
from personalq.cards.readme import read_readme, trigger_from_prompt
from personalq.errors import PersonalQError, RepositoryError
from personalq.weights.header import read_header
from tests.personalq import toy_checkpoints as make


def test_a_lora_with_a_card_is_read_as_the_card_says(tmp_path: Path) -> None:
    source = read_source(make.lora(tmp_path / "my-lora"))
    assert (source.card.id, source.card.kind, source.card.base, source.card.trigger) == (
        "my-lora",
        "lora",
        "toy",
        ("sks",),
    )
    assert source.card.provenance["trigger"].source == "card.json"


def test_learned_embeddings_give_their_token_and_the_readme_gives_the_rest(tmp_path: Path) -> None:
    card = read_source(make.embedding(tmp_path / "cat-toy")).card
    assert (card.kind, card.trigger, card.base) == ("textual_inversion", ("<cat-toy>",), "toy")
    assert card.description == "A toy cat made of cloth and wool."
    assert card.provenance["trigger"].source == "learned embedding key"


def test_a_custom_diffusion_delta_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    assert read_source(make.custom_diffusion(tmp_path / "cat")).card.kind == "custom_diffusion"


def test_a_folder_with_only_a_unet_is_a_dreambooth_checkpoint(tmp_path: Path) -> None:
    folder = make.base(tmp_path / "pipeline")
    (folder / "model_index.json").unlink()
    assert read_source(folder, base="toy").card.kind == "dreambooth"


def test_a_pipeline_without_vae_weights_is_refused(tmp_path: Path) -> None:
    folder = make.base(tmp_path / "pipeline")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        RepositoryError, match=r"must hold vae/\*.safetensors, got none; save it with safe_serialization"
    ):
        read_source(folder)


def test_kohya_metadata_gives_trigger_and_class(tmp_path: Path) -> None:
    file = tmp_path / "rex.safetensors"
    meta = {"ss_dataset_dirs": json.dumps({"10_ohwx dog": {"img_count": 5}}), "ss_base_model_version": "sd_v1"}
    save_file({"lora_unet_x.lora_down.weight": np.zeros((2, 2), np.float32)}, file, metadata=meta)
    card = read_source(file).card
    assert (card.id, card.trigger, card.class_noun, card.base) == ("rex", ("ohwx",), "dog", "sd_v1")
    assert card.provenance["trigger"].confidence == 0.6


@pytest.mark.parametrize("name", ["model.ckpt", "learned_embeds.bin", "x.pt"])
def test_a_pickle_is_refused_and_the_line_says_how_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / name).write_bytes(b"\x80\x04")
    for path in (tmp_path / "p", tmp_path / "p" / name):
        with pytest.raises(
            RepositoryError, match=r"must be safetensors, got a pickle, .* convert it, .*: personalq convert /"
        ):
            read_source(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = make.lora(tmp_path / "x")
    file = folder / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        RepositoryError, match=r"must be a whole safetensors file, got .* it is truncated or damaged, fetch it again"
    ):
        read_source(folder)


@pytest.mark.parametrize(
    ("path", "got"), [("nothing", "got nothing there; check the path"), ("empty", "got none; add a card")]
)
def test_a_source_without_weights_is_refused(tmp_path: Path, path: str, got: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RepositoryError, match=got):
        read_source(tmp_path / path)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"model.layer.weight": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(RepositoryError, match=r"must be a diffusers folder, a LoRA, .* got weights such as"):
        read_source(tmp_path / "w.safetensors")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = make.base(tmp_path / "b")
    (folder / "unet" / "u.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "u-1.safetensors"}}))
    with pytest.raises(RepositoryError, match=r"must list files that are there, got 'u-1.safetensors' missing"):
        read_source(folder)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make.lora(tmp_path / "x")
    (tmp_path / "secret.txt").write_text("s")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(
        RepositoryError, match="must not be a link that leaves its folder; copy it with its content first"
    ):
        read_source(folder)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of sks dog", ("sks", "dog")),
        ("photo of a <new1> cat", ("<new1>", "cat")),
        ("in the style of <s0><s1>", ("<s0><s1>", "")),
        ("TOK", ("TOK", "")),
        ("3D icon", ("3D", "icon")),
        ("claymation", ("claymation", "")),
    ],
)
def test_an_instance_prompt_is_split_into_trigger_and_class(prompt: str, expected: tuple[str, str]) -> None:
    assert trigger_from_prompt(prompt) == expected


@pytest.mark.parametrize(
    ("body", "trigger"),
    [
        ("## Trigger words\nYou should use `ohwx mug` to trigger the image generation.", ["ohwx"]),
        ("It can be used by modifying the `instance_prompt`: **a photo of sks toy**", ["sks"]),
        ("This is the `<tok>` concept taught to Stable Diffusion via Textual Inversion.", ["<tok>"]),
    ],
)
def test_body_phrases_of_training_scripts_give_the_trigger(body: str, trigger: list[str]) -> None:
    assert read_readme(body)["trigger"][0] == trigger


def test_null_instance_prompts_and_dashes_are_no_trigger() -> None:
    assert "trigger" not in read_readme("---\ninstance_prompt: null\nwidget:\n- text: '-'\n---\n")


@settings(deadline=None)
@given(st.text(max_size=400), st.text(max_size=200))
def test_no_readme_crashes(front: str, body: str) -> None:
    read_readme(f"---\n{front}\n---\n{body}")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_header_crashes(tmp_path: Path, data: bytes, length: int) -> None:
    for content in (data, struct.pack("<Q", length) + data):
        file = tmp_path / "x.safetensors"
        file.write_bytes(content)
        try:
            read_header(file)
        except RepositoryError as error:
            assert "\n" not in str(error)


_VALUES = st.recursive(
    st.none() | st.integers(-5, 5) | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "x.lora_A.weight", "__metadata__", "weight_map"]), _VALUES),
    _VALUES,
    st.text(max_size=50),
)
def test_no_source_folder_crashes(tmp_path: Path, header: dict[str, object], card: object, readme: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "README.md").write_text(readme)
    try:
        read_source(tmp_path)
    except PersonalQError as error:
        assert "\n" not in str(error)
