"""Adapters of LyCORIS' algorithms: up @ down is what the LyCORIS package adds to the weight, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
pytest.importorskip("lycoris", reason="lycoris-lora is not installed: pip install 'personalq[dev]'")

from lycoris.logging import logger  # noqa: E402  (after the skip)
from lycoris.modules.glora import GLoRAModule  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from personalq.weights.adapter import Adapter, Limits, adapter_of, why_not  # noqa: E402
from personalq.weights.checkpoint import open_weights  # noqa: E402
from tests.personalq.weights.test_deltas import LORAS, load, make_lora  # noqa: E402
from tests.personalq.weights.test_lycoris import (  # noqa: E402
    ALGORITHMS,
    MODULES,
    NETWORKS,
    OTHERS,
    difference,
    edit_of_file,
    saved,
    trained,
    write_network,
)

# float32: only the order of additions differs. float16: both factors are rounded to 11 bits.
EXACT, HALF = 1e-5, 2e-3
GLORA = {"lora_dim": 4, "alpha": 3}
PLACES = {**MODULES, "conv 3x3, Tucker": MODULES["conv 3x3"]}
ATTACHED = {
    **{
        f"{algorithm}, {place}": (kind, layer, options | ({"use_tucker": True} if "Tucker" in place else {}))
        for algorithm, (kind, options) in ALGORITHMS.items()
        for place, layer in PLACES.items()
    },
    "GLoRA, linear": (GLoRAModule, MODULES["linear"], GLORA),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logger.setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def layers(tiny_base: Path) -> Callable[[str], Any]:
    unet = load(tiny_base).unet
    return lambda name: unet.get_submodule(name)


def adapter(base: Path, folder: Path, limits: Limits | None = None) -> tuple[str, Adapter]:
    weights = open_weights(base, folder, "lora")
    return why_not(weights), adapter_of(weights, open_weights(base, None, "lora"), limits)


def added(module: Any) -> Any:
    """What LyCORIS adds to the weight of its layer."""
    plain = module.org_module[0].weight
    return module.get_merged_weight(shape=plain.shape)[0] - plain


@pytest.mark.parametrize(("kind", "name", "options"), ATTACHED.values(), ids=ATTACHED)
def test_up_at_down_is_what_lycoris_adds(
    tiny_base: Path, tmp_path: Path, layers: Any, kind: Any, name: str, options: dict[str, Any]
) -> None:
    module = trained(kind, name, layers(name), **options)
    save_file(saved(module), tmp_path / "trained.safetensors")
    edit, plain = edit_of_file(tiny_base, tmp_path / "trained.safetensors", name), module.org_module[0].weight
    up, down = edit.factors(lambda: plain.detach().numpy())
    assert up.shape[1] == down.shape[0] == edit.rank
    assert difference((up @ down).reshape(plain.shape), added(module)) <= EXACT
    reason, made = adapter(tiny_base, tmp_path)
    branch = made.branches["unet"][name]
    assert reason == "" and branch.error <= 1e-3
    assert difference(branch.change(), added(module)) <= HALF


EXACT_NETWORKS = ("locon", "locon with Tucker", "loha", "loha with Tucker", "lokr")


@pytest.mark.parametrize("name", EXACT_NETWORKS)
def test_a_whole_file_is_attached_in_both_models(tiny_base: Path, tmp_path: Path, name: str) -> None:
    write_network(load(tiny_base), tmp_path / "network.safetensors", NETWORKS[name])
    reason, made = adapter(tiny_base, tmp_path)
    assert reason == "" and made.left_out == () and made.branches.keys() == {"unet", "text_encoder"}
    assert_changes(tiny_base, tmp_path, made)


@pytest.mark.parametrize("recipe", [name for name in LORAS if "DoRA" not in name])
def test_a_lora_of_peft_is_attached_with_its_alpha_once(tiny_base: Path, tmp_path: Path, recipe: str) -> None:
    make_lora(tiny_base, tmp_path, **LORAS[recipe])
    reason, made = adapter(tiny_base, tmp_path)
    assert reason == "" and made.left_out == ()
    assert_changes(tiny_base, tmp_path, made)


def assert_changes(base: Path, folder: Path, made: Adapter) -> None:
    """Every parameter that the merged checkpoint changes has its branch, and no other has one."""
    merged, plain = open_weights(base, folder, "lora"), open_weights(base, None, "lora")
    for component, model in merged.components.items():
        layers = made.branches.get(component, {})
        assert {f"{layer}.weight" for layer in layers} == model.changed
        for layer, branch in layers.items():
            name = f"{layer}.weight"
            change = torch.from_numpy(model.read(name) - np.asarray(plain.component(component).read(name)))
            assert difference(branch.change(), change) <= 2 * HALF, name


NOT_EXACT = {
    "DoRA": (LoConModule, {"lora_dim": 4, "weight_decompose": True}),
    **{name: one for name, one in OTHERS.items() if name != "GLoRA"},
    "GLoRA of a convolution": (GLoRAModule, GLORA),
}


@pytest.mark.parametrize("algorithm", NOT_EXACT.values(), ids=NOT_EXACT)
def test_what_is_no_product_says_so_and_is_cut_to_its_singular_values(
    tiny_base: Path, tmp_path: Path, layers: Any, algorithm: tuple[Any, dict[str, Any]]
) -> None:
    kind, options = algorithm
    name = MODULES["conv 3x3"]
    module = trained(kind, name, layers(name), **options)
    save_file(saved(module), tmp_path / "trained.safetensors")
    reason, made = adapter(tiny_base, tmp_path, Limits(energy=1.0))
    assert reason in (
        f"its change of unet.{name}.weight is no low-rank product",
        f"it changes unet.{name}.bias, which no adapter holds",
    )
    branch = made.branches["unet"][name]
    assert difference(branch.change(), added(module)) <= 2 * HALF
    cut = adapter(tiny_base, tmp_path, Limits(rank=8))[1].branches["unet"][name]
    change = added(module).detach().numpy().reshape(len(module.org_module[0].weight), -1).astype(np.float64)
    values = np.linalg.svd(change, compute_uv=False) ** 2
    lost = float(np.sqrt(max(1 - values[:8].sum() / values.sum(), 0)))
    assert cut.rank <= 8 and abs(cut.error - lost) <= 1e-3


@pytest.mark.parametrize("name", ["locon as DoRA", "locon, norms too", "full", "glora", "diag-oft", "boft"])
def test_a_file_that_is_no_adapter_exactly_is_told(tiny_base: Path, tmp_path: Path, name: str) -> None:
    write_network(load(tiny_base), tmp_path / "network.safetensors", NETWORKS[name])
    reason, made = adapter(tiny_base, tmp_path, Limits(rank=4))
    assert "is no low-rank product" in reason or "which no adapter holds" in reason
    assert bool(made.left_out) == (name in ("locon, norms too", "full")), made.left_out
