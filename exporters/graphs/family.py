"""A family: the graphs that every checkpoint of one architecture shares, kept in the repository without weights.

`families/<key>-v<recipe>/` holds one ONNX file per graph (checkpoint tensors are external references to nothing, by name) and
`family.json`. The key hashes what fixes the graphs, so an equal architecture is traced once per tracing recipe. Tracing
takes minutes, so common families are shipped traced beside this file (SHIPPED; `tools/trace_families.py` writes them).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from personalq.architecture import family_key, read_configs
from personalq.errors import MissingExtraError
from personalq.repository.atomic import atomic_directory

from ..external_data import Report, silent
from ..lock import only_one

TRACE_VERSION = "4"
NOTE = "family.json"
SHIPPED = Path(__file__).parent / "families"
TRACERS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")
NOTHING = "left-out"


@dataclass(frozen=True)
class Family:
    """key, folder, and the configs the graphs were traced from."""

    key: str
    folder: Path
    configs: dict[str, dict[str, Any]]

    def graph(self, name: str) -> ir.Model:
        """A fresh, editable copy of one graph; its checkpoint tensors have shapes and types but no bytes."""
        return ir.load(self.folder / f"{name}.onnx")


def open_family(families: Path, base_dir: Path, progress: Report = silent) -> Family:
    """The family of `base_dir`'s architecture. One that the repository does not have yet is taken from those that PersonalQ
    ships, or traced now (torch needed)."""
    configs = read_configs(base_dir)
    key = family_key(configs)
    folder = families / family_name(key)
    if not is_traced(folder):
        with only_one(folder):
            if not is_traced(folder):
                shipped = SHIPPED / folder.name
                with atomic_directory(folder) as temporary:
                    if is_traced(shipped):
                        for file in shipped.iterdir():
                            shutil.copyfile(file, temporary / file.name)  # without its mode: packages may be read-only
                    else:
                        write_family(temporary, key, configs, progress)
    return Family(key, folder, configs)


def family_folder(families: Path, base_dir: Path) -> Path:
    """Where the family of `base_dir`'s architecture is, or will be. Raises RepositoryError for a base that is refused."""
    return families / family_name(family_key(read_configs(base_dir)))


def family_name(key: str) -> str:
    """The folder's name of a family as it is traced now."""
    return f"{key}-v{TRACE_VERSION}"


def is_traced(folder: Path) -> bool:
    """Whether a family's folder is there, whole."""
    return (folder / NOTE).is_file()


def write_family(folder: Path, key: str, configs: dict[str, dict[str, Any]], progress: Report = silent) -> None:
    """Trace an architecture into a folder that is there. Raises MissingExtraError without torch."""
    progress("tracing the family's graphs (once per architecture)", 0.0)
    for name, graph in _trace(configs):
        save_without_weights(graph, folder / f"{name}.onnx")
        progress(f"tracing the family's graphs (once per architecture): {name}", 0.0)
    versions = {name: version(name) for name in TRACERS}
    note = {"key": key, "trace_version": TRACE_VERSION, "versions": versions, "configs": configs}
    (folder / NOTE).write_text(json.dumps(note, indent=1, sort_keys=True) + "\n")


def _trace(configs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ir.Model]]:
    try:
        from .trace import trace_graphs
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    return trace_graphs(configs)


def save_without_weights(model: ir.Model, path: Path) -> None:
    """Write the graph; checkpoint tensors (named like torch parameters, so with a dot) become references to no file."""
    for name, value in model.graph.initializers.items():
        if "." in name:
            tensor = value.const_value
            value.const_value = ir.ExternalTensor(
                NOTHING, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=path.parent
            )
    ir.save(model, path)
