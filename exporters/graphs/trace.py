"""Trace a family's graphs once, with torch: UNet from text rows, text rows, text encoder, VAE decoder.

The only exporter module that needs torch. Every initializer keeps the name of its torch parameter, so that another
checkpoint of the family is exported by reading weights by name (TensorRT refits and streams by the same names).
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

NEVER_EVEN = 32  # diffusers takes skips' sizes unless 2 to this power divides both sides
OPSET = 20  # GroupNorm becomes InstanceNormalization, which ONNX Runtime's CPU provider has a kernel for


def attend(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention written out: query (B,N,C), key and value (B,M,C) -> (B,N,C), the output projection applied.

    torch's fused operator exports as a dozen shape computations around the same two products; this form has none of them.
    """
    query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
    scores = (query.permute(0, 2, 1, 3) * attn.scale) @ key.permute(0, 2, 3, 1)
    attended = torch.softmax(scores, dim=-1) @ value.permute(0, 2, 1, 3)
    return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


class SelfAttention:
    """Attention processor of a self-attention layer."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """hidden_states (B, N, C) -> (B, N, C)."""
        return attend(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))


class RowsAttention:
    """Attention processor that takes K and V from its slice of the packed rows instead of projecting text."""

    def __init__(self, offset: int, width: int):
        self.offset, self.width = offset, width

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """hidden_states (B, N, C), encoder_hidden_states = packed rows (B, 77, R) -> (B, N, C)."""
        end = self.offset + self.width
        key, value = encoder_hidden_states[..., self.offset : end], encoder_hidden_states[..., end : end + self.width]
        return attend(attn, attn.to_q(hidden_states), key, value)


def cross_attention_layers(unet: UNet2DConditionModel) -> list[tuple[str, int]]:
    """(module name, K/V width) of every cross-attention layer, in module order."""
    modules = unet.named_modules()
    return [(name, m.to_k.out_features) for name, m in modules if name.endswith(".attn2")]


def upsample(layer: Upsample2D, hidden_states: Tensor, output_size: Sequence[Any]) -> Tensor:
    """hidden_states (B,C,h,w) -> (B,C,*output_size): each pixel twice, the last one once where a side is odd."""
    upsampled: Tensor = layer.conv(nn.functional.interpolate(hidden_states, size=output_size, mode="nearest"))
    return upsampled


def follow_skips(unet: UNet2DConditionModel) -> None:
    """Upsample to the size of the skip connection that is joined next, for every size.

    diffusers does so where a side of the latents cannot be halved evenly as often as the UNet halves it, and doubles where it
    can, which is the same. A trace takes one of the two ways.
    """
    unet.num_upsamplers = NEVER_EVEN
    for module in unet.modules():
        if isinstance(module, Upsample2D):
            module.forward = partial(upsample, module)


class UNetFromRows(nn.Module):
    """sample (B,4,h,w), timestep (1,), rows (B,77,R) -> noise_pred (B,4,h,w), all float32.

    SDXL has two more inputs: text_embeds (B,P), the second encoder's pooled text, and time_ids (B,6).
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        offset = 0
        for name, width in cross_attention_layers(unet):
            unet.get_submodule(name).set_processor(RowsAttention(offset, width))
            unet.get_submodule(name.removesuffix("2") + "1").set_processor(SelfAttention())
            offset += 2 * width
        follow_skips(unet)
        self.model = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        rows: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        steps = timestep.expand(sample.shape[0])
        return self.model(sample, steps, rows, added_cond_kwargs=added, return_dict=False)[0]


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
    """input_ids (B,77) int64 -> last_hidden_state (B,77,C) float32 (final layer norm applied, as SD 1.x and 2.x use it)."""

    def __init__(self, model: CLIPTextModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


class PenultimateEncoder(nn.Module):
    """input_ids (B,77) int64 -> the states before the last layer (B,77,C), which SDXL attends to; no layer norm.

    With a projection (the second encoder) also the pooled text (B,P).
    """

    def __init__(self, model: CLIPTextModel | CLIPTextModelWithProjection):
        super().__init__()
        self.model = model
        self.is_pooled = isinstance(model, CLIPTextModelWithProjection)

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = self.model(input_ids=input_ids, output_hidden_states=True)
        return (out.hidden_states[-2], out.text_embeds) if self.is_pooled else out.hidden_states[-2]


class VaeDecoder(nn.Module):
    """latent (B,4,h,w), already divided by the scaling factor -> image (B,3,H,W) in -1..1."""

    def __init__(self, model: AutoencoderKL):
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent, return_dict=False)[0]


# diffusers' Upsample2D branches at batch 64 (a layout hint only), which torch.export turns into an upper bound.
BATCH = torch.export.Dim("batch", max=63)
# Text rows: 77 for each chunk of a prompt. The text encoders stay at 77, their position embeddings' number.
TOKENS = torch.export.Dim("tokens")
AREA = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}


def trace_graphs(configs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ir.Model]]:
    """Family configs (component -> diffusers/transformers config) -> (name, graph without weights), one by one.

    Dynamic batch, height and width. Weights are not needed and take no memory: every parameter is a single expanded zero.
    """
    length, is_sdxl = configs["text_encoder"].get("max_position_embeddings", 77), "text_encoder_2" in configs
    ids = torch.ones(2, length, dtype=torch.long)
    text = text_model(CLIPTextModel, configs["text_encoder"])
    encoder = PenultimateEncoder(text) if is_sdxl else TextEncoder(text)
    yield "text_encoder", _trace(encoder, (ids,), ["input_ids"], ["last_hidden_state"], [{0: BATCH}])
    if is_sdxl:
        second = PenultimateEncoder(text_model(CLIPTextModelWithProjection, configs["text_encoder_2"]))
        outputs = ["last_hidden_state", "text_embeds"]
        yield "text_encoder_2", _trace(second, (ids,), ["input_ids"], outputs, [{0: BATCH}])
    vae = hollow(AutoencoderKL.from_config, configs["vae"])
    side = configs["unet"]["sample_size"]
    latent = torch.randn(2, vae.config.latent_channels, side, side)
    yield "vae_decoder", _trace(VaeDecoder(vae), (latent,), ["latent"], ["image"], [{0: BATCH, **AREA}])
    unet = hollow(UNet2DConditionModel.from_config, configs["unet"])
    embeds = torch.randn(2, length, configs["unet"]["cross_attention_dim"])
    yield "text_rows", _trace(TextRows(unet), (embeds,), ["text_embeds"], ["rows"], [{0: BATCH, 1: TOKENS}])
    yield "unet", _trace_unet(unet, configs, length)


def _trace_unet(unet: UNet2DConditionModel, configs: dict[str, dict[str, Any]], length: int) -> ir.Model:
    config = configs["unet"]
    width = sum(2 * w for _, w in cross_attention_layers(unet))
    latents = torch.randn(2, config["in_channels"], config["sample_size"], config["sample_size"])
    inputs = ["sample", "timestep", "rows"]
    arguments: tuple[Tensor, ...] = (latents, torch.tensor([500.0]), torch.randn(2, length, width))
    shapes: list[dict[int, Any]] = [{0: BATCH, **AREA}, {}, {0: BATCH, 1: TOKENS}]
    if "text_encoder_2" in configs:
        pooled = configs["text_encoder_2"]["projection_dim"]
        inputs, arguments = [*inputs, "text_embeds", "time_ids"], (*arguments, torch.randn(2, pooled), torch.ones(2, 6))
        shapes += [{0: BATCH}, {0: BATCH}]
    return _trace(UNetFromRows(unet), arguments, inputs, ["noise_pred"], shapes)


def text_model(kind: type, config: dict[str, Any]) -> nn.Module:
    """A text encoder without weights, in the attention form that exports as plain products."""
    settings = CLIPTextConfig.from_dict(config | {"dtype": "float32"})
    return hollow(kind._from_config, settings, attn_implementation="sdpa")


def hollow(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Build a module whose parameters are single zeros, expanded to their shapes; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        module = build(*args, **kwargs)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        zeros = torch.zeros(1).expand(parameter.shape)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(zeros, requires_grad=False))
    return module.eval()


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
    """Remove what only debugging needs: doc strings, metadata (it holds file paths of the tracing machine), stack traces."""
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
