"""Every word that a kind goes by is read, and the card says how; what is no checkpoint here is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalq.cards.card import read_card
from personalq.cards.catalogues import read_cards
from personalq.cards.kinds import KIND_OF, KINDS, UNSUPPORTED, kind_note, known_kind
from personalq.errors import CardError
from tests.personalq.cards.test_catalogues import CIVITAI

MEANT = [
    ("full_finetune", "dreambooth"),
    ("full-finetune", "dreambooth"),
    ("Full Fine-Tune", "dreambooth"),
    ("Checkpoint", "dreambooth"),
    ("finetune", "dreambooth"),
    ("fine-tuned", "dreambooth"),
    ("LyCORIS", "lora"),
    ("LoHa", "lora"),
    ("LoKr", "lora"),
    ("LoCon", "lora"),
    ("DoRA", "lora"),
    ("pivotal", "lora"),
    ("embedding", "textual_inversion"),
    ("ti", "textual_inversion"),
    ("TextualInversion", "textual_inversion"),
    ("custom-diffusion", "custom_diffusion"),
]


@pytest.mark.parametrize(("word", "kind"), MEANT, ids=[word for word, _ in MEANT])
def test_a_word_for_a_kind_is_read_as_what_it_means_and_said(word: str, kind: str) -> None:
    card, warnings = read_card({"id": "a", "kind": word, "trigger": ["sks"]}, where="w")
    assert card.kind == kind
    assert warnings == (f"kind {word!r} was read as {kind}",)


@pytest.mark.parametrize("kind", [*KINDS, "LoRA", "DREAMBOOTH"])
def test_a_kind_in_its_own_letters_needs_no_word(kind: str) -> None:
    assert read_card({"id": "a", "kind": kind, "trigger": ["sks"]}, where="w")[1] == ()


@pytest.mark.parametrize("word", ["hypernetwork", "Hypernetwork", "ControlNet", "VAE", "Aesthetic Gradient"])
def test_what_is_no_checkpoint_here_is_refused_by_its_name(word: str) -> None:
    with pytest.raises(CardError, match=f"w: kind '{word}' is not supported; must be one of dreambooth, lora,"):
        read_card({"id": "a", "kind": word}, where="w")


@pytest.mark.parametrize(("said", "got"), [("gan", "'gan'"), (None, "none"), ({"a": 1}, "none"), (7, "'7'")])
def test_a_kind_that_nobody_knows_is_refused(said: object, got: str) -> None:
    with pytest.raises(CardError, match=f"w: kind must be one of {', '.join(KINDS)}, got {got}; fix the card"):
        read_card({"id": "a", "kind": said}, where="w")


def test_no_word_is_both_known_and_unsupported() -> None:
    assert not UNSUPPORTED & KIND_OF.keys() and {known_kind(kind) for kind in KINDS} == set(KINDS)


@pytest.mark.parametrize(
    ("said", "note"),
    [
        ("lora", ""),
        ("LoRA", ""),
        ("LoHa", "kind 'LoHa' was read as lora"),
        ("checkpoint", "the card says 'checkpoint'; the weights are lora, and they decide"),
        ("Hypernetwork", "the card says 'Hypernetwork', which is not supported; the weights are lora, and they decide"),
        ("gan", "the card says 'gan', a kind that is not known here; the weights are lora, and they decide"),
        (7, "the card says '7', a kind that is not known here; the weights are lora, and they decide"),
    ],
)
def test_weights_decide_the_kind_and_a_warning_says_what_the_card_said(said: object, note: str) -> None:
    assert kind_note(said, "lora") == note


def test_civitais_own_types_are_silent_and_others_are_said_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "models.jsonl"
    types = ["LORA", "Checkpoint", "LoHa", "Hypernetwork"]
    model = {**CIVITAI, "modelVersions": [{"id": 1, "name": "v1", "trainedWords": ["kanbe"]}]}
    file.write_text("\n".join(json.dumps({**model, "id": i, "type": kind}) for i, kind in enumerate(types)))
    silent, whole, said, refused = read_cards(file)
    assert not isinstance(silent, CardError) and (silent.card.kind, silent.warnings) == ("lora", ())
    assert not isinstance(whole, CardError) and (whole.card.kind, whole.warnings) == ("dreambooth", ())
    assert not isinstance(said, CardError) and said.warnings == ("kind 'LoHa' was read as lora",)
    assert str(refused).startswith(f"{file}:4: kind 'Hypernetwork' is not supported")
