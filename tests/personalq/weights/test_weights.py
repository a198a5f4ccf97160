"""Files on disk to parameters: dtypes, shards, old spellings, the hash, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from personalq.errors import RepositoryError
from personalq.weights.checkpoint import open_weights
from personalq.weights.tensorfile import TensorFile, widened

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with two small tensors in each model; no torch needed."""
    folder = tmp_path / "base"
    rng = np.random.default_rng(0)
    content = {
        UNET: {"conv_in.weight": (4, 4, 3, 3), "attn2.to_k.weight": (8, 6)},
        TEXT: {"embeddings.token_embedding.weight": (10, 6), "final_layer_norm.bias": (6,)},
        "vae/diffusion_pytorch_model.safetensors": {"decoder.conv_in.weight": (4, 4, 3, 3)},
    }
    for name, shapes in content.items():
        write(folder / name, {key: rng.standard_normal(shape).astype(np.float16) for key, shape in shapes.items()})
    return folder


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def refused(base: Path, folder: Path | None, kind: str = "lora") -> str:
    with pytest.raises(RepositoryError) as failure:
        open_weights(base, folder, kind)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_the_base_alone_is_read_in_its_own_dtype_by_memory_map(base: Path) -> None:
    weights = open_weights(base, None, "dreambooth")
    unet = weights.component("unet")
    assert unet.names() == ("attn2.to_k.weight", "conv_in.weight")
    assert unet.shape("conv_in.weight") == (4, 4, 3, 3)
    array = unet.read("conv_in.weight")
    assert array.dtype == np.float16 and not array.flags.writeable
    assert np.array_equal(array, load_file(base / UNET)["conv_in.weight"])
    assert not unet.changed and weights.added_tokens == () and weights.first_added_id == 10


def test_bf16_is_widened_exactly() -> None:
    values = np.array([0.0, -1.5, 3.0e38, 2.0**-130, np.inf], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(widened(bits), (bits.astype(np.uint32) << 16).view(np.float32))
    assert widened(bits)[1] == -1.5 and widened(bits)[4] == np.inf


def test_a_bf16_file_is_read_as_float32(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
    read = TensorFile(tmp_path / "x.safetensors").read("x")
    assert read.dtype == np.float32 and np.array_equal(read, values)


def test_sharded_models_are_read_through_their_index(base: Path) -> None:
    tensors = load_file(base / UNET)
    (base / UNET).unlink()
    names = {}
    for i, (key, value) in enumerate(tensors.items()):
        names[key] = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        write(base / "unet" / names[key], {key: value})
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    unet = open_weights(base, None, "dreambooth").component("unet")
    assert all(np.array_equal(unet.read(key), value) for key, value in tensors.items())
    (base / "unet" / names["conv_in.weight"]).unlink()
    assert "must be there because diffusion_pytorch_model.safetensors.index.json names it" in refused(base, None)


def test_text_encoder_names_lose_their_prefix_and_position_ids(base: Path) -> None:
    plain = open_weights(base, None, "dreambooth").component("text_encoder").names()
    old = {f"text_model.{key}": value for key, value in load_file(base / TEXT).items()}
    old["text_model.embeddings.position_ids"] = np.arange(77, dtype=np.int64)[None]
    write(base / TEXT, old)
    assert open_weights(base, None, "dreambooth").component("text_encoder").names() == plain


def test_the_second_text_encoder_gets_its_prefix(base: Path) -> None:
    write(base / "text_encoder_2/model.safetensors", {"text_projection.weight": np.ones((2, 2), np.float32)})
    write(base / "text_encoder_2/model.safetensors", {"final_layer_norm.bias": np.ones(2, np.float32)})
    assert open_weights(base, None, "lora").component("text_encoder_2").names() == ("text_model.final_layer_norm.bias",)


def test_old_vae_attention_names_become_the_new_ones(base: Path) -> None:
    file = base / "vae/diffusion_pytorch_model.safetensors"
    names = ("query.weight", "key.bias", "value.weight", "proj_attn.bias", "group_norm.weight")
    write(file, {f"decoder.mid_block.attentions.0.{name}": np.ones(2, np.float32) for name in names})
    found = open_weights(base, None, "dreambooth").component("vae").names()
    ends = {name.removeprefix("decoder.mid_block.attentions.0.") for name in found}
    assert ends == {"to_q.weight", "to_k.bias", "to_v.weight", "to_out.0.bias", "group_norm.weight"}


def test_new_tokens_start_after_the_tokenizer(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(8)}))
    delta = tmp_path / "delta"
    write(delta / "a.safetensors", {"<a>": np.ones((2, 6), np.float16)})
    write(delta / "b.safetensors", {"emb_params": np.full((1, 6), 2, np.float16)})
    weights = open_weights(base, delta, "textual_inversion")
    assert weights.first_added_id == 8
    assert weights.added_tokens == (("<a>", ("<a>", "<a>_1")), ("b", ("b",)))
    rows = weights.component("text_encoder").read("embeddings.token_embedding.weight")
    assert rows.shape == (11, 6) and rows.dtype == np.float32
    assert np.array_equal(rows[8:], [[1] * 6, [1] * 6, [2] * 6])


def test_a_pickle_is_refused_with_the_way_to_convert_it(base: Path, tmp_path: Path) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04")
    text = refused(base, tmp_path / "delta")
    assert "must be safetensors, got a pickle, which can run code when opened" in text
    assert text.endswith(f"nothing else: personalq convert {tmp_path / 'delta' / 'pytorch_lora_weights.bin'}")


def test_a_base_with_pickles_only_is_refused(base: Path) -> None:
    (base / UNET).unlink()
    (base / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}.")
    assert "must be safetensors, got a pickle" in refused(base, None)


def test_a_missing_base_model_is_refused(base: Path) -> None:
    (base / UNET).unlink()
    assert f"{base / 'unet'}: must hold the base's weights as safetensors, got none" in refused(base, None)


def test_a_missing_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    assert "must hold the checkpoint's weights, got nothing" in refused(base, tmp_path / "gone")


def test_an_empty_checkpoint_folder_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "delta").mkdir()
    assert "must hold lora weights as safetensors, got no safetensors file" in refused(base, tmp_path / "delta")
    assert "must hold unet/ or text_encoder/ or vae/" in refused(base, tmp_path / "delta", "dreambooth")


def test_a_truncated_file_is_refused(base: Path) -> None:
    (base / UNET).write_bytes((base / UNET).read_bytes()[:-10])
    assert f"{base / UNET}: must be a whole safetensors file, got" in refused(base, None)


def test_two_loras_in_one_folder_are_refused(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "delta" / f"{name}.safetensors", {"attn2.to_k.lora.up.weight": np.ones((8, 2), np.float32)})
    assert "must hold one lora file, got 2" in refused(base, tmp_path / "delta")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(RepositoryError, match=r"x: dtype must be one of F64, F32, F16, BF16.* got F8_E8M0; convert it"):
        TensorFile(tmp_path / "x.safetensors")


def test_unknown_names_are_refused(base: Path) -> None:
    weights = open_weights(base, None, "lora")
    with pytest.raises(RepositoryError, match="text_encoder_2: must be one of unet, text_encoder, vae"):
        weights.component("text_encoder_2")
    with pytest.raises(RepositoryError, match=r"nothing\.weight: must be a parameter of the checkpoint"):
        weights.component("unet").read("nothing.weight")
