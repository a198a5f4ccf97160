"""Does a delta (LoRA, Custom Diffusion, embedding, fine-tuned UNet) fit its base? Compares shapes in headers only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import RepositoryError
from .header import Header, read_header

Shapes = Mapping[str, tuple[int, ...]]
_PREFIX = re.compile(r"^(?:base_model\.model\.|lora_|transformer\.)?(unet|text_encoder_2|text_encoder|te1|te2|te)[._]")
_DOWN = re.compile(r"[._](?:lora_A|lora_down|lora\.down|down|lora_linear_layer\.down)(?:\.[a-z_]+)?\.weight$")
_UP = re.compile(r"[._](?:lora_B|lora_up|lora\.up|up|lora_linear_layer\.up)(?:\.[a-z_]+)?\.weight$")
_PARTS = {"unet": "unet", "text_encoder": "text_encoder", "te": "text_encoder", "te1": "text_encoder"}
_FOREIGN = ("input_blocks_", "middle_block_", "output_blocks_")


def component_shapes(folder: Path, component: str) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of one component ('unet') of a diffusers folder; empty when it has no safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _preferred(sorted((folder / component).glob("*.safetensors"))):
        shapes |= read_header(file).shapes
    return shapes


def _preferred(files: list[Path]) -> list[Path]:
    plain = [f for f in files if ".fp16" not in f.name and ".non_ema" not in f.name]
    return plain or files


def check_lora(header: Header, base: Path, *, where: str) -> tuple[str, ...]:
    """Raise RepositoryError unless every LoRA layer fits the base of the same name; return warnings."""
    known = {part: _flat(component_shapes(base, part)) for part in ("unet", "text_encoder")}
    unknown = 0
    for part, layer, axis, size in _lora_sides(header.shapes):
        if part not in known or layer.startswith(_FOREIGN):
            unknown += 1
            continue
        shape = known[part].get(layer)
        if shape is None:
            raise _other_base(where, base, f"a layer {part}.{layer}", "no such layer")
        if len(shape) < 2 or shape[axis] != size:
            side = "inputs" if axis else "outputs"
            raise _other_base(where, base, f"{size} {side} at {part}.{layer}", f"shape {list(shape)}")
    return (f"{unknown} LoRA tensors have names that could not be compared with the base",) if unknown else ()


def _lora_sides(shapes: Shapes) -> Iterator[tuple[str, str, int, int]]:
    """Yield (part, flat layer name, base axis, size): down gives the base's inputs (axis 1), up its outputs (axis 0)."""
    for name, shape in shapes.items():
        down, up = _DOWN.search(name), _UP.search(name)
        match = down or up
        if match is None or len(shape) < 2:
            continue
        stem = name[: match.start()]
        prefix = _PREFIX.match(stem)
        layer = re.sub(r"\.processor\.(to_\w+)_lora$", r".\1", stem[prefix.end() :] if prefix else stem)
        part = _PARTS.get(prefix.group(1), "text_encoder_2") if prefix else "unet"
        yield part, _flat_name(layer), 1 if down else 0, shape[1 if down else 0]


def _flat(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {_flat_name(n.removesuffix(".weight")): s for n, s in shapes.items() if n.endswith(".weight")}


def _flat_name(layer: str) -> str:
    # kohya writes '_' for '.'; transformers 5 drops the 'text_model.' level that older files keep.
    return layer.replace(".", "_").removeprefix("text_model_")


def check_custom_diffusion(header: Header, base: Path, *, where: str) -> None:
    """Raise RepositoryError unless the delta's K and V matrices have the shapes of the base's."""
    unet = component_shapes(base, "unet")
    for name, shape in header.shapes.items():
        match = re.match(r"(?:unet\.)?(.+)\.processor\.(to_[kv])_custom_diffusion\.weight$", name)
        if match is None:
            continue
        layer = f"{match.group(1)}.{match.group(2)}.weight"
        if unet.get(layer) != shape:
            raise _other_base(where, base, f"shape {list(shape)} at {layer}", _shape_text(unet.get(layer)))


def check_embedding(header: Header, base: Path, *, where: str) -> None:
    """Raise RepositoryError unless learned vectors have the width of the base's token embeddings ('clip_g': the second's)."""
    for name, shape in header.shapes.items():
        encoder = "text_encoder_2" if name == "clip_g" else "text_encoder"
        tables = (s for n, s in component_shapes(base, encoder).items() if n.endswith("token_embedding.weight"))
        table = next(tables, None)
        if table is not None and (not shape or shape[-1] != table[-1]):
            raise _other_base(
                where, base, f"{shape[-1] if shape else 0} numbers for {name[:40]}", f"{table[-1]} per token"
            )


def check_unet(folder: Path, base: Path, *, where: str) -> None:
    """Raise RepositoryError unless a fine-tuned UNet has exactly the layers of the base's."""
    mine, theirs = component_shapes(folder, "unet"), component_shapes(base, "unet")
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise _other_base(where, base, f"{_shape_text(mine.get(name))} at {name}", _shape_text(theirs.get(name)))


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "no such layer" if shape is None else f"shape {list(shape)}"


def _other_base(where: str, base: Path, got: str, has: str) -> RepositoryError:
    return RepositoryError(
        f"{where}: must fit the base {base.name!r}, got {got} where the base has {has}; "
        "it was made for another base: name the right one with --base"
    )
