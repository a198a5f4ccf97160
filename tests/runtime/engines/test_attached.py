"""Adapters as arrays: what the graphs are fed equals arithmetic on the matrices, stacked, scaled and side by side."""

import numpy as np
import pytest

from personalq.bundle import AdapterInputs, BranchPlace
from personalq.errors import EngineError
from personalq.rows import pack_layers
from personalq.weights.adapter import Adapter, Branch
from runtime.engines.attached import PLAIN, Attached, Worn, attach, side_by_side, without_place

K, N, C = 6, 4, 3
LINEAR, SMALL, LARGE = "attn.to_q", "proj_in", "conv1"
INPUTS = AdapterInputs(
    branches={
        "unet": {
            LINEAR: BranchPlace(op="linear", weight=(N, K)),
            SMALL: BranchPlace(op="conv", weight=(N, C, 1, 1)),
            LARGE: BranchPlace(op="conv", weight=(N, C, 3, 3), is_wide=True),
        },
        "text_encoder": {"q_proj": BranchPlace(op="linear", weight=(K, K))},
    },
    first_added_id=100,
)
X = np.random.default_rng(9).standard_normal((2, 5, K)).astype(np.float32)


def half(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def adapter(seed: int, rank: int, *layers: str) -> Adapter:
    made = {
        LINEAR: Branch(half(seed, K, rank), half(seed + 1, rank, N)),
        SMALL: Branch(half(seed, rank, C, 1, 1), half(seed + 1, N, rank)),
        LARGE: Branch(half(seed, rank, C, 3, 3), half(seed + 1, N, rank)),
    }
    return Adapter({"unet": {layer: made[layer] for layer in layers}})


def product(attached: Attached, layer: str, picture: int = 0) -> np.ndarray:
    """strength (x down) up for one picture's matrices, as the graph computes it."""
    feed = attached.feed(INPUTS, "unet", is_wide=True)
    strength = feed["adapter_strength"][picture if len(feed["adapter_strength"]) > 1 else 0]
    return strength * (X @ feed[f"{layer}.down"][picture] @ feed[f"{layer}.up"][picture])


def test_one_adapter_keeps_its_matrices_and_its_strength_is_the_graphs_input() -> None:
    one = adapter(0, 2, LINEAR)
    attached = attach(INPUTS, [Worn(one, 0.7)])
    feed = attached.feed(INPUTS, "unet")
    assert np.array_equal(feed[f"{LINEAR}.up"][0], one.branches["unet"][LINEAR].up)
    assert feed["adapter_strength"].tolist() == [np.float32(0.7)]
    expected = np.float32(0.7) * X @ one.branches["unet"][LINEAR].change().T
    assert np.allclose(product(attached, LINEAR), expected, atol=1e-5)


def test_several_adapters_stack_with_their_strengths_multiplied_in() -> None:
    one, two = adapter(0, 2, LINEAR), adapter(5, 3, LINEAR, SMALL)
    attached = attach(INPUTS, [Worn(one, 0.5), Worn(two, -1.5)])
    a, b = (x.branches["unet"][LINEAR].change() for x in (one, two))
    assert attached.feed(INPUTS, "unet")[f"{LINEAR}.down"].shape == (1, K, 5)
    assert np.allclose(product(attached, LINEAR), X @ (0.5 * a - 1.5 * b).T, atol=1e-4)


def test_layers_without_a_change_get_matrices_of_rank_0_and_no_wide_ones_unless_they_are_needed() -> None:
    feed = PLAIN.feed(INPUTS, "unet")
    assert feed[f"{LINEAR}.down"].shape == (1, K, 0) and feed[f"{LINEAR}.up"].shape == (1, 0, N)
    assert feed[f"{SMALL}.down"].shape == (1, 0, C) and feed[f"{SMALL}.up"].shape == (1, N, 0)
    assert f"{LARGE}.down" not in feed
    assert not attach(INPUTS, [Worn(adapter(0, 2, LINEAR))]).is_wide
    wide = attach(INPUTS, [Worn(adapter(0, 2, LARGE))])
    assert wide.is_wide and wide.feed(INPUTS, "unet", is_wide=True)[f"{LARGE}.down"].shape == (2, C, 3, 3)


def test_the_text_encoders_have_a_strength_of_their_own() -> None:
    one = Adapter(
        {"text_encoder": {"q_proj": Branch(half(0, K, 2), half(1, 2, K))}}, added={"text_encoder": half(2, 1, K)}
    )
    feed = attach(INPUTS, [Worn(one, 0.8, 0.3)]).feed(INPUTS, "text_encoder", K)
    assert feed["adapter_strength"].tolist() == [np.float32(0.3)]
    assert np.array_equal(feed["added_vectors"], one.added["text_encoder"].astype(np.float32))
    assert PLAIN.feed(INPUTS, "text_encoder", K)["added_vectors"].shape == (1, K)


def test_rows_gain_what_the_changed_projections_make_of_the_text() -> None:
    layers = pack_layers([("mid.attn2", 4), ("up.attn2", 2)])
    embeds = np.random.default_rng(3).standard_normal((2, 7, K)).astype(np.float32)
    low = Branch(half(0, K, 2), half(1, 2, 4))
    one = Adapter({"unet": {"mid.attn2.to_k": low}}, {"up.attn2.to_v": half(4, 2, K)})
    made = attach(INPUTS, [Worn(one, 0.5), Worn(one, 1.0)]).added_rows(embeds, layers)
    expected = np.zeros((2, 7, 12), np.float32)
    expected[:, :, 0:4] = 1.5 * embeds @ low.change().T
    expected[:, :, 10:12] = 1.5 * embeds @ one.changes["up.attn2.to_v"].astype(np.float32).T
    assert np.allclose(made, expected, atol=1e-4)
    assert PLAIN.added_rows(embeds, layers).shape == (1, 1, 12)


def test_pictures_of_one_batch_may_have_an_adapter_each() -> None:
    each = [attach(INPUTS, [Worn(adapter(0, 2, LINEAR), 0.5)]), PLAIN, attach(INPUTS, [Worn(adapter(5, 4, LINEAR))])]
    together = side_by_side(each, INPUTS)
    for picture, alone in enumerate(each):
        assert np.allclose(product(together, LINEAR, picture), product(alone, LINEAR), atol=1e-6)


def test_an_adapter_of_a_large_convolution_shares_no_batch() -> None:
    wide = attach(INPUTS, [Worn(adapter(0, 2, LARGE))])
    with pytest.raises(EngineError, match=r"unet\.conv1: pictures of one batch must share an adapter of it"):
        side_by_side([wide, PLAIN], INPUTS)


def test_a_correction_counts_in_full_whatever_the_strength() -> None:
    one = adapter(0, 2, LINEAR)
    fix = Branch(half(7, K, 1), half(8, 1, N))
    corrected = Adapter(one.branches, correction={LINEAR: fix})
    expected = X @ (0.5 * one.branches["unet"][LINEAR].change() + fix.change()).T
    assert np.allclose(product(attach(INPUTS, [Worn(corrected, 0.5)]), LINEAR), expected, atol=1e-4)


@pytest.mark.parametrize("rank", [5, 16])
def test_matrices_filled_up_with_zeros_are_the_same_change(rank: int) -> None:
    """For a graph of one rank: as many adapters as pictures, of 1x1 convolutions too."""
    one = adapter(0, 5, LINEAR, SMALL)
    attached = attach(INPUTS, [Worn(one, 0.5)])
    feed = attached.padded(INPUTS, rank, batch=2, dtype=np.float32)
    assert attached.rank(INPUTS) == 5 and feed["adapter_strength"].tolist() == [0.5, 0.5]
    assert feed[f"{LINEAR}.down"].shape == (2, K, rank) and feed[f"{LINEAR}.up"].shape == (2, rank, N)
    assert feed[f"{SMALL}.down"].shape == (2, rank, C) and feed[f"{SMALL}.up"].shape == (2, N, rank)
    assert not any(name.startswith(LARGE) for name in feed)
    change = {layer: branch.change() for layer, branch in one.branches["unet"].items()}
    for picture in range(2):
        linear = (feed[f"{LINEAR}.down"][picture] @ feed[f"{LINEAR}.up"][picture]).T
        small = feed[f"{SMALL}.up"][picture] @ feed[f"{SMALL}.down"][picture]
        assert np.allclose(linear, change[LINEAR], atol=1e-5)
        assert np.allclose(small, change[SMALL][:, :, 0, 0], atol=1e-5)


def test_float16_matrices_come_as_they_are_in_the_adapter() -> None:
    one = adapter(0, 2, LINEAR)
    feed = attach(INPUTS, [Worn(one, 0.5)]).padded(INPUTS, 16, batch=1)
    assert {value.dtype for value in feed.values()} == {np.dtype(np.float16)}
    assert np.array_equal(feed[f"{LINEAR}.down"][0, :, :2], one.branches["unet"][LINEAR].down)
    assert not feed[f"{LINEAR}.down"][:, :, 2:].any() and not feed[f"{LINEAR}.up"][:, 2:].any()
    assert not any(value.any() for name, value in PLAIN.padded(INPUTS, 16, 2).items() if name != "adapter_strength")


def test_each_picture_keeps_its_adapter_when_they_are_filled_up() -> None:
    each = [attach(INPUTS, [Worn(adapter(seed, rank, LINEAR))]) for seed, rank in ((0, 2), (5, 4))]
    together = side_by_side(each, INPUTS)
    assert together.rank(INPUTS) == 4 and PLAIN.rank(INPUTS) == 0
    feed = together.padded(INPUTS, 16, batch=2, dtype=np.float32)
    for picture, one in enumerate(each):
        found = X @ feed[f"{LINEAR}.down"][picture] @ feed[f"{LINEAR}.up"][picture]
        assert np.allclose(found, product(one, LINEAR), atol=1e-4)
    with pytest.raises(
        EngineError, match=r"unet\.adapter_strength: adapters must be one, or one for each of 3 rows, got 2"
    ):
        together.padded(INPUTS, 16, batch=3)


def test_a_value_beyond_float16_is_refused_in_one_line() -> None:
    large = Adapter({"unet": {LINEAR: Branch(half(0, K, 1), np.full((1, N), 60000, np.float16))}})
    attached = attach(INPUTS, [Worn(large, 2.0), Worn(adapter(0, 1, LINEAR), 1.0)])
    with pytest.raises(EngineError) as error:
        attached.padded(INPUTS, 16, batch=1)
    assert str(error.value) == f"unet.{LINEAR}.up: must fit float16, got 1.2e+05; lower the strength"


def test_text_encoder_layers_that_the_graph_lacks_are_left_out() -> None:
    pair = Branch(half(0, K, 2), half(1, 2, K))
    one = Adapter(
        {"text_encoder": {"q_proj": pair, "last.fc1": pair, "last.fc2": pair}, "text_encoder_2": {"fc": pair}}
    )
    assert without_place(INPUTS, one) == ["text_encoder.last.fc1", "text_encoder.last.fc2", "text_encoder_2.fc"]
    kept = attach(INPUTS, [Worn(one, 0.7)])
    alone = attach(INPUTS, [Worn(Adapter({"text_encoder": {"q_proj": pair}}), 0.7)])
    ours, theirs = (one.feed(INPUTS, "text_encoder", K) for one in (kept, alone))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("layer", "branch", "message"),
    [
        ("other", Branch(half(0, K, 2), half(1, 2, N)), "unet.other: must be a layer whose graph takes an adapter, got none"),
        (LINEAR, Branch(half(0, K, 2), half(1, 2, N + 1)), "unet.attn.to_q: the adapter must fit [4, 6], got [5, 6]"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(layer: str, branch: Branch, message: str) -> None:
    with pytest.raises(EngineError) as error:
        attach(INPUTS, [Worn(Adapter({"unet": {layer: branch}}))])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
