"""A base from one file, offline: configs from shapes, CLIP's tokenizer, and the weights that diffusers' conversion gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402  (after the skip)
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402

from exporters.graphs.family import NOTE, SHIPPED  # noqa: E402
from personalq.architecture import family_key  # noqa: E402
from personalq.errors import RepositoryError  # noqa: E402
from personalq.repository import Repository  # noqa: E402
from personalq.weights.checkpoint import open_weights  # noqa: E402
from personalq.weights.one_file.clip_tokenizer import tokenizer_json, vocabulary, write_tokenizer  # noqa: E402
from personalq.weights.one_file.infer import infer_configs, infer_shapes  # noqa: E402
from personalq.weights.one_file.original import ENCODERS, places  # noqa: E402
from tests.personalq.weights.test_against_diffusers import quietly  # noqa: E402

PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
HERE = {
    "sd1": {ENCODERS["text_encoder"][0][0]},
    "sd2": {ENCODERS["text_encoder"][2][0]},
    "sdxl": {ENCODERS["text_encoder"][1][0], ENCODERS["text_encoder_2"][0][0]},
}


def modules(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    made = {
        "unet": UNet2DConditionModel.from_config(configs["unet"]),
        "vae": AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
    }
    if "text_encoder_2" in configs:
        made["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
    return made


def original_shapes(models: dict[str, Any], name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a one-file checkpoint of these models, as their authors' code saves them."""
    found: dict[str, tuple[int, ...]] = {}
    for component, model in models.items():
        shapes = {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
        for parameter, place in places(component, shapes, frozenset(HERE[name])).items():
            shape = shapes[parameter][::-1] if place.is_transposed else shapes[parameter]
            shape = shape if place.third is None else (3 * shape[0], *shape[1:])
            found[place.name] = (*shape, 1, 1) if "mid.attn_1" in place.name and len(shape) == 2 else shape
    if name == "sd2":  # the last layer, which nobody reads
        layers = [key for key in found if ".resblocks." in key]
        last = max(int(key.split(".resblocks.")[1].split(".")[0]) for key in layers)
        ends = [key for key in layers if f".resblocks.{last}." in key]
        found |= {key.replace(f".resblocks.{last}.", f".resblocks.{last + 1}."): found[key] for key in ends}
    return found


FAMILIES = [json.loads(file.read_text()) for file in sorted(SHIPPED.glob(f"*/{NOTE}"))]
PUBLISHED = [note for note in FAMILIES if note["configs"]["unet"]["cross_attention_dim"] in CONTEXT]


@pytest.mark.parametrize(
    "note", PUBLISHED, ids=[CONTEXT[n["configs"]["unet"]["cross_attention_dim"]] for n in PUBLISHED]
)
def test_shapes_of_a_published_model_give_its_family(note: dict[str, Any]) -> None:
    """Stable Diffusion 1.5, 2.1 and XL at full size: the configs mean the graphs that are shipped traced."""
    name = CONTEXT[note["configs"]["unet"]["cross_attention_dim"]]
    with torch.device("meta"):
        models = modules(note["configs"])
    shapes = original_shapes(models, name)
    configs = infer_configs(shapes)
    assert family_key(configs) == note["key"]
    wanted = {c: {n: tuple(p.shape) for n, p in model.named_parameters()} for c, model in models.items()}
    assert infer_shapes(shapes, configs) == wanted


def small_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The published architecture with thirty-second parts of its widths and CLIP's whole vocabulary."""
    note = next(n for n in PUBLISHED if CONTEXT[n["configs"]["unet"]["cross_attention_dim"]] == name)
    configs = json.loads(json.dumps(note["configs"]))
    text = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "vocab_size": 49408}
    for component, config in configs.items():
        if component.startswith("text_encoder"):
            config |= text | {"num_hidden_layers": 2, "projection_dim": 64}
    if "text_encoder_2" in configs:  # diffusers tells SDXL's two encoders apart by their width
        configs["text_encoder_2"] |= {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    widths = [32, 64, 64, 64][: len(configs["unet"]["block_out_channels"])]
    depths = configs["unet"].get("transformer_layers_per_block", 1)
    configs["unet"] |= {
        "block_out_channels": widths,
        "cross_attention_dim": 192 if name == "sdxl" else 64,
        "attention_head_dim": 8 if name == "sd1" else [max(1, width // 64) for width in widths],
        "transformer_layers_per_block": depths if depths == 1 else [1, 2, 3],
    }
    if name == "sdxl":
        configs["unet"] |= {"projection_class_embeddings_input_dim": 64 + 6 * 32, "addition_time_embed_dim": 32}
    configs["vae"]["block_out_channels"] = [32, 32, 64, 64]
    with torch.device("meta"):
        models = modules(configs)
    return original_shapes(models, name)


def write_one(path: Path, name: str, *, seed: int = 1, **more: Any) -> dict[str, Any]:
    """A one-file checkpoint of the small architecture with seeded values as large as a fresh model's, and more tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in small_shapes(name).items():
        value = torch.randn(shape, generator=generator)
        # vectors are near what a norm begins with, matrices keep the size of what goes through them
        value = (
            1 + 0.1 * value
            if len(shape) == 1 and key.endswith("weight")
            else value * 0.5 * max(shape[1:] or (25,)) ** -0.5
        )
        tensors[key] = value.half()
    tensors |= {key: value for key, value in more.items() if value is not None}
    tensors = {key: value for key, value in tensors.items() if not any(k in key for k, v in more.items() if v is None)}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("name", PIPELINES)
def test_a_base_of_one_file_is_a_whole_pipeline(tmp_path: Path, name: str) -> None:
    import diffusers

    file = tmp_path / "dream.safetensors"
    tensors = write_one(file, name, **{"model_ema.decay": torch.ones(1), "alphas_cumprod": torch.ones(1000)})
    repository = Repository.open(tmp_path / "repo", create=True)
    made = repository.add_base(file)
    assert made.id == "dream" and repository.bases() == ["dream"]
    assert "left out 1 tensors of model_ema: training's moving average of the weights" in made.warnings
    assert any("does not say what it predicts" in text for text in made.warnings) == (name == "sd2")
    base = repository.root / "bases" / "dream"
    kind = getattr(diffusers, PIPELINES[name])
    pipe = quietly(kind.from_pretrained, base)
    wanted = quietly(kind.from_single_file, str(file), config=str(base))
    weights = open_weights(base, None, "dreambooth")
    for component in weights.components:
        theirs = dict(getattr(wanted, component).named_parameters())
        assert theirs.keys() == set(weights.component(component).names())
        for parameter, value in theirs.items():
            ours = np.asarray(weights.component(component).read(parameter), np.float32)
            np.testing.assert_array_equal(ours, value.detach().numpy(), err_msg=f"{component}.{parameter}")
    assert len(pipe.tokenizer) == 49408 and pipe.tokenizer.pad_token == ("!" if name == "sd2" else "<|endoftext|>")
    predicted = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}[name]
    assert pipe.scheduler.config.prediction_type == predicted
    assert len(tensors) > 100


def test_marks_and_header_of_the_file_go_into_its_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "noob.safetensors"
    write_one(file, "sdxl", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    repository = Repository.open(tmp_path / "repo", create=True)
    repository.add_base(file)
    config = json.loads((repository.root / "bases" / "noob" / "scheduler" / "scheduler_config.json").read_text())
    marked = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert config | marked == config


REFUSED = {
    "no VAE": ({"first_stage_model": None}, r"first_stage_model.decoder.conv_in.weight: must be in a whole one-file"),
    "no text encoder": ({"cond_stage_model": None}, r"text_encoder: must be in a whole one-file checkpoint"),
    "a tensor of nothing": (
        {"control_model.x": torch.ones(2)},
        r"got 1 that no model of the base has \(control_model.x\)",
    ),
}


@pytest.mark.parametrize(("more", "said"), REFUSED.values(), ids=REFUSED)
def test_half_a_model_is_refused_in_one_line(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    file = tmp_path / "half.safetensors"
    write_one(file, "sd1", **more)
    repository = Repository.open(tmp_path / "repo", create=True)
    with pytest.raises(RepositoryError, match=said) as one:
        repository.add_base(file)
    assert "\n" not in str(one.value) and repository.bases() == []
    assert not list((repository.root / "bases").glob("*"))


def test_a_delta_is_no_base(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    repository = Repository.open(tmp_path / "repo", create=True)
    with pytest.raises(RepositoryError, match="must be a whole model in the original layout, got none of its UNet's"):
        repository.add_base(tmp_path / "lora.safetensors")


def test_a_fine_tune_without_text_encoder_and_vae_takes_them_from_its_base(tmp_path: Path) -> None:
    write_one(tmp_path / "base.safetensors", "sd1")
    repository = Repository.open(tmp_path / "repo", create=True)
    repository.add_base(tmp_path / "base.safetensors")
    write_one(tmp_path / "dog.safetensors", "sd1", first_stage_model=None, cond_stage_model=None)
    result = repository.add(tmp_path / "dog.safetensors", base="base")
    assert [one.kind for one in result.added] == ["dreambooth"] and not result.refused
    folder = repository.checkpoint_dir("dog")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["unet"]
    weights = open_weights(repository.root / "bases" / "base", folder, "dreambooth")
    assert weights.component("unet").changed and not weights.component("vae").changed


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats_are_read_as_torch_reads_them(tmp_path: Path, dtype: str) -> None:
    from personalq.weights.tensorfile import TensorFile

    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    save_file({"x": every}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(TensorFile(tmp_path / "x.safetensors").read("x"), every.float().numpy())


TEXTS = ("a photo of a dog", "naïve café 日本語 🐶!!", "it'll (masterpiece:1.3) A_B\n\tx1", "", "<|endoftext|> end")


def test_the_shipped_tokenizer_is_clip_s(tmp_path: Path) -> None:
    vocab, merges = vocabulary()
    assert (len(vocab), vocab["dog</w>"], vocab["photo</w>"], vocab["<|endoftext|>"]) == (49408, 1929, 1125, 49407)
    write_tokenizer(tmp_path / "tokenizer", "<|endoftext|>")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()  # transformers makes its own from vocab.json and merges.txt
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    made = json.loads(theirs.backend_tokenizer.to_str())
    from tokenizers import Tokenizer

    ours = Tokenizer.from_str(json.dumps(tokenizer_json(vocab, merges)))
    assert json.loads(ours.to_str()) | {"truncation": None, "padding": None} == made | {
        "truncation": None,
        "padding": None,
    }
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids
