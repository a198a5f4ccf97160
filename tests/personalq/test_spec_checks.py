"""A spec whose tensors do not fit its decisions is refused with the layer's name."""

import numpy as np
import pytest

from personalq.errors import SpecError
from personalq.rows import KeptTokens
from personalq.spec import LayerSpec, RowsSpec, Spec, SpecFile, read_spec

BLOCKWISE = LayerSpec(op="linear", weight="int4", group=16, activation="float", rounding="stored")


def spec_file(layer: LayerSpec = BLOCKWISE, scales: tuple[int, ...] = (8, 2)) -> SpecFile:
    spec = Spec(
        name="taq-w4a16",
        policy="taq",
        bits="w4a16",
        checkpoint="rex",
        family="f",
        layers={"to_q": layer},
        rows=RowsSpec(kept=KeptTokens(), layers=()),
    )
    tensors = {
        "to_q.weight_q": np.ones((8, 32), np.int8),
        "to_q.weight_scale": np.ones(scales, np.float32),
        "to_q.input_scale": np.float32(1),
    }
    return SpecFile(spec, {name: np.asarray(value) for name, value in tensors.items()})


def test_a_blockwise_layer_comes_back_from_disk_as_it_was(tmp_path):
    path = spec_file().write(tmp_path / "taq-w4a16.json")
    again = read_spec(path)
    assert again.spec.layers["to_q"] == BLOCKWISE
    assert again.content_sha256() == spec_file().content_sha256()


def test_an_array_in_columns_first_order_comes_back_with_the_same_numbers(tmp_path):
    file = spec_file(scales=(8, 2))
    columns_first = np.asfortranarray(np.arange(16, dtype=np.float32).reshape(8, 2) + 1)
    path = SpecFile(file.spec, {**file.tensors, "to_q.weight_scale": columns_first}).write(tmp_path / "taq-w4a16.json")
    np.testing.assert_array_equal(read_spec(path).tensors["to_q.weight_scale"], columns_first)


@pytest.mark.parametrize(
    ("changed", "scales", "message"),
    [
        (
            {"activation": "int8"},
            (8, 2),
            r"to_q: group must be none unless the layer is a Linear with float activations",
        ),
        ({"op": "conv"}, (8, 2), r"to_q: group must be none unless the layer is a Linear"),
        (
            {"rounding": "nearest"},
            (8, 2),
            r"to_q: rounding must be 'stored' in a balanced, low-rank or blockwise layer",
        ),
        ({}, (8,), r"to_q.weight_scale: must be \(8, 32 / 16\), one scale per block, got \(8,\)"),
        ({"group": 24}, (8, 1), r"to_q.weight_scale: must be \(8, 32 / 24\)"),
        ({}, (8, 3), r"to_q.weight_scale: must be \(8, 32 / 16\), one scale per block, got \(8, 3\)"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(changed, scales, message):
    with pytest.raises(SpecError, match=message):
        spec_file(BLOCKWISE.model_copy(update=changed), scales)
