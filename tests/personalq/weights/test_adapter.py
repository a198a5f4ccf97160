"""Adapters from deltas: exact products, singular values for the rest, float16, and a file of the same bytes each time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from personalq.errors import RepositoryError
from personalq.weights.adapter import (
    MOST_RANK,
    Adapter,
    Branch,
    Limits,
    adapter_of,
    balanced,
    narrowed,
    read_adapter,
    truncated,
    why_not,
)
from personalq.weights.checkpoint import CheckpointWeights, open_weights
from tests.personalq import toy_checkpoints as make

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, TO_K = f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_k"
CONV, NORM = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1"
SHAPES = {
    f"{TO_Q}.weight": (24, 40),
    f"{TO_K}.weight": (24, 8),
    f"{CONV}.weight": (12, 10, 3, 3),
    f"{NORM}.weight": (10,),
}
EVERYTHING = Limits(energy=1.0)

# Both factors are rounded to 11 bits: of the largest value of a change of rank r, about r**0.5 * 2**-11.
HALF = 2e-3


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose UNet has a Linear, a K of the text, a 3x3 convolution and a norm, random."""
    folder, random = make.base(tmp_path / "base"), np.random.default_rng(0)
    unet = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def opened(base: Path, tensors: dict[str, Any], kind: str = "lora") -> tuple[CheckpointWeights, CheckpointWeights]:
    """A checkpoint of these tensors over the base, and the base alone."""
    folder = base.parent / "checkpoint"
    folder.mkdir(exist_ok=True)
    save_file({name: np.asarray(value) for name, value in tensors.items()}, folder / "delta.safetensors")
    return open_weights(base, folder, kind), open_weights(base, None, kind)


def halves(layer: str, rank: int, scale: float = 0.1, seed: int = 1) -> dict[str, Any]:
    """A LoRA of one layer as peft writes it."""
    random, (n, *rest) = np.random.default_rng(seed), SHAPES[f"{layer}.weight"]
    up = (n, rank, 1, 1) if len(rest) > 1 else (n, rank)
    return {
        f"unet.{layer}.lora_A.weight": (random.standard_normal((rank, *rest)) * scale).astype(np.float32),
        f"unet.{layer}.lora_B.weight": (random.standard_normal(up) * scale).astype(np.float32),
    }


def fine_tune(base: Path, change: dict[str, Any]) -> tuple[CheckpointWeights, CheckpointWeights]:
    """A full fine-tune of the base's UNet that differs by `change`."""
    folder = base.parent / "whole"
    plain = open_weights(base, None, "dreambooth").component("unet")
    tensors = {name: plain.read(name) + change.get(name, np.float32(0)) for name in plain.names()}
    (folder / "unet").mkdir(parents=True)
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return open_weights(base, folder, "dreambooth"), open_weights(base, None, "dreambooth")


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a part of the largest value."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def change_of(weights: CheckpointWeights, base: CheckpointWeights, layer: str) -> np.ndarray:
    name = f"{layer}.weight"
    return weights.component("unet").read(name) - base.component("unet").read(name)


@pytest.mark.parametrize("layer", [TO_Q, TO_K, CONV])
def test_a_lora_is_its_two_matrices_and_their_product_is_the_change(base: Path, layer: str) -> None:
    weights, plain = opened(base, {**halves(layer, 4), f"unet.{layer}.alpha": np.float32(2)})
    assert why_not(weights) == ""
    adapter = adapter_of(weights, plain)
    branch = adapter.branches["unet"][layer]
    n, *rest = SHAPES[f"{layer}.weight"]
    assert (branch.down.shape, branch.up.shape) == (((4, *rest), (n, 4)) if len(rest) > 1 else ((*rest, 4), (4, n)))
    assert branch.down.dtype == branch.up.dtype == np.float16
    assert (branch.rank, branch.error, adapter.rank, adapter.left_out) == (4, 0.0, 4, ())
    assert off(branch.change(), change_of(weights, plain, layer)) <= HALF


def test_textual_inversion_is_its_vectors(base: Path) -> None:
    vectors = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
    weights, plain = opened(base, {"<cat-toy>": vectors}, "textual_inversion")
    assert why_not(weights) == ""
    adapter = adapter_of(weights, plain)
    assert adapter.branches == {} and adapter.changes == {} and adapter.added.keys() == {"text_encoder"}
    np.testing.assert_array_equal(adapter.added["text_encoder"], vectors.astype(np.float16))


def test_custom_diffusion_is_the_whole_change_of_k_and_its_token(base: Path) -> None:
    whole = np.random.default_rng(3).standard_normal(SHAPES[f"{TO_K}.weight"]).astype(np.float32)
    tensors = {f"{ATTENTION}.attn2.processor.to_k_custom_diffusion.weight": whole}
    weights, plain = opened(base, tensors, "custom_diffusion")
    assert why_not(weights) == ""
    adapter = adapter_of(weights, plain)
    assert adapter.branches == {} and adapter.changes.keys() == {TO_K}
    change = whole - plain.component("unet").read(f"{TO_K}.weight")
    np.testing.assert_array_equal(adapter.changes[TO_K], change.astype(np.float16))


# --- balance and float16


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 3e4])
def test_balancing_moves_a_power_of_two_and_changes_no_bit_of_the_product(scale: float) -> None:
    random = np.random.default_rng(0)
    up = (random.standard_normal((24, 4)) * scale).astype(np.float32)
    down = (random.standard_normal((4, 40)) / scale).astype(np.float32)
    left, right = balanced(up, down)
    np.testing.assert_array_equal(left @ right, up @ down)
    assert 0.25 <= np.abs(left).max() / np.abs(right).max() <= 4


def test_matrices_that_float16_alone_could_not_hold_are_balanced_into_it(base: Path) -> None:
    """up at 1e6, down at 1e-6: neither is a float16, their product is an ordinary change."""
    tensors = halves(TO_Q, 4, scale=1.0)
    tensors[f"unet.{TO_Q}.lora_B.weight"] *= np.float32(1e6)
    tensors[f"unet.{TO_Q}.lora_A.weight"] *= np.float32(1e-6)
    weights, plain = opened(base, tensors)
    assert off(adapter_of(weights, plain).branches["unet"][TO_Q].change(), change_of(weights, plain, TO_Q)) <= HALF


def test_a_change_beyond_float16_is_refused_with_its_size(base: Path) -> None:
    tensors = {name: value * np.float32(1e6) for name, value in halves(TO_Q, 4, scale=1.0).items()}
    with pytest.raises(
        RepositoryError,
        match=rf"^unet\.{re.escape(TO_Q)}\.weight: the delta must be finite, got [\d.]+e\+06, over float16's 65504; save",
    ):
        adapter_of(*opened(base, tensors))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("end", ["lora_A", "lora_B"])
def test_nan_and_inf_in_a_matrix_are_refused_in_one_line(base: Path, end: str, value: float) -> None:
    tensors = halves(TO_Q, 4)
    tensors[f"unet.{TO_Q}.{end}.weight"][1, 2] = value
    with pytest.raises(RepositoryError) as refused:
        adapter_of(*opened(base, tensors))
    assert str(refused.value) == (
        f"unet.{TO_Q}.weight: the delta must be finite, got NaN or Inf; save the checkpoint again"
    )


def test_nan_in_a_fine_tune_is_refused_before_its_singular_values(base: Path) -> None:
    change = np.zeros(SHAPES[f"{TO_Q}.weight"], np.float32)
    change[0, 0] = np.nan
    with pytest.raises(RepositoryError, match=r"the delta must be finite, got NaN or Inf; save the checkpoint again$"):
        adapter_of(*fine_tune(base, {f"{TO_Q}.weight": change}))


# --- what is cut


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_a_cut_change_keeps_what_numpys_svd_keeps(shape: tuple[int, int], rank: int) -> None:
    change = np.random.default_rng(rank).standard_normal(shape).astype(np.float32)
    left, values, right = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    lost = float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
    up, down, error = truncated(change, Limits(rank=rank, energy=1.0))
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert off(up @ down, best) <= 1e-5 and error == pytest.approx(lost, abs=1e-6)


@pytest.mark.parametrize("rank", [2, 7])
def test_a_product_is_narrowed_as_numpys_svd_would(rank: int) -> None:
    random = np.random.default_rng(1)
    up, down = random.standard_normal((24, 12)).astype(np.float32), random.standard_normal((12, 40)).astype(np.float32)
    left, values, right = np.linalg.svd(up.astype(np.float64) @ down, full_matrices=False)
    narrow_up, narrow_down, error = narrowed(up, down, Limits(rank=rank, energy=1.0))
    assert off(narrow_up @ narrow_down, (left[:, :rank] * values[:rank]) @ right[:rank]) <= 1e-5
    assert error == pytest.approx(float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())), abs=1e-6)


@pytest.mark.parametrize(("energy", "rank"), [(0.63, 1), (0.65, 2), (0.79, 2), (0.81, 3), (0.999, 4)])
def test_the_rank_is_the_smallest_that_keeps_so_much_of_the_squares(energy: float, rank: int) -> None:
    """Singular values 8, 4, 4, 2: their squares, added up, are 0.64, 0.80, 0.96 and 1 of the whole."""
    change = np.zeros((8, 6), np.float32)
    change[range(4), range(4)] = 8, 4, 4, 2
    up, down, error = truncated(change, Limits(energy=energy))
    assert len(down) == up.shape[1] == rank
    assert error == pytest.approx(np.sqrt(1 - (0.64, 0.80, 0.96, 1.0)[rank - 1]), abs=1e-7)


def test_a_cap_on_the_rank_cuts_and_the_error_is_that_of_the_change(base: Path) -> None:
    weights, plain = opened(base, halves(TO_Q, 8))
    branch = adapter_of(weights, plain, Limits(rank=3)).branches["unet"][TO_Q]
    wanted = change_of(weights, plain, TO_Q)
    lost = np.sqrt(np.square(branch.change() - wanted).mean() / np.square(wanted).mean())
    assert branch.rank == 3 and 0.1 < branch.error == pytest.approx(lost, abs=1e-3)


def test_a_fine_tune_is_cut_layer_by_layer_and_what_has_no_place_is_named(base: Path) -> None:
    random = np.random.default_rng(4)
    change = {name: (random.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in SHAPES.items()}
    weights, plain = fine_tune(base, change)
    whole = adapter_of(weights, plain, EVERYTHING)
    assert whole.left_out == (f"unet.{NORM}.weight",)
    assert whole.changes.keys() == {TO_K} and whole.branches["unet"].keys() == {TO_Q, CONV}
    for layer in (TO_Q, CONV):
        assert off(whole.branches["unet"][layer].change(), change_of(weights, plain, layer)) <= HALF, layer
    cut = adapter_of(weights, plain, Limits(rank=4))
    assert {layer: branch.rank for layer, branch in cut.branches["unet"].items()} == {TO_Q: 4, CONV: 4}
    assert all(branch.error > 0.3 for branch in cut.branches["unet"].values())


def test_a_layer_that_a_fine_tune_left_alone_has_no_branch(base: Path) -> None:
    change = np.zeros(SHAPES[f"{TO_Q}.weight"], np.float32)
    change[3] = 0.5
    adapter = adapter_of(*fine_tune(base, {f"{TO_Q}.weight": change}))
    assert adapter.branches["unet"].keys() == {TO_Q} and adapter.branches["unet"][TO_Q].rank == 1
    assert adapter.changes == {} and adapter.left_out == ()


def test_a_lora_wider_than_its_layer_stays_exact(base: Path) -> None:
    """Rank 12 on a (24, 8) layer: its change has rank 8 at most."""
    weights, plain = opened(base, halves(TO_K, 12))
    assert why_not(weights) == ""
    branch = adapter_of(weights, plain).branches["unet"][TO_K]
    assert branch.rank == 8 and branch.error <= 1e-6
    assert off(branch.change(), change_of(weights, plain, TO_K)) <= HALF


# --- what is no adapter


def no_adapter(base: Path, tensors: dict[str, Any]) -> str:
    return why_not(opened(base, tensors)[0])


def test_why_not_says_which_parameter(base: Path) -> None:
    dora = {**halves(TO_Q, 4), f"unet.{TO_Q}.lora_magnitude_vector": np.ones(24, np.float32)}
    assert no_adapter(base, dora) == f"its change of unet.{TO_Q}.weight is no low-rank product"
    norm = f"lora_unet_{NORM.replace('.', '_')}"
    assert no_adapter(base, {f"{norm}.w_norm": np.ones(10, np.float32)}) == (
        f"it changes unet.{NORM}.weight, which no adapter holds"
    )
    full = f"lora_unet_{CONV.replace('.', '_')}"
    assert no_adapter(base, {f"{full}.diff": np.ones((12, 10, 3, 3), np.float32)}) == (
        f"its change of unet.{CONV}.weight is no low-rank product"
    )


def test_why_not_says_that_a_fine_tune_is_one(base: Path) -> None:
    assert why_not(fine_tune(base, {})[0]) == f"unet.{TO_Q}.weight is replaced: a full fine-tune"


def test_a_rank_over_the_most_is_no_adapter_exactly_and_is_cut_when_it_is_forced(base: Path) -> None:
    weights, plain = opened(base, halves(TO_Q, MOST_RANK + 1, scale=0.01))
    assert why_not(weights) == f"its change of unet.{TO_Q}.weight has rank {MOST_RANK + 1}, an adapter's is at most 256"
    assert adapter_of(weights, plain).branches["unet"][TO_Q].rank == 24


# --- the file


def some_adapter() -> Adapter:
    random = np.random.default_rng(5)

    def half(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float16)

    return Adapter(
        branches={
            "unet": {TO_Q: Branch(half(40, 4), half(4, 24)), CONV: Branch(half(2, 10, 3, 3), half(12, 2))},
            "text_encoder": {"encoder.layers.0.mlp.fc1": Branch(half(6, 1), half(1, 6))},
        },
        changes={TO_K: half(24, 8)},
        added={"text_encoder": half(2, 6)},
        correction={TO_Q: Branch(half(40, 3), half(3, 24))},
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    adapter, file = some_adapter(), tmp_path / "adapter.safetensors"
    file.write_bytes(adapter.to_bytes())
    again = read_adapter(file)
    assert again.branches.keys() == {"unet", "text_encoder"} and again.correction.keys() == {TO_Q}
    assert again.rank == 4 and again.branches["unet"][CONV].rank == 2
    found, wanted = again.tensors(), adapter.tensors()
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert again.to_bytes() == adapter.to_bytes()


def test_the_bytes_do_not_depend_on_the_order_in_which_layers_came() -> None:
    adapter = some_adapter()
    backwards = Adapter(
        branches={part: dict(reversed(layers.items())) for part, layers in reversed(adapter.branches.items())},
        changes=adapter.changes,
        added=adapter.added,
        correction=adapter.correction,
    )
    assert backwards.to_bytes() == adapter.to_bytes()
    assert load(adapter.to_bytes()).keys() == adapter.tensors().keys()


def test_a_file_with_half_a_branch_or_another_type_is_refused(tmp_path: Path) -> None:
    tensors = some_adapter().tensors()
    file = tmp_path / "adapter.safetensors"
    save_file({name: value for name, value in tensors.items() if name != f"unet.{TO_Q}.up"}, file)
    with pytest.raises(
        RepositoryError, match=rf"must hold pairs of \.down and \.up, got 'unet\.{re.escape(TO_Q)}\.down'"
    ):
        read_adapter(file)
    save_file({**tensors, f"unet.{TO_K}.change": np.ones((24, 8), np.float32)}, file)
    with pytest.raises(RepositoryError, match=r"\.change: must be F16, got float32; export the checkpoint again$"):
        read_adapter(file)
