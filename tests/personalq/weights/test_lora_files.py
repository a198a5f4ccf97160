"""What stands beside a LoRA's halves: adapters' names, peft's folders, embeddings inside the file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'personalq[export]'")

from diffusers import UNet2DConditionModel  # noqa: E402  (after the skip)
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

from personalq.weights.checkpoint import CheckpointWeights, check_fit, open_weights  # noqa: E402
from personalq.weights.deltas.bundled import bundled_tokens  # noqa: E402
from personalq.weights.deltas.kinds import file_kind  # noqa: E402
from personalq.weights.deltas.lora import foreign_lengths  # noqa: E402
from personalq.weights.deltas.lora_names import unread_names  # noqa: E402
from tests.exporters import architectures  # noqa: E402
from tests.personalq.weights.test_deltas import refused  # noqa: E402

TOLERANCE = 1e-6  # of a parameter's largest value: float32 on both sides, only the order of additions differs
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PLAIN = {f"unet.{Q}.lora_A.weight": torch.ones(4, 64), f"unet.{Q}.lora_B.weight": torch.ones(64, 4)}


def changed(weights: CheckpointWeights) -> dict[str, Any]:
    return {name: np.array(part.read(name)) for part in weights.components.values() for name in part.changed}


# --- peft's own folders

UNET = ["to_q", "to_v", "proj_in", "conv1"]
TEXT = ["q_proj", "fc1"]
CONFIGS: dict[str, Any] = {
    "LoRA": lambda targets: LoraConfig(r=4, lora_alpha=6, target_modules=targets),
    "LoRA, rank-stabilised": lambda targets: LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=targets),
    "LoRA, alpha and rank by module": lambda targets: LoraConfig(
        r=4, lora_alpha=6, alpha_pattern={targets[0]: 3}, rank_pattern={targets[-1]: 2}, target_modules=targets
    ),
    "DoRA": lambda targets: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets),
    "LoHa": lambda targets: LoHaConfig(r=4, alpha=6, target_modules=targets),
    "LoHa, effective convolutions": lambda targets: LoHaConfig(
        r=4, alpha=6, use_effective_conv2d=True, target_modules=targets
    ),
    "LoKr": lambda targets: LoKrConfig(r=2, alpha=3, target_modules=targets),
    "LoKr, both halves factored": lambda targets: LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=targets),
    "LoKr, effective convolutions": lambda targets: LoKrConfig(
        r=2, alpha=3, use_effective_conv2d=True, target_modules=targets
    ),
    "LoKr, whole halves": lambda targets: LoKrConfig(
        r=64, alpha=32, rank_pattern={targets[0]: 128}, target_modules=targets
    ),
}


def trained_by_peft(base: Path, folder: Path, component: str, config: Any) -> Any:
    """A model with a random adapter, saved by peft into the component's folder; and merged by it."""
    kind = UNet2DConditionModel if component == "unet" else CLIPTextModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers 5 for a property of 4
        model = get_peft_model(kind.from_pretrained(base, subfolder=component), config)
    torch.manual_seed(17)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / component, save_embedding_layers=False)
    return model.merge_and_unload()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_folders_of_peft_are_merged_as_peft_merges_them(tiny_base: Path, tmp_path: Path, config: Any) -> None:
    merged = {
        component: trained_by_peft(tiny_base, tmp_path, component, config(targets))
        for component, targets in (("unet", UNET), ("text_encoder", TEXT))
    }
    weights = open_weights(tiny_base, tmp_path, "lora")
    check_fit(tiny_base, tmp_path, [], "lora")
    for component, model in merged.items():
        ours = weights.component(component)
        assert ours.changed
        for name, value in model.named_parameters():
            found, wanted = np.asarray(ours.read(name)), value.detach().numpy()
            assert np.abs(found - wanted).max() <= TOLERANCE * max(np.abs(wanted).max(), 1e-3), name


def test_a_file_of_peft_alone_takes_the_configuration_beside_it(tiny_base: Path, tmp_path: Path) -> None:
    trained_by_peft(tiny_base, tmp_path, "unet", CONFIGS["LoRA"](UNET))
    in_folder = changed(open_weights(tiny_base, tmp_path, "lora"))
    alone = changed(open_weights(tiny_base, tmp_path / "unet", "lora"))
    assert in_folder.keys() == alone.keys()
    assert all(np.array_equal(in_folder[name], alone[name]) for name in alone)


def test_a_file_of_peft_without_its_configuration_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    trained_by_peft(tiny_base, tmp_path, "unet", CONFIGS["LoRA"](UNET))
    (tmp_path / "unet" / "adapter_config.json").unlink()
    text = refused(tiny_base, tmp_path, "lora")
    assert "adapter_config.json: must be there, it says the LoRA's alpha, got nothing" in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "adapter_config.json must be a JSON object, got '[]'"),
        ('{"peft_type": "VERA"}', "peft_type must be one of LORA, LOHA, LOKR, got 'VERA'"),
        ('{"peft_type": "LORA", "lora_alpha": "7"}', "lora_alpha must be a number, got '7'"),
        ('{"peft_type": "LORA", "lora_alpha": 7, "use_dora": true}', "a DoRA must hold its lengths, got none"),
    ],
)
def test_a_configuration_that_says_nothing_is_refused(tiny_base: Path, tmp_path: Path, content: str, text: str) -> None:
    trained_by_peft(tiny_base, tmp_path, "unet", CONFIGS["LoRA"](UNET))
    (tmp_path / "unet" / "adapter_config.json").write_text(content)
    assert text in refused(tiny_base, tmp_path, "lora")


def test_a_folder_of_peft_beside_another_lora_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    trained_by_peft(tiny_base, tmp_path, "unet", CONFIGS["LoRA"](UNET))
    save_file(PLAIN, tmp_path / "pytorch_lora_weights.safetensors")
    assert "must hold one lora file, got 2" in refused(tiny_base, tmp_path, "lora")


def test_the_second_encoder_s_folder_is_its_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    architectures.sdxl().save_pretrained(base)
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    state = {f"base_model.model.{name}.lora_{side}.weight": torch.ones(shape) for side, shape in SIDES.items()}
    (tmp_path / "lora" / "text_encoder_2").mkdir(parents=True)
    save_file(state, tmp_path / "lora" / "text_encoder_2" / "adapter_model.safetensors")
    (tmp_path / "lora" / "text_encoder_2" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    weights = open_weights(base, tmp_path / "lora", "lora")
    assert weights.component("text_encoder_2").changed == {f"{name}.weight"}
    assert not weights.component("text_encoder").changed


SIDES = {"A": (4, 24), "B": (24, 4)}


# --- adapters, and one part under two names


def test_two_adapters_in_one_file_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    state = {
        key.replace("_A.", f"_A.{name}.").replace("_B.", f"_B.{name}."): PLAIN[key] for key in PLAIN for name in "ab"
    }
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "lora.safetensors")
    text = refused(tiny_base, tmp_path, "lora")
    assert text == "lora.safetensors: must hold one adapter, got a, b; save each in a file of its own"


def test_one_part_under_two_names_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    other = {f"lora_unet_{Q.replace('.', '_')}.lora_down.weight": torch.ones(4, 64)}
    save_file(PLAIN | other, tmp_path / "lora.safetensors")
    assert f"unet.{Q}: must be there once, got lora_unet_mid_block" in refused(tiny_base, tmp_path, "lora")


def test_two_changes_of_one_bias_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    state = {
        f"{name}.lora_A.weight": torch.ones(4, 64, 1, 1),
        f"{name}.lora_B.weight": torch.ones(64, 4, 1, 1),
        f"{name}.lora_B.bias": torch.ones(64),
        f"{name}.diff_b": torch.ones(64),
    }
    save_file(state, tmp_path / "lora.safetensors")
    assert "must have one change of its bias, got bias and diff_b" in refused(tiny_base, tmp_path, "lora")


def test_a_bias_beside_a_lora_is_added(tiny_base: Path, tmp_path: Path) -> None:
    """ComfyUI's extraction writes lora_up, lora_down and diff_b; peft's lora_bias is scaled as its halves are."""
    name, bias = "mid_block.attentions.0.proj_in", torch.arange(64.0)
    halves = {
        "lora_A.weight": torch.ones(4, 64, 1, 1),
        "lora_B.weight": torch.ones(64, 4, 1, 1),
        "alpha": torch.tensor(2.0),
    }
    plain = open_weights(tiny_base, None, "lora").component("unet").read(f"{name}.bias")
    for part, factor in (("diff_b", 1.0), ("lora_B.bias", 0.5)):
        state = {f"unet.{name}.{key}": value for key, value in halves.items()}
        save_file(state | {f"unet.{name}.{part}": bias}, tmp_path / "lora.safetensors")
        ours = open_weights(tiny_base, tmp_path, "lora").component("unet").read(f"{name}.bias")
        assert np.array_equal(ours, plain + np.float32(factor) * bias.numpy())


def test_kohya_s_header_says_nothing_of_alpha(tiny_base: Path, tmp_path: Path) -> None:
    """Without `.alpha` tensors sd-scripts takes the rank: ss_network_alpha is what the trainer was asked for."""
    file = tmp_path / "lora.safetensors"
    save_file(PLAIN, file)
    plain = changed(open_weights(tiny_base, tmp_path, "lora"))
    save_file(PLAIN, file, metadata={"ss_network_alpha": "1.0", "ss_network_dim": "4"})
    assert np.array_equal(changed(open_weights(tiny_base, tmp_path, "lora"))[f"{Q}.weight"], plain[f"{Q}.weight"])


# --- embeddings inside the file


@pytest.mark.parametrize("tensor", ["clip_l", "emb_params", "string_to_param.*"])
def test_an_embedding_in_the_file_is_a_token_of_the_base(tiny_base: Path, tmp_path: Path, tensor: str) -> None:
    torch.manual_seed(19)
    vectors = torch.randn(2, 32)
    save_file(PLAIN | {f"bundle_emb.zwx-dog.{tensor}": vectors}, tmp_path / "lora.safetensors")
    weights = open_weights(tiny_base, tmp_path, "lora")
    (tmp_path / "alone").mkdir()
    save_file({"zwx-dog": vectors}, tmp_path / "alone" / "learned_embeds.safetensors")
    alone = open_weights(tiny_base, tmp_path / "alone", "textual_inversion")
    assert weights.added_tokens == alone.added_tokens == (("zwx-dog", ("zwx-dog", "zwx-dog_1")),)
    table = "embeddings.token_embedding.weight"
    assert np.array_equal(weights.component("text_encoder").read(table), alone.component("text_encoder").read(table))
    assert weights.component("unet").changed == {f"{Q}.weight"}
    assert bundled_tokens(load_file(tmp_path / "lora.safetensors")) == ["zwx-dog"]


def test_an_embedding_in_the_file_is_for_both_encoders_of_sdxl(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "lora"
    architectures.sdxl().save_pretrained(base)
    folder.mkdir()
    first, second = torch.randn(2, 32), torch.randn(2, 24)
    save_file(
        PLAIN | {"bundle_emb.<dog>.clip_l": first, "bundle_emb.<dog>.clip_g": second}, folder / "lora.safetensors"
    )
    weights = open_weights(base, folder, "lora")
    row = weights.first_added_id
    assert weights.added_tokens == (("<dog>", ("<dog>", "<dog>_1")),)
    for component, prefix, vectors in (("text_encoder", "", first), ("text_encoder_2", "text_model.", second)):
        table = weights.component(component).read(f"{prefix}embeddings.token_embedding.weight")
        assert np.array_equal(table[row : row + 2], vectors.numpy())


@pytest.mark.parametrize(
    ("tensors", "got"),
    [
        ({"clip_l_out": (2, 32)}, "must hold one of clip_l, emb_params, string_to_param.*, got clip_l_out [2, 32]"),
        ({"clip_l": (2, 32), "clip_g": (2, 24)}, "got clip_g [2, 24], clip_l [2, 32]"),
    ],
)
def test_an_embedding_that_the_base_has_no_place_for_is_refused(
    tiny_base: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], got: str
) -> None:
    bundle = {f"bundle_emb.dog.{name}": torch.ones(shape) for name, shape in tensors.items()}
    save_file(PLAIN | bundle, tmp_path / "lora.safetensors")
    text = refused(tiny_base, tmp_path, "lora")
    assert text.startswith("lora.safetensors: bundle_emb.dog: ") and got in text


def test_a_mark_of_the_scheduler_is_no_part_of_the_lora(tiny_base: Path, tmp_path: Path) -> None:
    save_file(PLAIN | {"v_pred": torch.zeros(0)}, tmp_path / "lora.safetensors")
    assert open_weights(tiny_base, tmp_path, "lora").component("unet").changed == {f"{Q}.weight"}


# --- what kind of file it is, and what diffusers leaves out


@pytest.mark.parametrize(
    "part",
    ["hada_w1_a", "lokr_w2", "lokr_w1_a", "diff", "w_norm", "a1.weight", "oft_blocks", "oft_diag", "on_input", "alpha"],
)
def test_a_file_of_lycoris_is_a_lora(part: str) -> None:
    assert file_kind({f"lora_unet_{Q.replace('.', '_')}.{part}": (4, 64)}) == "lora"
    assert file_kind({f"base_model.model.{Q}.hada_w1_a.default": (4, 64)}) == "lora"
    assert file_kind({"bundle_emb.dog.clip_l": (4, 64)}) == "lora"
    assert file_kind({"<dog>": (2, 32)}) == "textual_inversion"


@pytest.mark.parametrize(
    ("key", "is_foreign"),
    [
        (f"lora_unet_{Q.replace('.', '_')}.dora_scale", True),
        (f"unet.{Q}.dora_scale", True),
        (f"unet.{Q}.lora_magnitude_vector", False),
        (f"unet.{Q}.lora_magnitude_vector.weight", False),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_magnitude_vector", True),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_magnitude_vector.weight", True),
        (f"unet.{Q}.lora_A.weight", False),
    ],
)
def test_lengths_that_diffusers_drops_are_told(key: str, is_foreign: bool) -> None:
    assert foreign_lengths({key: (64,)}) == ([key] if is_foreign else [])


NAMES: dict[str, Callable[[str], str]] = {
    "no component": lambda key: key.removeprefix("unet."),
    "peft's own": lambda key: key.replace("unet.", "base_model.model."),
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_names_that_diffusers_passes_over_are_told(tiny_base: Path, tmp_path: Path, rename: Any) -> None:
    state = {rename(key): value for key, value in PLAIN.items()}
    save_file(state, tmp_path / "lora.safetensors")
    assert open_weights(tiny_base, tmp_path, "lora").component("unet").changed
    pipe = architectures.sd1()
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert not pipe.get_list_adapters()
    assert unread_names(state) == [*state]
    assert not unread_names(PLAIN)
