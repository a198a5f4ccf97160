"""Which rows stay FP16, in which order, and where the UNet finds them."""

import numpy as np
import pytest

from personalq.errors import PromptError
from personalq.rows import (
    KeptTokens,
    end_of_prompt,
    find_sequence,
    kept_index,
    kept_positions,
    pack_layers,
    packed_width,
    row_index,
)

EOS = 9
IDS = np.array([8, 1, 2, 3, 4, EOS] + [EOS] * 71, dtype=np.int64)  # BOS, four words, EOS, padding with EOS


def test_layers_lie_one_after_the_other_with_k_before_v() -> None:
    layers = pack_layers([("a", 4), ("b", 8)], {"b": 4})
    assert [(layer.offset, layer.width, layer.rest_bits) for layer in layers] == [(0, 4, 8), (8, 8, 4)]
    assert packed_width(layers) == 24


@pytest.mark.parametrize(
    ("kept", "positions"),
    [
        (KeptTokens(), ()),
        (KeptTokens(trigger=((2, 3),)), (2, 3)),
        (KeptTokens(trigger=((2, 3),), bos=True, class_noun=((4,),), eos=True, pad=True), (2, 3, 0, 4, 5, 6)),
        (KeptTokens(trigger=((2, 3),), bos=True, slots=1), (2,)),
        (KeptTokens(trigger=((7,),), bos=True), (0,)),
        (KeptTokens(trigger=((2,),), class_noun=((2,),)), (2,)),
        (KeptTokens(trigger=((EOS,),)), ()),
        (KeptTokens(everything=True, slots=3), (0, 1, 2)),
    ],
    ids=[
        "nothing asked",
        "trigger",
        "by importance",
        "slots run out",
        "no trigger in it",
        "named twice",
        "after the end",
        "control",
    ],
)
def test_kept_rows_are_chosen_by_importance(kept: KeptTokens, positions: tuple[int, ...]) -> None:
    assert kept_positions(IDS, kept, EOS) == positions


def test_every_occurrence_of_a_trigger_is_kept() -> None:
    ids = np.array([8, 2, 3, 1, 2, 3, EOS, EOS], dtype=np.int64)
    assert kept_positions(ids, KeptTokens(trigger=((2, 3),)), EOS) == (1, 2, 4, 5)


def test_rows_of_every_chunk_are_kept_those_of_the_trigger_first() -> None:
    second = np.array([8, 4, 2, 3, EOS] + [EOS] * 72, dtype=np.int64)
    kept = KeptTokens(trigger=((2, 3),), bos=True, class_noun=((4,),), eos=True, pad=True, slots=12)
    both = np.concatenate([IDS, second])
    assert kept_positions(both, kept, EOS) == (2, 3, 79, 80, 0, 77, 4, 78, 5, 81, 6, 82)
    assert kept_positions(both, kept.model_copy(update={"slots": 3}), EOS) == (2, 3, 79)
    across = np.concatenate([np.array([8] + [1] * 74 + [2, EOS]), np.array([8, 3] + [EOS] * 75)])
    assert kept_positions(across, KeptTokens(trigger=((2, 3),)), EOS) == ()
    assert row_index((2, 79), 154)[[0, 2, 79, 153]].tolist() == [0, 154, 155, 153]


def test_random_rows_are_as_many_and_the_same_each_time() -> None:
    kept = KeptTokens(trigger=((2, 3),), bos=True, random_seed=5)
    first, second = kept_positions(IDS, kept, EOS), kept_positions(IDS, kept, EOS)
    assert first == second and len(set(first)) == 3
    assert first != kept_positions(IDS, kept.model_copy(update={"random_seed": 6}), EOS)


def test_a_prompt_without_end_is_refused() -> None:
    with pytest.raises(PromptError) as error:
        end_of_prompt([8, 1, 2], EOS)
    expected = "prompt: must contain the end token 9, got none; encode it with the bundle's tokenizer"
    assert str(error.value) == expected


def test_an_empty_sequence_is_found_nowhere() -> None:
    assert find_sequence([1, 2, 3], []) == []


def test_indices_lead_each_kept_token_to_its_slot() -> None:
    positions = (4, 0)
    rest, kept = np.arange(77), np.zeros(3, dtype=np.int64)
    slots = kept_index(positions, 3)
    kept[:] = 1000 + rest[slots]
    found = np.concatenate([rest, kept])[row_index(positions)]
    assert slots.tolist() == [4, 0, 0]
    assert found[4] == 1004 and found[0] == 1000
    assert (np.delete(found, [0, 4]) == np.delete(rest, [0, 4])).all()
