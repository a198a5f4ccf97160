"""Every format people keep cards in: what it says arrives, with its source; what is unwanted stays out, with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from personalq.cards.card import parse_card
from personalq.cards.catalogues import read_rows
from personalq.cards.importers import read_source
from personalq.cards.sidecars import plain_text, read_sidecar, trigger_groups
from personalq.errors import CardError, PersonalQError, RepositoryError
from personalq.repository import Repository

CIVITAI = {
    "id": 77,
    "name": "Kanbe",
    "description": "<p>A <b>plush</b> owl.</p><script>alert(1)</script>Use &lt;owl&gt;",
    "type": "LORA",
    "nsfw": False,
    "poi": False,
    "tags": ["owl", "plush"],
    "modelVersions": [
        {"id": 1, "name": "v1", "baseModel": "SD 1.5", "trainedWords": ["kanbe owl,brown feathers,", "kanbe chibi"]},
        {
            "id": 2,
            "name": "v2",
            "baseModel": "SDXL 1.0",
            "trainedWords": [],
            "images": [{"meta": {"prompt": "an owl"}}],
        },
    ],
}


def cards_of(tmp_path: Path, data: Any, name: str = "list.json", **options: bool) -> tuple[list[Any], list[str]]:
    file = tmp_path / name
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    rows = list(read_rows(file, **options))
    cards = [parse_card(row.text, where=row.where)[0] for row in rows if not isinstance(row, CardError)]
    return cards, [str(row) for row in rows if isinstance(row, CardError)]


def test_every_version_of_a_civitai_model_is_a_card_of_its_own(tmp_path: Path) -> None:
    (first, second), left_out = cards_of(tmp_path, CIVITAI)
    assert (first.id, first.kind, first.base, first.name) == ("civitai-77-1", "lora", "SD 1.5", "Kanbe v1")
    assert first.trigger == ("kanbe owl, brown feathers", "kanbe chibi")
    assert first.description == "A plush owl. Use <owl>"
    assert first.provenance["trigger"].confidence == 0.95
    assert (second.base, second.trigger, second.example_prompts) == ("SDXL 1.0", (), ("an owl",))
    assert left_out == []


@pytest.mark.parametrize(
    ("mark", "reason"), [({"nsfw": True}, "adult content (nsfw)"), ({"poi": True}, "a real person (poi)")]
)
def test_adult_content_and_real_persons_stay_out_unless_asked_for(
    tmp_path: Path, mark: dict[str, bool], reason: str
) -> None:
    cards, left_out = cards_of(tmp_path, [{**CIVITAI, **mark}])
    assert cards == []
    assert left_out == [f"{tmp_path / 'list.json'}:1: left out, it is {reason}; take it in with --adult"]
    assert len(cards_of(tmp_path, [{**CIVITAI, **mark}], adult=True)[0]) == 2


def test_stylus_documents_are_read_by_adapter(tmp_path: Path) -> None:
    entry = {"title": "Pixel <i>Owl</i>", "base_model": "SD 1.5", "trigger_words": ["pxowl"], "tags": ["owl"]}
    (card,), _ = cards_of(tmp_path, {"123": {**entry, "adapter_id": 123, "llm_description": "Owls of pixels."}})
    assert (card.id, card.name, card.trigger) == ("stylus-123", "Pixel Owl", ("pxowl",))
    assert card.description == "Owls of pixels."


def test_a_lora_gallery_gives_title_trigger_and_prompts(tmp_path: Path) -> None:
    rows = [{"title": "Owl XL", "repo": "ann/owl", "trigger_word": "owl style", "prompts": ["a cat, owl style"]}]
    (card,), _ = cards_of(tmp_path, rows)
    assert (card.id, card.name, card.trigger, card.source) == ("ann-owl", "Owl XL", ("owl style",), "ann/owl")


def test_custom_concept_lists_give_token_and_class(tmp_path: Path) -> None:
    rows = [{"instance_prompt": "photo of a {} dog", "class_prompt": "dog", "instance_data_dir": "./data/pet_dog1"}]
    (card,), _ = cards_of(tmp_path, rows)
    assert (card.id, card.kind, card.trigger, card.class_noun) == ("pet_dog1", "custom_diffusion", ("<new1>",), "dog")


def test_dreambooth_list_gives_subjects_and_classes_and_skips_the_prompts(tmp_path: Path) -> None:
    text = "Classes\n=======\nsubject_name,class\nbackpack_dog,backpack\ncat2,cat\n\n'a {0} {1} in the jungle'.format(a, b),\n"
    cards, _ = cards_of(tmp_path, text, "prompts_and_classes.txt")
    assert [(card.id, card.class_noun, card.trigger) for card in cards] == [
        ("backpack_dog", "backpack", ()),
        ("cat2", "cat", ()),
    ]


def test_shared_triggers_are_flagged_when_a_list_is_added(tmp_path: Path) -> None:
    file = tmp_path / "cards.jsonl"
    card = {"kind": "lora", "trigger": ["sks"], "class_noun": "dog"}
    file.write_text("\n".join(json.dumps({"id": f"dog{i}", **card}) for i in range(5)))
    result = Repository.open(tmp_path / "r", create=True).add_cards(file)
    assert "trigger shared with dog1, dog2, dog3 and 1 more" in result.added[0].warnings[0]


def lora(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    weights = {"lora_unet_x.lora_down.weight": np.zeros((2, 2), np.float32)}
    save_file(weights, folder / "owl.safetensors", metadata=metadata)
    return folder / "owl.safetensors"


def test_a_civitai_info_beside_the_weights_fills_the_card(tmp_path: Path) -> None:
    file = lora(tmp_path / "a")
    version = {**CIVITAI["modelVersions"][0], "modelId": 77}  # type: ignore[index]
    info = {**version, "model": {"name": "Kanbe", "type": "LORA", "tags": ["owl"], "nsfw": False, "poi": False}}
    file.with_suffix(".civitai.info").write_text(json.dumps(info))
    card = read_source(file).card
    assert (card.kind, card.base, card.trigger[0], card.tags) == (
        "lora",
        "SD 1.5",
        "kanbe owl, brown feathers",
        ("owl",),
    )
    assert card.provenance["trigger"].source == "owl.civitai.info"


def test_weights_that_a_sidecar_marks_as_a_real_person_are_refused_with_the_reason(tmp_path: Path) -> None:
    file = lora(tmp_path / "a")
    file.with_suffix(".civitai.info").write_text(json.dumps({"trainedWords": ["x"], "model": {"poi": True}}))
    with pytest.raises(
        RepositoryError, match=r"owl.civitai.info says it is a real person \(poi\); take it in with --adult"
    ):
        read_source(file)
    assert read_source(file, adult=True).card.trigger == ("x",)


def test_an_a1111_sidecar_is_not_taken_for_our_own_card(tmp_path: Path) -> None:
    file = lora(tmp_path / "a")
    sidecar = {"description": "Owls", "sd version": "SDXL", "activation text": "owl a, owl b || owl c", "notes": ""}
    file.with_suffix(".json").write_text(json.dumps(sidecar))
    card = read_source(file).card
    assert (card.trigger, card.base, card.description) == (("owl a, owl b", "owl c"), "SDXL", "Owls")


def test_lora_manager_metadata_is_read_with_civitais_answer_inside(tmp_path: Path) -> None:
    file = lora(tmp_path / "a")
    data = {
        "model_name": "Owl",
        "base_model": "Pony",
        "modelDescription": "<p>Owls</p>",
        "civitai": {"trainedWords": ["owwl"]},
    }
    file.with_suffix(".metadata.json").write_text(json.dumps(data))
    card = read_source(file).card
    assert (card.name, card.base, card.trigger, card.description) == ("Owl", "Pony", ("owwl",), "Owls")


@pytest.mark.parametrize(
    ("metadata", "trigger", "sure"),
    [
        ({"modelspec.trigger_phrase": "mtp", "ss_trigger_words": "late"}, "mtp", 0.95),
        ({"ss_activation_text": "act"}, "act", 0.85),
        ({"ss_training_comment": "for Ann; trigger words: owlish"}, "owlish", 0.7),
        ({"ss_dataset_dirs": '{"1_owwl bird": {"img_count": 3}}'}, "owwl", 0.6),
    ],
)
def test_kohya_and_modelspec_headers_by_how_sure_they_are(
    tmp_path: Path, metadata: dict[str, str], trigger: str, sure: float
) -> None:
    card = read_source(lora(tmp_path / "a", metadata)).card
    assert (card.trigger, card.provenance["trigger"].confidence) == ((trigger,), sure)


def test_caption_tags_are_never_taken_for_a_trigger(tmp_path: Path) -> None:
    header = {"ss_tag_frequency": json.dumps({"img": {"1girl": 90, "solo": 80}})}
    assert read_source(lora(tmp_path / "a", header)).card.trigger == ()


def test_plain_cross_attention_weights_are_custom_diffusion(tmp_path: Path) -> None:
    (tmp_path / "cd").mkdir()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: np.zeros((4, 4), np.float32)}, tmp_path / "cd" / "delta.safetensors")
    assert read_source(tmp_path / "cd").card.kind == "custom_diffusion"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two</p>", "one two"),
        ("use <sks> here", "use <sks> here"),
        ("a &amp; b &lt;c&gt;", "a & b <c>"),
        ("<style>x{}</style>seen<!-- hidden -->", "seen"),
        ("3 < 4", "3 < 4"),
    ],
)
def test_html_is_stripped_and_tokens_in_angle_brackets_stay(html: str, text: str) -> None:
    assert plain_text(html) == text


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
KEYS = st.sampled_from(
    [
        "modelVersions",
        "trainedWords",
        "adapter_id",
        "trigger_word",
        "instance_prompt",
        "model",
        "civitai",
        "images",
        "description",
        "tags",
        "activation_text",
        "baseModel",
        "id",
        "modelId",
        "nsfw",
        "items",
        "prompts",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, ANY_JSON, max_size=6))
@example({"modelVersions": [None, {"trainedWords": "x", "images": [3]}], "model": []})
def test_no_entry_crashes_an_import_whatever_its_fields_hold(tmp_path: Path, entry: dict[str, Any]) -> None:
    file = tmp_path / "any.json"
    for data in (entry, [entry, entry], {"items": [entry]}):
        file.write_text(json.dumps(data))
        for row in read_rows(file):
            if not isinstance(row, CardError):
                try:
                    parse_card(row.text, where=row.where)
                except PersonalQError as error:
                    assert "\n" not in str(error)
    read_sidecar(entry, where="x")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_stripping_and_grouping_never_fail_and_are_stable(text: str) -> None:
    assert isinstance(plain_text(text), str)
    groups = trigger_groups(text)
    assert trigger_groups(groups) == groups
