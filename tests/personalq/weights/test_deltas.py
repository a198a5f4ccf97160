"""Every kind of delta, merged by personalq.weights.checkpoint, equals what diffusers makes of the same files."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'personalq[export]'")

from diffusers import StableDiffusionPipeline  # noqa: E402  (after the skip)
from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from personalq.errors import RepositoryError  # noqa: E402
from personalq.weights.checkpoint import CheckpointWeights, open_weights  # noqa: E402

# FP32 on both sides; only the order of additions differs.
TOLERANCE = 1e-5
PROMPT = "a photo of a dog in the forest"

LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]
WITH_CONVOLUTIONS = [*LINEAR, "conv1", "conv_shortcut", "proj_in", "ff.net.0.proj", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def load(base: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


def noise_prediction(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    """The UNet's answer to one seeded latent, through the pipeline's own prompt encoding: (1, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        return pipe.unet(sample, 500, embeds).sample.numpy()


def assert_merged(weights: CheckpointWeights, pipe: Any) -> None:
    """Every parameter of the three models equals diffusers' within TOLERANCE, and untouched ones are bit-equal."""
    for component in ("unet", "text_encoder", "vae"):
        model, ours = getattr(pipe, component), weights.component(component)
        expected = {name: value.detach().numpy() for name, value in model.named_parameters()}
        assert set(ours.names()) == set(expected)
        for name, value in expected.items():
            got = ours.read(name)
            assert got.shape == ours.shape(name) == value.shape, name
            if name in ours.changed:
                assert np.abs(got - value).max() <= TOLERANCE, name
            else:
                assert np.array_equal(got, value), name


def into_pipeline(weights: CheckpointWeights, pipe: Any) -> Any:
    """A plain base pipeline with our merged parameters in place of its own."""
    for component in ("unet", "text_encoder"):
        ours = weights.component(component)
        state = {name: torch.tensor(np.array(ours.read(name))) for name in ours.names()}
        getattr(pipe, component).load_state_dict(state)
    return pipe


def make_lora(base: Path, folder: Path, *, unet: dict[str, Any], text: dict[str, Any] | None, metadata: bool) -> None:
    """A random LoRA as diffusers' training scripts write it."""
    pipe = load(base)
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(init_lora_weights="gaussian", **unet))
    if text:
        pipe.text_encoder.add_adapter(LoraConfig(init_lora_weights="gaussian", **text))
    for model in (pipe.unet, pipe.text_encoder):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    unet_layers = get_peft_model_state_dict(pipe.unet)
    if unet["target_modules"] == LINEAR:
        # Attention only: it leaves peft's names on convolutions, and diffusers 0.42.1 loads half of such a mixture.
        unet_layers = convert_state_dict_to_diffusers(unet_layers)
    layers = {"unet_lora_layers": unet_layers}
    if text:
        layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(
            get_peft_model_state_dict(pipe.text_encoder)
        )
    if metadata:
        layers["unet_lora_adapter_metadata"] = pipe.unet.peft_config["default"].to_dict()
        if text:
            layers["text_encoder_lora_adapter_metadata"] = pipe.text_encoder.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)


LORAS = {
    "attention only, alpha is the rank": {
        "unet": {"r": 4, "lora_alpha": 4, "target_modules": LINEAR},
        "text": None,
        "metadata": False,
    },
    "alpha in metadata, text encoder too": {
        "unet": {"r": 4, "lora_alpha": 7, "target_modules": LINEAR},
        "text": {"r": 2, "lora_alpha": 5, "target_modules": TEXT},
        "metadata": True,
    },
    "convolutions, alpha by module": {
        "unet": {
            "r": 4,
            "lora_alpha": 7,
            "target_modules": WITH_CONVOLUTIONS,
            "alpha_pattern": {"conv1": 3, "^mid_block.resnets.0.conv1": 9},
            "rank_pattern": {"conv1": 2},
        },
        "text": {"r": 2, "lora_alpha": 2, "target_modules": TEXT},
        "metadata": True,
    },
    "rank-stabilised": {
        "unet": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "use_rslora": True},
        "text": None,
        "metadata": True,
    },
    "DoRA, convolutions too": {
        "unet": {"r": 4, "lora_alpha": 7, "target_modules": WITH_CONVOLUTIONS, "use_dora": True},
        "text": None,
        "metadata": True,
    },
}


@pytest.mark.parametrize("recipe", LORAS.values(), ids=LORAS.keys())
def test_a_lora_is_merged_as_diffusers_fuses_it(tiny_base: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    make_lora(tiny_base, tmp_path, **recipe)
    weights = open_weights(tiny_base, tmp_path, "lora")
    pipe = load(tiny_base)
    plain = noise_prediction(pipe)
    pipe.load_lora_weights(str(tmp_path))
    unfused = noise_prediction(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_merged(weights, pipe)
    ours = noise_prediction(into_pipeline(weights, load(tiny_base)))
    assert np.abs(unfused - plain).max() > 1e-3
    assert np.abs(ours - unfused).max() <= TOLERANCE
    assert bool(weights.component("text_encoder").changed) == bool(recipe["text"])


def test_a_kohya_lora_is_merged_as_diffusers_fuses_it(tiny_base: Path, tmp_path: Path) -> None:
    pipe = load(tiny_base)
    state = {}
    torch.manual_seed(5)
    for prefix, model, targets in (("unet", pipe.unet, LINEAR), ("te", pipe.text_encoder, TEXT)):
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        for key, value in get_peft_model_state_dict(model).items():
            module, half, _ = key.rsplit(".", 2)
            middle = "text_model_" if prefix == "te" else ""
            name = f"lora_{prefix}_{middle}{module.replace('.', '_')}"
            end = {"lora_A": "lora_down", "lora_B": "lora_up"}[half]
            state[f"{name}.{end}.weight"] = torch.randn(value.shape) * 0.1
            state[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "kohya.safetensors")
    weights = open_weights(tiny_base, tmp_path, "lora")
    fresh = load(tiny_base)
    fresh.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    assert_merged(weights, fresh)


def test_lora_spellings_of_older_tools_merge_to_the_same(tiny_base: Path, tmp_path: Path) -> None:
    make_lora(tiny_base, tmp_path / "new", **LORAS["attention only, alpha is the rank"])
    state = load_file(tmp_path / "new" / "pytorch_lora_weights.safetensors")
    new = open_weights(tiny_base, tmp_path / "new", "lora").component("unet")
    spellings = {
        "peft": lambda key: key.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B"),
        "processor": lambda key: (
            ".processor.to_".join(key.rsplit(".to_", 1))
            .replace("to_out.0.lora.", "to_out_lora.")
            .replace(".lora.", "_lora.")
        ),
    }
    for name, rename in spellings.items():
        (tmp_path / name).mkdir()
        save_file({rename(key): value for key, value in state.items()}, tmp_path / name / "old.safetensors")
        old = open_weights(tiny_base, tmp_path / name, "lora").component("unet")
        assert old.changed == new.changed, name
        assert all(np.array_equal(old.read(parameter), new.read(parameter)) for parameter in new.changed)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion_adds_the_tokens_and_rows_that_diffusers_adds(
    tiny_base: Path, tmp_path: Path, vectors: int
) -> None:
    torch.manual_seed(7)
    shape = (vectors, 32) if vectors > 1 else (32,)
    save_file({"<dog>": torch.randn(shape)}, tmp_path / "learned_embeds.safetensors")
    weights = open_weights(tiny_base, tmp_path, "textual_inversion")
    pipe = load(tiny_base)
    pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    assert_merged(weights, pipe)
    ((token, pieces),) = weights.added_tokens
    assert token == "<dog>" and pieces == ("<dog>", "<dog>_1", "<dog>_2")[:vectors]
    ids = pipe.tokenizer.convert_tokens_to_ids(list(pieces))
    assert ids == list(range(weights.first_added_id, weights.first_added_id + vectors))
    prompt = "a photo of a <dog>"
    assert pipe.maybe_convert_prompt(prompt, pipe.tokenizer) == "a photo of a " + " ".join(pieces)
    assert weights.component("text_encoder").changed == {"embeddings.token_embedding.weight"}
    other = load(tiny_base)
    other.tokenizer = pipe.tokenizer
    other.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    ours = noise_prediction(into_pipeline(weights, other), prompt)
    assert np.abs(ours - noise_prediction(pipe, prompt)).max() <= TOLERANCE


def processors(base: Path, *, with_q_and_out: bool) -> Any:
    """A pipeline whose UNet has Custom-Diffusion processors with random weights, set up as diffusers' trainer does."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    pipe = load(base)
    torch.manual_seed(11)
    procs = {}
    for name in pipe.unet.attn_processors:
        is_cross = "attn2" in name
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        procs[name] = CustomDiffusionAttnProcessor(
            train_kv=is_cross,
            train_q_out=is_cross and with_q_and_out,
            hidden_size=width,
            cross_attention_dim=32 if is_cross else None,
        )
    pipe.unet.set_attn_processor(procs)
    return pipe


@pytest.mark.parametrize("with_q_and_out", [False, True], ids=["k and v", "q and out too"])
def test_custom_diffusion_processors_give_what_load_attn_procs_gives(
    tiny_base: Path, tmp_path: Path, with_q_and_out: bool
) -> None:
    trained = processors(tiny_base, with_q_and_out=with_q_and_out)
    trained.unet.save_attn_procs(tmp_path)
    save_file({"<dog>": torch.randn(1, 32)}, tmp_path / "<dog>.safetensors")
    # load_attn_procs wants an entry for self-attention too; a safetensors file can say so with empty tensors only.
    file = tmp_path / "pytorch_custom_diffusion_weights.safetensors"
    untouched = {name: torch.empty(0) for name in trained.unet.attn_processors if "attn1" in name}
    save_file(load_file(file) | untouched, file)
    weights = open_weights(tiny_base, tmp_path, "custom_diffusion")

    pipe = load(tiny_base)
    # Without _pipeline diffusers 0.42.1 reads the processors and does not set them.
    pipe.unet.load_attn_procs(str(tmp_path), weight_name=file.name, _pipeline=pipe)
    pipe.load_textual_inversion(str(tmp_path), weight_name="<dog>.safetensors")
    prompt = "a <dog> in the forest"
    theirs = noise_prediction(pipe, prompt)

    other = load(tiny_base)
    plain = noise_prediction(other)
    other.tokenizer = pipe.tokenizer
    other.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    ours = noise_prediction(into_pipeline(weights, other), prompt)
    assert np.abs(ours - theirs).max() <= TOLERANCE
    assert np.abs(ours - plain).max() > 1e-3
    parts = {name.split("attn2.")[1] for name in weights.component("unet").changed}
    more = {"to_q.weight", "to_out.0.weight", "to_out.0.bias"} if with_q_and_out else set()
    assert parts == {"to_k.weight", "to_v.weight"} | more
    assert weights.added_tokens == (("<dog>", ("<dog>",)),)


def test_a_plain_dictionary_of_cross_attention_weights_replaces_them(tiny_base: Path, tmp_path: Path) -> None:
    pipe = load(tiny_base)
    state = {
        name: torch.randn_like(value)
        for name, value in pipe.unet.state_dict().items()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    assert len(state) == 8
    save_file(state, tmp_path / "weights.safetensors")
    weights = open_weights(tiny_base, tmp_path, "custom_diffusion")
    assert not pipe.unet.load_state_dict(state, strict=False).unexpected_keys
    assert_merged(weights, pipe)
    assert weights.component("unet").changed == set(state)


def test_a_full_fine_tune_takes_the_models_it_lacks_from_the_base(tiny_base: Path, tmp_path: Path) -> None:
    pipe = load(tiny_base)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.01)
    pipe.unet.save_pretrained(tmp_path / "unet")
    weights = open_weights(tiny_base, tmp_path, "dreambooth")
    assert_merged(weights, pipe)
    assert weights.component("unet").changed == set(weights.component("unet").names())
    assert not weights.component("text_encoder").changed
    ours = noise_prediction(into_pipeline(weights, load(tiny_base)))
    assert np.array_equal(ours, noise_prediction(pipe))


def refused(base: Path, folder: Path, kind: str) -> str:
    with pytest.raises(RepositoryError) as failure:
        open_weights(base, folder, kind)
    text = str(failure.value)
    assert "\n" not in text
    return text


def test_a_lora_for_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    state = {f"{name}.down.weight": torch.zeros(4, 768), f"{name}.up.weight": torch.zeros(64, 4)}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    text = refused(tiny_base, tmp_path, "lora")
    assert "attn2.to_k: must fit the base's [64, 32], got up [64, 4] @ down [4, 768]" in text
    assert text.endswith("add it with --base of the model it was trained on")


def test_keys_that_match_nothing_are_named(tiny_base: Path, tmp_path: Path) -> None:
    state = {f"unet.down_blocks.{i}.attentions.9.to_k.lora.down.weight": torch.zeros(4, 8) for i in range(5)}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    text = refused(tiny_base, tmp_path, "lora")
    assert "got 5 that do not (unet.down_blocks.0.attentions.9.to_k.lora.down.weight, unet.down_blocks.1" in text
    assert ", ...)" in text


def test_half_a_lora_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight"
    save_file({name: torch.zeros(4, 32)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert "must have both LoRA halves, got down" in refused(tiny_base, tmp_path, "lora")


def test_a_dora_of_the_text_encoder_is_merged_as_peft_merges_it(tiny_base: Path, tmp_path: Path) -> None:
    """Held against peft itself: diffusers 0.42.1 leaves the lengths of a text encoder at those of the base."""
    model = load(tiny_base).text_encoder
    config = {"r": 2, "lora_alpha": 6, "target_modules": TEXT, "use_dora": True, "init_lora_weights": "gaussian"}
    model.add_adapter(LoraConfig(**config))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = {f"text_encoder.{key}": value for key, value in get_peft_model_state_dict(model).items()}
    metadata = {"text_encoder.r": 2, "text_encoder.lora_alpha": 6, "text_encoder.use_dora": True}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    ours, merged = open_weights(tiny_base, tmp_path, "lora").component("text_encoder"), 0
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_magnitude_vector"):
            layer.merge()
            found = ours.read(f"{name}.weight")
            assert np.abs(found - layer.base_layer.weight.detach().numpy()).max() <= TOLERANCE, name
            merged += 1
    assert merged == len(ours.changed) == 10


DORA = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "dora_scale"])
def test_dora_lengths_that_do_not_fit_are_refused(tiny_base: Path, tmp_path: Path, key: str) -> None:
    make_lora(tiny_base, tmp_path, **LORAS["attention only, alpha is the rank"])
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file) | {f"{DORA}.{key}": torch.ones(63)}, file)
    text = refused(tiny_base, tmp_path, "lora")
    assert "attn2.to_k: DoRA lengths must fit the base's [64, 32], got [63]; add it with --base of the model" in text


def test_a_dora_that_lost_its_lengths_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    make_lora(tiny_base, tmp_path, **LORAS["attention only, alpha is the rank"])
    file = tmp_path / "pytorch_lora_weights.safetensors"
    config = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_dora": True}
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert "a DoRA must hold its lengths, got none; save the LoRA again" in refused(tiny_base, tmp_path, "lora")


@pytest.mark.parametrize("axis", [0, 1], ids=["per output", "per input"])
def test_dora_scale_is_merged_as_lycoris_does(tiny_base: Path, tmp_path: Path, axis: int) -> None:
    """LyCORIS: dora_scale / norm(weight) * weight, the norm over all axes but the one dora_scale lies along."""
    torch.manual_seed(4)
    state, wanted = {}, {}
    plain = open_weights(tiny_base, None, "base").component("unet")
    for name in ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1"):
        weight = torch.tensor(np.array(plain.read(f"{name}.weight")))
        down = torch.randn(4, *weight.shape[1:]) * 0.1
        up = torch.randn(weight.shape[0], 4, *[1] * (weight.ndim - 2)) * 0.1
        side = [1] * weight.ndim
        side[axis] = weight.shape[axis]
        scale = torch.rand(side) + 0.5
        flat = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.dora_scale": scale}
        state[f"{flat}.alpha"] = torch.tensor(2.0)
        merged = weight + 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        turned = merged.transpose(0, axis)
        norm = turned.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1)).transpose(0, axis)
        wanted[f"{name}.weight"] = merged * (scale / norm)
    save_file(state, tmp_path / "dora.safetensors")
    ours = open_weights(tiny_base, tmp_path, "lora").component("unet")
    assert ours.changed == set(wanted)
    for name, value in wanted.items():
        assert np.abs(ours.read(name) - value.numpy()).max() <= TOLERANCE, name


def test_a_regular_expression_as_alpha_pattern_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    make_lora(tiny_base, tmp_path, **LORAS["attention only, alpha is the rank"])
    file = tmp_path / "pytorch_lora_weights.safetensors"
    config = {"unet.r": 4, "unet.lora_alpha": 7, "unet.alpha_pattern": {"(.*)+to_k": 3}}  # peft itself never ends on it
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert "alpha_pattern must name modules plainly, got '(.*)+to_k'" in refused(tiny_base, tmp_path, "lora")


def test_an_embedding_of_another_width_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    save_file({"<dog>": torch.zeros(2, 768)}, tmp_path / "learned_embeds.safetensors")
    text = refused(tiny_base, tmp_path, "textual_inversion")
    assert "<dog>: must be vectors of the base's width 32, got [2, 768]; add it with --base" in text


def test_a_token_that_the_base_already_has_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    save_file({"dog</w>": torch.zeros(2, 32)}, tmp_path / "learned_embeds.safetensors")
    assert "token must be new to the base's tokenizer, got 'dog</w>'" in refused(
        tiny_base, tmp_path, "textual_inversion"
    )


def test_custom_diffusion_for_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
    save_file({name: torch.zeros(64, 768)}, tmp_path / "cd.safetensors")
    text = refused(tiny_base, tmp_path, "custom_diffusion")
    assert "attn2.to_k.weight: must fit the base's [64, 32], got [64, 768]" in text


def test_a_file_of_another_kind_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    save_file({"<dog>": torch.zeros(2, 32)}, tmp_path / "learned_embeds.safetensors")
    text = refused(tiny_base, tmp_path, "lora")
    assert "must hold lora weights as safetensors, got learned_embeds.safetensors (textual_inversion)" in text


def test_a_full_fine_tune_of_another_architecture_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(state, file)
    text = refused(tiny_base, tmp_path, "dreambooth")
    assert "unet.conv_in.weight: must be [32, 4, 3, 3] as in the base, got [32, 9, 3, 3]" in text
