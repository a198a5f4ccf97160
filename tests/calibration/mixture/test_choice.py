"""Of more than sixteen checkpoints sixteen that differ are taken, the same ones every time."""

import pytest

from calibration.mixture.choice import MOST, thinned
from calibration.mixture.different import difference, different
from personalq.cards.card import Card


def card(id_: str, noun: str, kind: str = "lora", **more: object) -> Card:
    return Card.model_validate({"id": id_, "kind": kind, "base": "tiny", "class_noun": noun, **more})


def test_all_are_taken_where_they_are_few() -> None:
    assert thinned([card("b", "dog"), card("a", "dog")], MOST) == ["a", "b"]


def test_sixteen_of_many_hold_every_kind_and_noun() -> None:
    dogs = [card(f"dog-{i:02}", "dog", trigger=("sks",), tags=("pet",)) for i in range(40)]
    others = [card(f"z-{noun}", noun, trigger=(noun[:3],)) for noun in ("mug", "cat", "car", "house")]
    others += [card("y-style", "style", "textual_inversion"), card("y-bag", "bag", "custom_diffusion")]
    taken = thinned([*dogs, *others], MOST)
    assert len(taken) == MOST
    assert {one.id for one in others} <= set(taken)
    assert taken == thinned([*reversed(others), *dogs], MOST)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [({"x": 1.0}, {"x": 1.0}, 0.0), ({"x": 1.0}, {"y": 1.0}, 1.0), ({"x": 3.0, "y": 1.0}, {"x": 3.0, "z": 1.0}, 0.4)],
    ids=["equal", "nothing in common", "weights 3 of 5 in common"],
)
def test_difference_is_one_minus_the_shared_weight(a, b, expected: float) -> None:
    assert difference(a, b) == pytest.approx(expected)


def test_the_farthest_comes_next() -> None:
    words = {"a": {"x": 1.0}, "b": {"x": 1.0, "y": 1.0}, "c": {"z": 1.0}}
    assert different(words, 2) == ["a", "c"]
    assert different(words, 0) == []
