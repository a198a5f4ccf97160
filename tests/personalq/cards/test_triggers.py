"""Prompt syntax among trained words is no trigger, wherever the words come from; what was taken off a card is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from personalq.cards.card import MAX_LINE, read_card
from personalq.cards.importers import read_source
from personalq.cards.readme import read_readme, trigger_from_prompt
from personalq.cards.sidecars import trigger_groups
from personalq.cards.triggers import meant, without_syntax

WRITTEN = [
    ("<lora:x:1>", ""),
    ("<LORA: my file v2 :0.8>", ""),
    ("<lyco:x:te=1:unet=0.5>", ""),
    ("<hypernet:x:0.7>", ""),
    ("<lora:cut off at its e", ""),
    ("sks dog, <lora:x:1>", "sks dog"),
    ("<lora:x:1> sks dog <lyco:y:1>, red collar", "sks dog, red collar"),
    ("(sks dog:1.2)", "sks dog"),
    ("((sks:1.3) dog:.9), blue", "sks dog, blue"),
    ("((sks dog))", "sks dog"),
    ("(miku \\(singer\\):1.1)", "miku \\(singer\\)"),
]
KEPT = [
    "sks",
    "<sks>",
    "<new1> dog",
    "<lora>",
    "miku (singer)",
    "miku \\(singer\\)",
    "ratio 16:9",
    "a < b",
    "(a) b (c)",
]


@pytest.mark.parametrize(("written", "words"), WRITTEN, ids=[written for written, _ in WRITTEN])
def test_tags_and_weights_are_taken_off_trigger_words(written: str, words: str) -> None:
    assert without_syntax(written) == words


@pytest.mark.parametrize("words", KEPT)
def test_words_that_only_look_like_syntax_stay(words: str) -> None:
    assert without_syntax(words) == words


@settings(deadline=None)
@given(st.text(alphabet="<>lora:(1.2)\\ sk,", max_size=60))
def test_taking_syntax_off_is_stable_and_adds_nothing(text: str) -> None:
    once = without_syntax(text)
    assert without_syntax(once) == once and len(once) <= len(text) + text.count(",")
    assert trigger_groups(trigger_groups(text)) == trigger_groups(text)


def test_a_long_run_of_signs_is_read_at_once() -> None:
    for text in ("(" * MAX_LINE, "<lora:" * 60, "(a:" + "1" * MAX_LINE, " " * 10_000_000 + ",", "(a :" * 90):
        trigger_groups(text)
        without_syntax(text[:MAX_LINE])


def test_a_card_says_what_was_taken_off_its_trigger() -> None:
    groups = ["<lora:x:1>", "(sks dog:1.2)", "plain"]
    card, warnings = read_card({"id": "a", "kind": "lora", "trigger": groups}, where="w")
    assert card.trigger == ("sks dog", "plain")
    assert warnings == (
        "trigger '<lora:x:1>' holds prompt syntax and no words: left out",
        "trigger '(sks dog:1.2)' holds prompt syntax: read as 'sks dog'",
    )


def test_a_card_whose_only_trigger_is_a_tag_has_none() -> None:
    card, warnings = read_card({"id": "a", "kind": "lora", "trigger": "<lora:x:1>"}, where="w")
    assert card.trigger == ()
    assert "no trigger on the card: prompts are used as they are written" in warnings


def test_many_changed_triggers_are_counted() -> None:
    words, notes = meant([f"<lora:{i}:1> w{i}" for i in range(9)])
    assert words == tuple(f"w{i}" for i in range(9)) and len(notes) == 4
    assert notes[-1] == "6 more triggers hold prompt syntax, which was taken off"


def test_two_spellings_of_one_trigger_are_one_group() -> None:
    assert meant(["sks dog", "(sks dog:1.2)", "<lora:x:1> sks dog"])[0] == ("sks dog",)


def lora(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"lora_unet_x.lora_down.weight": np.zeros((2, 2), np.float32)}, folder / "owl.safetensors", metadata)
    return folder / "owl.safetensors"


def test_tags_in_every_sidecar_are_no_trigger(tmp_path: Path) -> None:
    info = {"trainedWords": ["<lora:owl:1>", "(owwl:1.2), <lora:owl:0.8>"], "baseModel": "SD 1.5", "modelId": 1}
    a1111 = {"activation text": "<lora:owl:1>, owwl", "sd version": "SD1"}
    manager = {"model_name": "Owl", "civitai": {"trainedWords": ["<lyco:owl:1> owwl"]}}
    for ending, data in ((".civitai.info", info), (".json", a1111), (".metadata.json", manager)):
        file = lora(tmp_path / ending.strip("."))
        file.with_suffix(ending).write_text(json.dumps(data))
        assert read_source(file).card.trigger == ("owwl",), ending


def test_a_sidecar_of_tags_alone_leaves_the_trigger_to_the_readme(tmp_path: Path) -> None:
    file = lora(tmp_path / "a")
    file.with_suffix(".civitai.info").write_text(json.dumps({"trainedWords": ["<lora:owl:1>"], "modelId": 1}))
    file.with_suffix(".md").write_text("---\ninstance_prompt: a photo of owwl bird <lora:owl:1>\n---\n")
    card = read_source(file).card
    assert (card.trigger, card.class_noun) == (("owwl",), "bird")


def test_a_tag_in_the_header_of_weights_is_no_trigger_and_is_said(tmp_path: Path) -> None:
    read = read_source(lora(tmp_path / "a", {"modelspec.trigger_phrase": "<lora:owl:1> owwl"}))
    assert read.card.trigger == ("owwl",)
    assert "trigger '<lora:owl:1> owwl' holds prompt syntax: read as 'owwl'" in read.warnings


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a photo of sks dog <lora:x:1>", ("sks", "dog")),
        ("<lora:x:1>, a photo of (sks dog:1.2)", ("sks", "dog")),
        ("<lora:x:1>", ("", "")),
    ],
)
def test_an_instance_prompt_is_read_without_its_tags(prompt: str, found: tuple[str, str]) -> None:
    assert trigger_from_prompt(prompt) == found


def test_an_instance_prompt_of_a_tag_alone_gives_no_trigger() -> None:
    assert "trigger" not in read_readme("---\ninstance_prompt: <lora:x:1>\n---\n# x\n")
