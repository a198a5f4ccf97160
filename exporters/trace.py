"""Trace a family's graphs once, with torch: UNet from text rows, text rows, text encoder, VAE decoder.

The only exporter module that needs torch. Every initializer keeps the name of its torch parameter, so that another
checkpoint of the family is exported by reading weights by name (TensorRT refits and streams by the same names).
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

OPSET = 20  # GroupNorm becomes InstanceNormalization, which ONNX Runtime's CPU provider has a kernel for


class RowsAttention:
    """Attention processor that takes K and V from its slice of the packed rows instead of projecting text."""

    def __init__(self, offset: int, width: int):
        self.offset, self.width = offset, width

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """hidden_states (B, N, C), encoder_hidden_states = packed rows (B, 77, R) -> (B, N, C)."""
        end = self.offset + self.width
        query = attn.to_q(hidden_states)
        key, value = encoder_hidden_states[..., self.offset : end], encoder_hidden_states[..., end : end + self.width]
        batch, heads = query.shape[0], attn.heads
        query, key, value = (
            x.reshape(batch, -1, heads, x.shape[-1] // heads).transpose(1, 2) for x in (query, key, value)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).reshape(batch, -1, self.width)
        return attn.to_out[1](attn.to_out[0](attended))


def cross_attention_layers(unet: UNet2DConditionModel) -> list[tuple[str, int]]:
    """(module name, K/V width) of every cross-attention layer, in module order."""
    modules = unet.named_modules()
    return [(name, m.to_k.out_features) for name, m in modules if name.endswith(".attn2")]


class UNetFromRows(nn.Module):
    """sample (B,4,h,w), timestep (1,), rows (B,77,R) -> noise_pred (B,4,h,w), all float32."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        offset = 0
        for name, width in cross_attention_layers(unet):
            unet.get_submodule(name).set_processor(RowsAttention(offset, width))
            offset += 2 * width
        self.model = unet

    def forward(self, sample: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        return self.model(sample, timestep.expand(sample.shape[0]), rows, return_dict=False)[0]


class TextRows(nn.Module):
    """text_embeds (B,77,C) -> packed rows (B,77,R): K then V of every cross-attention layer, side by side."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.names = [name for name, _ in cross_attention_layers(unet)]
        self.model = unet

    def forward(self, text_embeds: Tensor) -> Tensor:
        layers = [self.model.get_submodule(name) for name in self.names]
        return torch.cat([project(text_embeds) for layer in layers for project in (layer.to_k, layer.to_v)], dim=-1)


class TextEncoder(nn.Module):
    """input_ids (B,77) int64 -> last_hidden_state (B,77,C) float32 (final layer norm applied, as SD 1.x uses it)."""

    def __init__(self, model: CLIPTextModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


class VaeDecoder(nn.Module):
    """latent (B,4,h,w), already divided by the scaling factor -> image (B,3,H,W) in -1..1."""

    def __init__(self, model: AutoencoderKL):
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent, return_dict=False)[0]


def trace_graphs(configs: dict[str, dict[str, Any]]) -> dict[str, ir.Model]:
    """Family configs (component -> diffusers/transformers config) -> graphs without weights, by name.

    Dynamic batch, height and width. Weights play no part: the models are built from their configs, seeded.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(configs["unet"]).eval()
    text_config = CLIPTextConfig.from_dict(configs["text_encoder"] | {"dtype": "float32"})
    text = CLIPTextModel._from_config(text_config, attn_implementation="sdpa").eval()
    vae = AutoencoderKL.from_config(configs["vae"]).eval()
    side, length = configs["unet"]["sample_size"], configs["text_encoder"].get("max_position_embeddings", 77)
    width = sum(2 * w for _, w in cross_attention_layers(unet))
    latents = torch.randn(2, configs["unet"]["in_channels"], side, side)
    # diffusers' Upsample2D branches at batch 64 (a layout hint only), which torch.export takes for a limit.
    batch, area = torch.export.Dim("batch", max=63), {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    graphs = {
        "text_rows": _trace(
            TextRows(unet),
            (torch.randn(2, length, configs["unet"]["cross_attention_dim"]),),
            ["text_embeds"],
            ["rows"],
            [{0: batch}],
        ),
        "text_encoder": _trace(
            TextEncoder(text),
            (torch.ones(2, length, dtype=torch.long),),
            ["input_ids"],
            ["last_hidden_state"],
            [{0: batch}],
        ),
        "vae_decoder": _trace(
            VaeDecoder(vae), (latents[:, : vae.config.latent_channels],), ["latent"], ["image"], [{0: batch, **area}]
        ),
    }
    graphs["unet"] = _trace(
        UNetFromRows(unet),
        (latents, torch.tensor([500.0]), torch.randn(2, length, width)),
        ["sample", "timestep", "rows"],
        ["noise_pred"],
        [{0: batch, **area}, {}, {0: batch}],
    )
    return graphs


def _trace(
    module: nn.Module, args: tuple[Tensor, ...], inputs: list[str], outputs: list[str], shapes: list[dict[int, Any]]
) -> ir.Model:
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            module.eval(),
            args,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=tuple(shapes),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    return clean(program.model, {name for name, _ in module.named_parameters()})


@contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporter warns about its own deprecations and packages we do not use; its errors still come through."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def clean(model: ir.Model, parameters: set[str]) -> ir.Model:
    """Fold constants that no checkpoint tensor feeds, drop dead nodes, and name initializers like parameters (no 'model.')."""

    def should_fold(node: ir.Node) -> bool | None:
        reads = any(v is not None and v.is_initializer() and v.name in parameters for v in node.inputs)
        return False if reads else None

    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    steps: list[Callable[[ir.Model], Any]] = [
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.NameFixPass(),
    ]
    for step in steps:
        step(model)
    for name in sorted(parameters & set(model.graph.initializers)):
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix("model.")
        model.graph.initializers[value.name] = value
    share_constants(model, {name.removeprefix("model.") for name in parameters})
    strip_notes(model)
    return model


def share_constants(model: ir.Model, parameters: set[str]) -> None:
    """Merge equal constants that are not checkpoint tensors, and give them short, stable names."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name in [n for n in model.graph.initializers if n not in parameters]:
        value = model.graph.initializers[name]
        array = value.const_value.numpy()
        same = first.setdefault((str(array.dtype), array.shape, array.tobytes()), value)
        if same is not value:
            ir.convenience.replace_all_uses_with(value, same)
            del model.graph.initializers[name]
    for index, value in enumerate(first.values()):
        model.graph.initializers.pop(value.name)
        value.name = f"c{index}"
        model.graph.initializers[value.name] = value


def strip_notes(model: ir.Model) -> None:
    """Remove what only a debugger wants: doc strings, metadata (it holds file paths of the tracing machine), stack traces."""
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.initializers.values(), *model.graph.inputs]:
        value.metadata_props.clear()
        value.doc_string = None
