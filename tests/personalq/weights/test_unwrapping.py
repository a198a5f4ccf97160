"""Weights are found in the structures that trainers write, what lies beside them is named, anything else is refused."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from personalq.errors import RepositoryError
from personalq.weights.unwrapping import TOKENS, unwrapped


class Tensor:
    """Stands for a tensor."""


class Parameters:
    """As torch's ParameterDict keeps its tensors."""

    def __init__(self, **tensors: Tensor) -> None:
        self._parameters = {"*": tensors["star"]}


A, B = Tensor(), Tensor()


def read(content: object) -> Any:
    return unwrapped(content, lambda value: isinstance(value, Tensor))


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "module", "model", "params_ema", "params"])
def test_known_wrappers_are_taken_off(wrapper: str) -> None:
    found = read(
        {wrapper: OrderedDict(a=A, b=B), "epoch": 3, "version": "1.4", "optimizer_states": [{"x": B}], "n": None}
    )
    assert found.parts == {"": {"a": A, "b": B}}
    assert found.metadata == {"epoch": "3", "version": "1.4"}
    assert found.left_out == ("'optimizer_states' (list of 1)",)


def test_of_two_wrappers_the_other_is_named() -> None:
    found = read({"state_dict": {"a": A}, "params_ema": {"a": B}})
    assert found.parts == {"": {"a": A}} and found.left_out == ("'params_ema' (dict of 1)",)


def test_plain_tensors_by_name_stay_as_they_are() -> None:
    found = read({"<tok>": A, "unet.x.lora_A.weight": B, "note": "mine", "extra": {"a": 1}, "empty": {}})
    assert found.parts == {"": {"<tok>": A, "unet.x.lora_A.weight": B}}
    assert (found.metadata, found.left_out) == ({"note": "mine"}, ("'extra' (dict of 1)",))


@pytest.mark.parametrize("params", [{"*": A}, Parameters(star=A)], ids=["dict", "ParameterDict"])
def test_an_a1111_embedding_is_its_vectors_and_its_notes_are_kept(params: object) -> None:
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": params,
        "name": "cat",
        "step": 99,
        "sd_checkpoint": None,
    }
    found = read(content)
    assert found.parts == {"": {"emb_params": A}}
    assert found.metadata == {"name": "cat", "step": "99"}
    assert found.left_out == ("'string_to_token' (dict of 1)",)


def test_a_token_that_an_embedding_names_is_kept() -> None:
    assert read({"string_to_param": {"<cat>": A}}).parts == {"": {"<cat>": A}}


def test_a_custom_diffusion_delta_becomes_its_weights_and_its_tokens() -> None:
    found = read({"unet": {"attn2.to_k.weight": A}, "modifier_token": {"<new1>": B}})
    assert found.parts == {"": {"attn2.to_k.weight": A}, TOKENS: {"<new1>": B}}
    assert read({"unet": {"attn2.to_k.weight": A}, "modifier_token": {}}).parts.keys() == {""}


def endless() -> dict[str, Any]:
    inner: dict[str, Any] = {"a": 1}
    inner["self"] = [inner]
    return inner


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (A, "got one tensor without a name"),
        ([A], "got list of 1"),
        (None, "got NoneType"),
        ({}, "got no tensor"),
        ({"epoch": 3}, "got no tensor"),
        (endless(), "got no tensor"),
        ({768: A}, "got one named 768; such weights are not known"),
        ({"unet": {"w": A}, "text_encoder": {"w": B}}, "got tensors inside 'unet', 'text_encoder'"),
        ({"a": A, "more": [{"b": B}]}, "got tensors inside 'more'; such weights are not known"),
        ({"state_dict": {"unet": {"w": A}}}, "got tensors inside 'unet'"),
        ({"string_to_param": {"*": 5}}, "must hold vectors in 'string_to_param', got dict of 1"),
        ({"string_to_param": None}, "must hold vectors in 'string_to_param', got NoneType"),
    ],
)
def test_structures_that_nobody_knows_are_refused(content: object, got: str) -> None:
    with pytest.raises(RepositoryError, match="must hold ") as caught:
        read(content)
    assert got in str(caught.value) and "\n" not in str(caught.value)
