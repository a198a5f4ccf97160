"""Checkpoints of real dimensions with seeded random weights, made without torch, and specs for them: sizes and speeds only.

Random weights have no concept to lose (nothing here says anything about quality), but bytes, kernels and times are those
of the real thing. `tiny` is for trying the benchmarks out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from exporters.graphs.family import Family, open_family
from exporters.plain import row_layers, unquantised_spec
from personalq.numerics import INT7, INT8, absmax_scale
from personalq.repository import SHIPPED, Repository
from personalq.repository.identity import weights_sha256
from personalq.rows import KeptTokens
from personalq.spec import LayerSpec, RowsSpec, SpecFile
from personalq.weights.checkpoint import open_weights

BASE, CHECKPOINTS = "base", ("first", "next")
WEIGHTS = "model.safetensors"
WEIGHTS_OF = {"w8a8": INT8, "w7a8": INT7}
LORA_TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")
POOL = 1 << 24  # normals drawn once; every tensor is a window of them

_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_XL = _UNET | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TINY = _UNET | {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 64,
}
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_TEXT_2 = _TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "eos_token_id": 2,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}
_TINY_TEXT = _TEXT | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_VAE = _VAE | {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
ARCHES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"unet": _TINY, "text_encoder": _TINY_TEXT, "vae": _TINY_VAE},
    "sd15": {"unet": _UNET, "text_encoder": _TEXT, "vae": _VAE},
    "sdxl": {"unet": _XL, "text_encoder": _TEXT, "text_encoder_2": _TEXT_2, "vae": _VAE | {"sample_size": 1024}},
}
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class Large:
    """A repository with one base and two full fine-tunes of it, 'first' and 'next', FP16."""

    repository: Repository
    family: Family

    def spec(self, checkpoint: str, name: str) -> Path:
        """The spec of a checkpoint, or of the base: 'w8a8', 'w7a8', or unquantised 'fp32' or 'fp16'."""
        folder = self.repository.root / "specs" / checkpoint
        path = folder / f"{name}.json"
        if not path.is_file():
            made = self._quantised(checkpoint, name) if name in WEIGHTS_OF else self._plain(checkpoint, name)
            made.write(path)
        return path

    def _plain(self, checkpoint: str, name: str) -> SpecFile:
        whole = self.repository.whole(checkpoint)
        sha256 = weights_sha256(whole.base_dir, whole.checkpoint_dir)
        return unquantised_spec(self.family, checkpoint, sha256, name)

    def _quantised(self, checkpoint: str, bits: str) -> SpecFile:
        """Everything but the first and last convolution, weights by absmax, activations in 8 bits by a fixed scale."""
        weight = WEIGHTS_OF[bits]
        plain = self._plain(checkpoint, "fp16").spec
        whole = self.repository.whole(checkpoint)
        unet = open_weights(whole.base_dir, whole.checkpoint_dir, "dreambooth").component("unet")
        layers, tensors = {}, {}
        for name, layer in plain.layers.items():
            if name in ("conv_in", "conv_out"):
                layers[name] = layer
                continue
            layers[name] = LayerSpec(op=layer.op, weight=weight.name, activation="int8", found_by="fixed")
            tensors[f"{name}.weight_scale"] = absmax_scale(unet.read(f"{name}.weight"), weight, 0)
            tensors[f"{name}.input_scale"] = np.float32(6 / 127)
            tensors[f"{name}.output_scale"] = np.float32(6 / 127)
        kept = KeptTokens(slots=8, bos=True, of_adapter=("trigger",) if whole.is_base else ())
        rows = RowsSpec(kept=kept, layers=tuple(row_layers(self.family)))
        fields = {"name": bits, "policy": "fixed", "bits": bits, "layers": layers, "rows": rows}
        return SpecFile(plain.model_copy(update=fields), {k: np.asarray(v) for k, v in tensors.items()})


def build(folder: Path, arch: str, progress: Callable[[str], None]) -> Large:
    """Make (or find again) the repository of one architecture under `folder`."""
    base = folder / "bases" / BASE
    write_configs(base, arch)
    family = open_family(folder / "families", base, lambda text, _: progress(text))
    for component, graphs in (
        ("unet", ("unet", "text_rows")),
        ("text_encoder", ("text_encoder",)),
        ("text_encoder_2", ("text_encoder_2",)),
        ("vae", ("vae_decoder",)),
    ):
        if component in family.configs:
            shapes = {name: shape for graph in graphs for name, shape in parameters(family.graph(graph)).items()}
            if component == "unet":
                files = [folder / "checkpoints" / name / component / WEIGHTS for name in CHECKPOINTS]
                for seed, file in enumerate(files):
                    write_random(file, shapes, seed, progress)
                if not (base / component / WEIGHTS).is_file():  # the base is the first one's twin: disk is saved
                    (base / component / WEIGHTS).hardlink_to(files[0])
            else:
                write_random(base / component / WEIGHTS, shapes, 0, progress)
    for name in CHECKPOINTS:
        card = {"id": name, "name": name, "kind": "dreambooth", "base": BASE, "trigger": ["sks"], "class_noun": "dog"}
        (folder / "checkpoints" / name / "card.json").write_text(json.dumps(card))
    return Large(Repository.open(folder), family)


def write_lora(large: Large, name: str, rank: int, seed: int, targets: Sequence[str] = LORA_TARGETS) -> None:
    """checkpoints/<name>: a random LoRA over every attention, alpha = rank, as kohya-ss names it, float16."""
    folder = large.repository.root / "checkpoints" / name
    if (folder / "card.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    unet = open_weights(large.repository.root / "bases" / BASE, None, "dreambooth").component("unet")
    random, tensors = np.random.default_rng(seed), {}
    for parameter in unet.names():
        layer, shape = parameter.removesuffix(".weight"), unet.shape(parameter)
        if len(shape) != 2 or not layer.endswith(tuple(targets)):
            continue
        where = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{where}.lora_down.weight"] = random.standard_normal((rank, shape[1])) / shape[1] ** 0.5
        tensors[f"{where}.lora_up.weight"] = random.standard_normal((shape[0], rank)) * 0.02
        tensors[f"{where}.alpha"] = np.array(rank)
    save_file({key: value.astype(np.float16) for key, value in tensors.items()}, folder / f"{name}.safetensors")
    card = {"id": name, "name": name, "kind": "lora", "base": BASE, "trigger": ["sks"], "class_noun": "dog"}
    (folder / "card.json").write_text(json.dumps(card))


def write_configs(base: Path, arch: str) -> None:
    """The base's configs and scheduler; the gallery's tokenizer (a small one: ids change no time)."""
    for component, config in ARCHES[arch].items():
        (base / component).mkdir(parents=True, exist_ok=True)
        (base / component / "config.json").write_text(json.dumps(config))
    (base / "scheduler").mkdir(exist_ok=True)
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(_SCHEDULER))
    shipped = next((SHIPPED / "bases").iterdir()) / "tokenizer"
    names = ("tokenizer", *(["tokenizer_2"] if "text_encoder_2" in ARCHES[arch] else []))
    for name in names:
        shutil.copytree(shipped, base / name, dirs_exist_ok=True)
    classes = {name: ["diffusers", name] for name in ARCHES[arch]}
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **classes}))


def parameters(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor a graph reads, with its shape."""
    values = model.graph.initializers.items()
    return {
        n: tuple(int(s) for s in v.shape.numpy()) for n, v in values if isinstance(v.const_value, ir.ExternalTensor)
    }


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, progress: Callable[[str], None]) -> None:
    """Write float16 weights, normal / sqrt(fan in), norms 1 and biases 0, tensor by tensor, once."""
    if path.is_file():
        return
    progress(f"writing random weights: {path.parent.parent.name}/{path.parent.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    pool = random.standard_normal(POOL, np.float32)
    header, place = {}, 0
    for name, shape in sorted(shapes.items()):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in sorted(shapes.items()):
            file.write(_values(shape, pool, random).tobytes())
    temporary.rename(path)


def _values(shape: tuple[int, ...], pool: Any, random: np.random.Generator) -> Any:
    if len(shape) < 2:
        return np.full(shape, 0.02, np.float16)
    count, start = int(np.prod(shape)), int(random.integers(POOL))
    window = np.concatenate([pool[start : start + count], pool[: max(0, start + count - POOL)]])
    window = np.resize(window, count)  # tensors larger than the pool repeat it
    return (window / np.sqrt(np.float32(count / shape[0]))).astype(np.float16).reshape(shape)
