"""The prompt of a checkpoint that was named: its trigger where the concept is mentioned, once."""

from personalq.cards.card import Card
from personalq.checkin.rewrite import prompt_for


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
