"""Text rows: as many as a prompt has for ONNX Runtime and OpenVINO, 77 and nothing open for TensorRT."""

from pathlib import Path

import onnx_ir as ir
import pytest

from exporters.graphs.family import NOTE, SHIPPED
from exporters.graphs.passes.rows import assemble_rows, emit_storage_form, fix_row_count
from personalq.rows import pack_layers

FOLDERS = sorted(folder for folder in SHIPPED.iterdir() if (folder / NOTE).is_file())
shipped = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name[:8])


def sides(model: ir.Model, name: str) -> list[int | str]:
    """An input's or output's shape, symbols by name."""
    value = next(one for one in (*model.graph.inputs, *model.graph.outputs) if one.name == name)
    return [side if isinstance(side, int) else str(side.value) for side in value.shape]


@shipped
def test_a_shipped_family_takes_any_number_of_text_rows(folder: Path) -> None:
    unet, rows = (ir.load(folder / f"{name}.onnx") for name in ("unet", "text_rows"))
    assert sides(unet, "rows")[:2] == sides(rows, "text_embeds")[:2] == sides(rows, "rows")[:2] == ["batch", "tokens"]
    for model in (unet, rows):
        fixed = [v for node in model.graph for v in node.outputs if v.shape is not None and 77 in list(v.shape)]
        assert fixed == []


@shipped
def test_a_fixed_number_leaves_nothing_open(folder: Path) -> None:
    model = ir.load(folder / "unet.onnx")
    fix_row_count(model)
    assert sides(model, "rows")[:2] == ["batch", 77]
    shapes = [str(v.shape) for node in model.graph for v in node.outputs if v.shape is not None]
    assert not [shape for shape in shapes if "tokens" in shape]
    rows = next(value for value in model.graph.inputs if value.name == "rows")
    asked = [use.node for use in rows.uses() if use.node.op_type == "Shape"]
    assert [(node.attributes["start"].as_int(), node.attributes["end"].as_int()) for node in asked] == [(0, 1)]
    assert sum(77 in list(v.shape) for node in model.graph for v in node.outputs if v.shape) >= 4


def test_stored_rows_keep_the_open_side() -> None:
    unet, rows = (ir.load(FOLDERS[0] / f"{name}.onnx") for name in ("unet", "text_rows"))
    layers = pack_layers([("only", sides(rows, "rows")[2] // 2)])
    assemble_rows(unet, layers, 8)
    emit_storage_form(rows, layers, 8)
    assert {name: sides(unet, name)[1] for name in ("rest", "rest_scale", "kept", "row_index")} == {
        "rest": "tokens",
        "rest_scale": "tokens",
        "kept": 8,
        "row_index": "tokens",
    }
    assert [sides(rows, name)[1] for name in ("rows", "rest", "rest_scale", "kept")] == ["tokens"] * 3 + [8]
