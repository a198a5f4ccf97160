"""Equal content is an equal file: goldens are part of a bundle, whose key is a hash."""

from pathlib import Path

import numpy as np
from safetensors import safe_open

from calibration.blob import same_bytes

METADATA = {name: f'{name} = "é"' for name in ("version", "prompts", "steps", "guidance", "layers", "blocks", "key")}


def test_the_same_content_is_the_same_bytes_and_is_read_back(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([7], np.int64)}
    orders = (METADATA, dict(reversed(METADATA.items())))
    made = {same_bytes(tensors, order) for order in orders for _ in range(9)}
    assert len(made) == 1
    file = tmp_path / "made.safetensors"
    file.write_bytes(made.pop())
    with safe_open(file, "np") as opened:
        assert opened.metadata() == METADATA
        assert {name: opened.get_tensor(name).tolist() for name in opened.keys()} == {  # noqa: SIM118
            name: value.tolist() for name, value in tensors.items()
        }
