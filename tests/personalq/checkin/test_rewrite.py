"""The prompt of a checkpoint that was named: its trigger where the concept is mentioned, once."""

import pytest

from personalq.cards.card import Card
from personalq.checkin.rewrite import plain_request, prompt_for


def test_a_card_that_is_already_chosen_gets_its_trigger_written_in() -> None:
    card = Card(
        id="biscuit",
        name="Biscuit",
        kind="lora",
        base="toy",
        trigger=("sks",),
        class_noun="dog",
        description="My brown dog with a red collar.",
    )
    assert prompt_for("my brown dog on the beach", card) == "a photo of sks dog on the beach"
    assert prompt_for("a photo of sks dog on the beach", card) == "a photo of sks dog on the beach"


def test_what_a_thing_turns_into_is_said_once() -> None:
    card = Card(
        id="blue", name="Blueprint look", kind="lora", base="toy", trigger=("bnha style",), class_noun="style",
        tags=("blueprint",),
    )  # fmt: skip
    assert prompt_for("turn the street into a blueprint", card) == "the street in bnha style"
    assert prompt_for("a castle drawn as a blueprint", card) == "a castle in bnha style"


@pytest.mark.parametrize(
    ("request_", "changes", "prompt"),
    [
        ("my (dog:1.3) on the beach", {}, "a photo of sks dog, my (dog:1.3) on the beach"),
        ("a (SKS:1.3) dog BREAK a beach", {}, "a (SKS:1.3) dog BREAK a beach"),
        ("sks dog <lora:biscuit:1>", {}, "sks dog <lora:biscuit:1>"),
        ("a cat <lora:sks:1>", {}, "a photo of sks dog, a cat <lora:sks:1>"),
        ("a (fox:1.2)", {"class_noun": "style", "trigger": ["CNSTLL"]}, "in the style of CNSTLL, a (fox:1.2)"),
        (r"miku \(vocaloid\) sings", {"trigger": ["miku (vocaloid)"]}, r"miku \(vocaloid\) sings"),
        ("a (fox:1.2)", {"trigger": []}, "a (fox:1.2)"),
        ("my dog (the brown one)", {}, "a photo of sks dog (the brown one)"),
    ],
    ids=[
        "concept first",
        "trigger is there",
        "tag",
        "a tag is no trigger",
        "style",
        "escaped",
        "no trigger",
        "an aside",
    ],
)
def test_a_prompt_with_marks_stays_as_it_was_written(request_: str, changes: dict[str, object], prompt: str) -> None:
    card = Card.model_validate({"id": "a", "kind": "lora", "trigger": ["sks"], "class_noun": "dog", **changes})
    assert prompt_for(request_, card) == prompt


def test_marks_are_no_words_of_a_request() -> None:
    assert plain_request("my (dog:1.3) <lora:red_cat_v2:0.8> BREAK on a beach").split() == [
        "my",
        "dog",
        "on",
        "a",
        "beach",
    ]
    assert plain_request("my dog (the brown one)") == "my dog (the brown one)"
