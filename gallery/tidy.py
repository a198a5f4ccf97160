"""Take out of shipped files what names the machine that made them: paths in configs, headers and graphs.

    python -m gallery.tidy

diffusers writes `_name_or_path`, peft a `base_model_name_or_path`, torch's exporter stack traces. Weights do not change.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SHIPPED = ("repository/bases", "repository/checkpoints", "repository/bundles", "judges")
PATH_KEYS = ("_name_or_path",)  # peft writes `unet.base_model_name_or_path`
MACHINE = re.compile(rb"/(?:home|root|tmp|work|Users|mnt|opt)/[\w.-]")


def shipped_files(folder: Path = FOLDER) -> Iterator[Path]:
    """Every file that a clone carries as data."""
    for part in SHIPPED:
        yield from (path for path in sorted((folder / part).rglob("*")) if path.is_file())


def names_a_machine(path: Path) -> bool:
    """Whether the readable part of a file (a safetensors header, else all of it) holds an absolute path."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return MACHINE.search(file.read(int.from_bytes(file.read(8), "little"))) is not None
    return MACHINE.search(path.read_bytes()) is not None


def tidy(path: Path) -> bool:
    """Clean one file in place (written beside, then renamed); whether anything had to change."""
    if not names_a_machine(path):
        return False
    cleaned = CLEANERS[path.suffix](path)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(cleaned)
    os.replace(temporary, path)
    path.chmod(0o644)
    return True


def _clean_json(path: Path) -> bytes:
    return (json.dumps(_without_paths(json.loads(path.read_text())), indent=2) + "\n").encode()


def _clean_safetensors(path: Path) -> bytes:
    from safetensors import safe_open
    from safetensors.numpy import save

    with safe_open(str(path), framework="numpy") as file:
        metadata = {key: _clean_text(value) for key, value in (file.metadata() or {}).items()}
        return save({name: file.get_tensor(name) for name in file.keys()}, metadata=metadata)  # noqa: SIM118


def _clean_text(value: str) -> str:
    try:
        return json.dumps(_without_paths(json.loads(value)))
    except ValueError:
        return value


def _clean_onnx(path: Path) -> bytes:
    import onnx

    model = onnx.load(path)
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    for item in [graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        item.doc_string = ""
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
    return model.SerializeToString()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if not k.endswith(PATH_KEYS)}
    return [_without_paths(v) for v in value] if isinstance(value, list) else value


CLEANERS = {".json": _clean_json, ".safetensors": _clean_safetensors, ".onnx": _clean_onnx}


def main() -> None:
    for path in shipped_files():
        if tidy(path):
            print(f"cleaned {path.relative_to(FOLDER)}")


if __name__ == "__main__":
    main()
