"""LyCORIS' algorithms, merged by personalq.weights.checkpoint, equal what the LyCORIS package makes of the same tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
pytest.importorskip("lycoris", reason="lycoris-lora is not installed: pip install 'personalq[dev]'")

from lycoris import kohya  # noqa: E402  (after the skip)
from lycoris.functional import loha as loha_formula  # noqa: E402
from lycoris.logging import logger  # noqa: E402
from lycoris.modules.boft import ButterflyOFTModule  # noqa: E402
from lycoris.modules.diag_oft import DiagOFTModule  # noqa: E402
from lycoris.modules.full import FullModule  # noqa: E402
from lycoris.modules.glora import GLoRAModule  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from personalq.weights.checkpoint import open_weights  # noqa: E402
from personalq.weights.deltas.edits import Edit  # noqa: E402
from personalq.weights.deltas.kinds import delta_of  # noqa: E402
from personalq.weights.tensorfile import TensorFile  # noqa: E402
from tests.personalq.weights.test_deltas import load  # noqa: E402

# Of a parameter's largest value: float32 on both sides, only the order of additions differs.
TOLERANCE = 1e-6

MODULES = {
    "linear": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",  # (64, 32)
    "conv 1x1": "mid_block.attentions.0.proj_in",  # (64, 64, 1, 1)
    "conv 3x3": "down_blocks.1.resnets.0.conv1",  # (64, 32, 3, 3)
}
NORMS = {
    "layer norm": "mid_block.attentions.0.transformer_blocks.0.norm2",
    "group norm": "mid_block.resnets.0.norm1",
}
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoCon": (LoConModule, {"lora_dim": 4, "alpha": 3}),
    "LoHa": (LohaModule, {"lora_dim": 4, "alpha": 4}),
    "LoKr, one half factored": (LokrModule, {"lora_dim": 2, "alpha": 2}),
    "LoKr, both halves factored": (LokrModule, {"lora_dim": 2, "alpha": 2, "decompose_both": True}),
    "LoKr, factor 4": (LokrModule, {"lora_dim": 2, "alpha": 2, "factor": 4}),
    "LoKr, whole halves": (LokrModule, {"lora_dim": 2, "alpha": 1, "full_matrix": True}),
}
DORA = {
    "plain": {},
    "DoRA": {"weight_decompose": True},
    "DoRA per input": {"weight_decompose": True, "wd_on_out": False},
}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (FullModule, {}),
    "GLoRA": (GLoRAModule, {"lora_dim": 4, "alpha": 3}),
    "(IA)^3 on inputs": (IA3Module, {"train_on_input": True}),
    "(IA)^3 on outputs": (IA3Module, {"train_on_input": False}),
    "OFT": (DiagOFTModule, {"lora_dim": 8}),
    "OFT, rescaled": (DiagOFTModule, {"lora_dim": 8, "rescaled": True}),
    "OFT, limited": (DiagOFTModule, {"lora_dim": 8, "constraint": 0.01}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 8}),
    "BOFT, rescaled and limited": (ButterflyOFTModule, {"lora_dim": 8, "rescaled": True, "constraint": 0.01}),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logger.setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def layers(tiny_base: Path) -> Callable[[str], Any]:
    unet = load(tiny_base).unet
    return lambda name: unet.get_submodule(name)


def trained(kind: Any, name: str, layer: Any, **options: Any) -> Any:
    """A LyCORIS module over a layer of the UNet, every parameter random."""
    torch.manual_seed(len(name))
    module = kind(f"lora_unet_{name.replace('.', '_')}", layer, **options)
    for key, parameter in module.named_parameters():
        if "scale" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def saved(module: Any) -> dict[str, Any]:
    """The module's tensors as its trainer writes them."""
    if isinstance(module, FullModule):  # until it is applied to a model, its parameters are the difference
        parts = {"diff": module.weight, "diff_b": module.bias}
        return {f"{module.lora_name}.{key}": part.detach().clone() for key, part in parts.items() if part is not None}
    return {f"{module.lora_name}.{key}": value.detach().clone() for key, value in module.state_dict().items()}


def difference(ours: np.ndarray, theirs: Any) -> float:
    """The largest difference, as a part of the largest value (but of 0.001 at least)."""
    value = theirs.detach().float().numpy()
    assert ours.shape == value.shape
    return float(np.abs(ours - value).max() / max(np.abs(value).max(), 1e-3))


def assert_merged(base: Path, folder: Path, name: str, module: Any) -> None:
    save_file(saved(module), folder / "trained.safetensors")
    ours = open_weights(base, folder, "lora").component("unet")
    weight, bias = module.get_merged_weight(shape=module.org_module[0].weight.shape)
    plain = module.org_module[0].weight
    assert (weight - plain).abs().max() > 1e-2, "it must change something"
    assert difference(ours.read(f"{name}.weight"), weight) <= TOLERANCE
    assert ours.changed == {f"{name}.weight"} | ({f"{name}.bias"} if bias is not None else set())
    if bias is not None:
        assert difference(ours.read(f"{name}.bias"), bias) <= TOLERANCE


@pytest.mark.parametrize("dora", DORA.values(), ids=DORA)
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize(
    "name", [*MODULES.values(), MODULES["conv 3x3"] + " tucker"], ids=[*MODULES, "conv 3x3, Tucker"]
)
def test_a_module_is_merged_as_lycoris_merges_it(
    tiny_base: Path, tmp_path: Path, layers: Any, name: str, algorithm: tuple[Any, dict[str, Any]], dora: dict[str, Any]
) -> None:
    name, _, is_tucker = name.partition(" ")
    kind, options = algorithm
    assert_merged(
        tiny_base, tmp_path, name, trained(kind, name, layers(name), use_tucker=bool(is_tucker), **options, **dora)
    )


@pytest.mark.parametrize("algorithm", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", MODULES.values(), ids=MODULES)
def test_what_is_no_low_rank_product_is_merged_as_lycoris_merges_it(
    tiny_base: Path, tmp_path: Path, layers: Any, name: str, algorithm: tuple[Any, dict[str, Any]]
) -> None:
    kind, options = algorithm
    assert_merged(tiny_base, tmp_path, name, trained(kind, name, layers(name), **options))


@pytest.mark.parametrize("name", NORMS.values(), ids=NORMS)
def test_a_norm_is_merged_as_lycoris_merges_it(tiny_base: Path, tmp_path: Path, layers: Any, name: str) -> None:
    assert_merged(tiny_base, tmp_path, name, trained(NormModule, name, layers(name)))


FACTORED = {
    "LoHa": (LohaModule, {"lora_dim": 4, "alpha": 1}),
    "LoKr": (LokrModule, {"lora_dim": 2, "alpha": 1}),
    "LoKr, both halves factored": (LokrModule, {"lora_dim": 2, "alpha": 1, "decompose_both": True}),
}


@pytest.mark.parametrize(("kind", "options"), FACTORED.values(), ids=FACTORED)
@pytest.mark.parametrize("dora", DORA.values(), ids=DORA)
def test_alpha_over_rank_counts_once_as_in_the_forward_pass(
    tiny_base: Path, tmp_path: Path, layers: Any, kind: Any, options: dict[str, Any], dora: dict[str, Any]
) -> None:
    """Held against LyCORIS' forward pass, which is what trained a file: its merge (3.0 to 4.1) has the scale squared."""
    name = MODULES["linear"]
    module = trained(kind, name, layers(name), **options, **dora)
    save_file(saved(module), tmp_path / "trained.safetensors")
    with torch.no_grad():
        weight = module(torch.eye(layers(name).in_features)).T
    ours = open_weights(tiny_base, tmp_path, "lora").component("unet").read(f"{name}.weight")
    assert difference(ours, weight) <= TOLERANCE


@pytest.mark.parametrize("is_tucker", [False, True], ids=["plain", "Tucker"])
def test_alpha_over_rank_counts_once_as_in_the_formula_for_convolutions(
    tiny_base: Path, tmp_path: Path, layers: Any, is_tucker: bool
) -> None:
    name = MODULES["conv 3x3"]
    module = trained(LohaModule, name, layers(name), lora_dim=4, alpha=1, use_tucker=is_tucker)
    save_file(saved(module), tmp_path / "trained.safetensors")
    factors = [getattr(module, f"hada_{end}").detach() for end in ("w1_b", "w1_a", "w2_b", "w2_a")]
    cores = [module.hada_t1.detach(), module.hada_t2.detach()] if is_tucker else [None, None]
    change = loha_formula.diff_weight(*factors, *cores, gamma=torch.tensor(0.25)).reshape(module.org_weight.shape)
    ours = open_weights(tiny_base, tmp_path, "lora").component("unet").read(f"{name}.weight")
    assert difference(ours, module.org_weight + change) <= TOLERANCE


def test_rank_stabilised_files_hold_an_alpha_that_says_so(tiny_base: Path, tmp_path: Path, layers: Any) -> None:
    name = MODULES["linear"]
    module = trained(LoConModule, name, layers(name), lora_dim=4, alpha=3, rs_lora=True)
    assert float(module.alpha) == 6
    assert_merged(tiny_base, tmp_path, name, module)


def test_a_module_without_alpha_takes_the_rank_for_it(tiny_base: Path, tmp_path: Path, layers: Any) -> None:
    name = MODULES["linear"]
    module = trained(LohaModule, name, layers(name), lora_dim=4, alpha=4)
    state = saved(module)
    del state[f"{module.lora_name}.alpha"]
    save_file(state, tmp_path / "trained.safetensors")
    ours = open_weights(tiny_base, tmp_path, "lora").component("unet").read(f"{name}.weight")
    assert difference(ours, module.get_merged_weight()[0]) <= TOLERANCE


def test_a_scalar_that_was_not_folded_in_is_a_factor(tiny_base: Path, tmp_path: Path, layers: Any) -> None:
    name = MODULES["linear"]
    module = trained(LoConModule, name, layers(name), lora_dim=4, alpha=3, use_scalar=True)
    unfolded = saved(module)
    unfolded[f"{module.lora_name}.lora_up.weight"] = module.lora_up.weight.detach().clone()
    unfolded[f"{module.lora_name}.scalar"] = module.scalar.detach().clone()
    save_file(unfolded, tmp_path / "trained.safetensors")
    ours = open_weights(tiny_base, tmp_path, "lora").component("unet").read(f"{name}.weight")
    assert difference(ours, module.get_merged_weight()[0]) <= TOLERANCE


def test_oft_of_lycoris_2_is_the_rotation_itself(tiny_base: Path, tmp_path: Path, layers: Any) -> None:
    """LyCORIS 2.0.0 wrote {"oft_diag": get_r()}."""
    name = MODULES["linear"]
    module = trained(DiagOFTModule, name, layers(name), lora_dim=8)
    save_file({f"{module.lora_name}.oft_diag": module.get_r().detach().contiguous()}, tmp_path / "trained.safetensors")
    ours = open_weights(tiny_base, tmp_path, "lora").component("unet").read(f"{name}.weight")
    assert difference(ours, module.get_merged_weight()[0]) <= TOLERANCE


def test_glora_of_lycoris_1_has_its_factors_the_other_way_round(tiny_base: Path, tmp_path: Path, layers: Any) -> None:
    name = MODULES["linear"]
    module = trained(GLoRAModule, name, layers(name), lora_dim=4, alpha=3)
    state, swapped = saved(module), {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = {
        key.replace(f".{part}.", f".{swapped[part]}."): state[key]
        for key in state
        for part in swapped
        if f".{part}." in key
    }
    save_file(old | {f"{module.lora_name}.alpha": module.alpha}, tmp_path / "trained.safetensors")
    ours = open_weights(tiny_base, tmp_path, "lora").component("unet").read(f"{name}.weight")
    assert difference(ours, module.get_merged_weight()[0]) <= TOLERANCE


# --- whole files


# LyCORIS 4.1's own preset names the time embedding twice, and then stops at that.
PRESET = """enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""

NETWORKS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon with Tucker": {"algo": "locon", "use_tucker": True},
    "locon, norms too": {"algo": "locon", "train_norm": True},
    "locon as DoRA": {"algo": "locon", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha with Tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "full": {"algo": "full"},
    "glora": {"algo": "glora"},
    "diag-oft": {"algo": "diag-oft"},
    "boft": {"algo": "boft"},
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_a_file_is_merged_as_lycoris_merges_it_into_diffusers_models(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    file = tmp_path / "network.safetensors"
    write_network(load(tiny_base), file, options)
    weights = open_weights(tiny_base, tmp_path, "lora")
    pipe, state = load(tiny_base), load_file(file)
    network, _ = kohya.create_network_from_weights(1.0, str(file), None, pipe.text_encoder, pipe.unet)
    network.merge_to(pipe.text_encoder, pipe.unet, state, None, None)
    assert len(network.loras) == len({key.split(".")[0] for key in state})
    for component in ("unet", "text_encoder"):
        ours = weights.component(component)
        plain = open_weights(tiny_base, None, "lora").component(component)
        assert ours.changed
        for name, value in getattr(pipe, component).named_parameters():
            assert difference(np.asarray(ours.read(name)), value) <= TOLERANCE, name
            assert name in ours.changed or np.array_equal(plain.read(name), value.detach().numpy()), name


def write_network(pipe: Any, file: Path, options: dict[str, Any]) -> None:
    """A file as LyCORIS' trainer writes it for both models, every tensor random."""
    preset = file.with_name("preset.toml")
    preset.write_text(PRESET)
    options = {"preset": str(preset), "warn_on_unmatched": False, **options}
    network = kohya.create_network(1.0, 4, 4, None, pipe.text_encoder, pipe.unet, **options)
    torch.manual_seed(2)
    state = {}
    for lora in network.unet_loras + network.text_encoder_loras:
        for key, parameter in lora.named_parameters():
            if "dora_scale" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.1)
        state |= saved(lora)
    assert {key.split("_")[1] for key in state} == {"unet", "te"}
    save_file(state, file)


# --- what an edit says of itself


def edit_of_file(base: Path, file: Path, name: str) -> Edit:
    weights = open_weights(base, None, "lora").component("unet")
    shapes = {"unet": {name: weights.shape(name) for name in weights.names()}, "text_encoder": {}}
    shapes["text_encoder"]["embeddings.token_embedding.weight"] = (1, 32)
    return delta_of([TensorFile(file)], shapes, frozenset()).edits["unet"][f"{name}.weight"]


RANKS = {
    "LoCon": (LoConModule, {"lora_dim": 4}, 4),
    "LoCon with Tucker": (LoConModule, {"lora_dim": 4, "use_tucker": True}, 4),
    "LoHa": (LohaModule, {"lora_dim": 4}, 16),
    "LoKr": (LokrModule, {"lora_dim": 2}, 8),
    "DoRA": (LoConModule, {"lora_dim": 4, "weight_decompose": True}, None),
    "OFT": (DiagOFTModule, {"lora_dim": 8}, None),
    "(IA)^3": (IA3Module, {}, None),
    "full": (FullModule, {}, None),
}


@pytest.mark.parametrize(("kind", "options", "rank"), RANKS.values(), ids=RANKS)
def test_an_edit_says_whether_its_change_is_low_rank(
    tiny_base: Path, tmp_path: Path, layers: Any, kind: Any, options: dict[str, Any], rank: int | None
) -> None:
    name = MODULES["conv 3x3"]
    module = trained(kind, name, layers(name), **options)
    save_file(saved(module), tmp_path / "trained.safetensors")
    edit = edit_of_file(tiny_base, tmp_path / "trained.safetensors", name)
    assert edit.rank == rank
    if rank is not None:
        base = module.org_weight.detach().numpy()
        change = (edit.apply(base).astype(np.float64) - base).reshape(len(base), -1)
        values = np.linalg.svd(change, compute_uv=False)
        assert values[rank] <= 1e-5 * values[0] < values[rank - 1]


def test_glora_says_its_rank_on_a_linear_layer(tiny_base: Path, tmp_path: Path, layers: Any) -> None:
    for layer, rank in (("linear", 8), ("conv 3x3", None)):
        name = MODULES[layer]
        save_file(saved(trained(GLoRAModule, name, layers(name), lora_dim=4)), tmp_path / "trained.safetensors")
        assert edit_of_file(tiny_base, tmp_path / "trained.safetensors", name).rank == rank
