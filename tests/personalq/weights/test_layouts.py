"""One-file checkpoints: diffusers' own conversion, run on the same file, finds the same tensors under the same names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from safetensors.torch import load_file, save_file  # noqa: E402  (after the skip)

from personalq.repository import Repository  # noqa: E402
from personalq.weights.header import read_header  # noqa: E402
from personalq.weights.one_file.original import places  # noqa: E402
from tests.exporters import architectures  # noqa: E402

PREFIX = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}


def parameters(model: Any) -> dict[str, Any]:
    return {name: value.detach().half() for name, value in model.named_parameters()}


def components(pipe: Any) -> dict[str, dict[str, Any]]:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: parameters(getattr(pipe, name)) for name in names if getattr(pipe, name, None) is not None}


def one_file(pipe: Any, name: str, path: Path) -> dict[str, dict[str, Any]]:
    """Write a pipeline in the original layout (float16); return its tensors by component, as diffusers names them."""
    tensors: dict[str, Any] = {"model_ema.decay": torch.ones(1)}
    wanted = components(pipe)
    marks = frozenset({PREFIX.get(name, "conditioner.embedders.0.transformer."), "conditioner.embedders.1.model."})
    for component, state in wanted.items():
        fused: dict[str, dict[int, Any]] = {}
        for parameter, place in places(component, {n: tuple(v.shape) for n, v in state.items()}, marks).items():
            value = state[parameter].T.contiguous() if place.is_transposed else state[parameter]
            is_convolution = "mid.attn_1" in place.name and value.ndim == 2
            value = value[:, :, None, None] if is_convolution else value
            if place.third is None:
                tensors[place.name] = value.contiguous()
            else:
                fused.setdefault(place.name, {})[place.third] = value
        tensors |= {key: torch.cat([thirds[i] for i in range(3)]) for key, thirds in fused.items()}
    save_file(tensors, path)
    return wanted


def theirs(pipe: Any, name: str, path: Path) -> dict[str, dict[str, Any]]:
    """The same file through diffusers' conversion functions."""
    from diffusers.loaders import single_file_utils as convert

    checkpoint = load_file(path)
    made = {
        "unet": convert.convert_ldm_unet_checkpoint(dict(checkpoint), dict(pipe.unet.config)),
        "vae": convert.convert_ldm_vae_checkpoint(dict(checkpoint), dict(pipe.vae.config)),
    }
    if name == "sd1":
        made["text_encoder"] = convert.convert_ldm_clip_checkpoint(dict(checkpoint))
    if name == "sdxl":
        made["text_encoder"] = convert.convert_ldm_clip_checkpoint(dict(checkpoint))
        made["text_encoder_2"] = convert.convert_open_clip_checkpoint(
            pipe.text_encoder_2, dict(checkpoint), prefix="conditioner.embedders.1.model."
        )
    if name == "sd2":
        made["text_encoder"] = convert.convert_open_clip_checkpoint(
            pipe.text_encoder, dict(checkpoint), prefix="cond_stage_model.model."
        )
    return made


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix("text_model."): value
        for name, value in state.items()
        if not name.endswith("position_ids") and isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_one_file_checkpoint_is_unpacked_as_diffusers_does(name: str, tmp_path: Path) -> None:
    pipe = getattr(architectures, name)()
    pipe.save_pretrained(tmp_path / "tiny")
    file = tmp_path / "civitai-dog.safetensors"
    wanted = one_file(pipe, name, file)
    oracle = theirs(pipe, name, file)
    repository = Repository.open(tmp_path / "repo", create=True)
    repository.add_base(tmp_path / "tiny")
    added = repository.add(file, base="tiny")
    assert not added.refused, added.refused
    assert added.added[0].kind == "dreambooth"
    folder = repository.checkpoint_dir("civitai-dog")
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(wanted)
    for component in wanted:
        got = plain(load_file(next((folder / component).glob("*.safetensors"))))
        converted = plain(oracle[component])
        assert set(got) == set(plain(wanted[component]))
        assert set(got) <= set(converted)
        for key, value in got.items():
            np.testing.assert_array_equal(value.numpy(), converted[key].reshape(value.shape).numpy(), err_msg=key)
    record = json.loads((folder / "added.json").read_text())["files"]
    assert "unet/diffusion_pytorch_model.safetensors" in record
    assert not repository.check()


def test_a_one_file_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    architectures.sd2().save_pretrained(tmp_path / "tiny")
    file = tmp_path / "dog.safetensors"
    one_file(architectures.sd1(), "sd1", file)
    repository = Repository.open(tmp_path / "repo", create=True)
    assert "one-file checkpoints need their base" in repository.add(file).refused[0].reason
    repository.add_base(tmp_path / "tiny")
    reason = repository.add(file, base="tiny").refused[0].reason
    assert "name its own base with --base" in reason
    shapes = read_header(file).shapes
    assert any(name.startswith("model.diffusion_model.") for name in shapes)
    assert repository.entries() == []


def test_kohya_names_in_the_original_layout_mean_the_same_modules(tmp_path: Path) -> None:
    """SDXL LoRAs as kohya-ss writes them, beside the same file in diffusers' names: equal merged weights."""
    from personalq.weights.checkpoint import open_weights

    architectures.sdxl().save_pretrained(tmp_path / "tiny")
    random = np.random.default_rng(0)
    halves = {"lora_down": (4, 64), "lora_up": (64, 4)}
    values = {
        half: torch.from_numpy(random.standard_normal(shape).astype(np.float32)) for half, shape in halves.items()
    }
    block = "transformer_blocks_0_attn1_to_q"
    for folder, module in (
        ("original", f"lora_unet_input_blocks_3_1_{block}"),
        ("diffusers", f"lora_unet_down_blocks_1_attentions_0_{block}"),
    ):
        (tmp_path / folder).mkdir()
        save_file({f"{module}.{half}.weight": v for half, v in values.items()}, tmp_path / folder / "lora.safetensors")
    merged = [
        open_weights(tmp_path / "tiny", tmp_path / f, "lora").component("unet") for f in ("original", "diffusers")
    ]
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert merged[0].changed == merged[1].changed == frozenset({name})
    np.testing.assert_array_equal(merged[0].read(name), merged[1].read(name))
