"""Checkpoint + spec -> the folder that Hugging Face optimum's ORTStableDiffusion(XL)Pipeline loads (optimum-onnx 0.1).

The UNet takes text embeddings in every step, its K and V projections of text inside and float; everything else is
quantised by the spec, with the same integers as a bundle's. How to use the folder: docs/export.md.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from personalq.architecture import SECOND_ENCODER
from personalq.errors import RepositoryError
from personalq.repository import Repository
from personalq.repository.atomic import atomic_directory
from personalq.repository.identity import weights_sha256
from personalq.repository.settings import SCHEDULER, Settings, read_settings
from personalq.spec import SpecFile, read_spec
from personalq.weights.checkpoint import CheckpointWeights, ComponentWeights, open_weights

from ..export import check_fits, fit_vocabulary
from ..external_data import Report, silent, write_graph
from ..graphs.family import Family, open_family
from ..graphs.lower_ort import STORAGE, Lowered, lower_unet, store_floats
from ..graphs.passes.inline import inline_rows, scalar_timestep
from ..graphs.passes.nodes import Builder
from ..tokenizer import write_tokenizer_folders

LAYOUT = "optimum"
MODEL, DATA = "model.onnx", "model.onnx_data"
ENCODERS = ("text_encoder", SECOND_ENCODER)
PIPELINES = {False: "StableDiffusionPipeline", True: "StableDiffusionXLPipeline"}


@dataclass(frozen=True)
class OptimumResult:
    """folder: what optimum loads; bytes: of everything in it; unet_bytes: of the UNet's graph and weights."""

    folder: Path
    spec: str
    bytes: int
    unet_bytes: int
    census: dict[str, int]
    seconds: float


def write_optimum(
    repository: Repository, checkpoint_id: str, spec_path: Path, folder: Path, progress: Report = silent
) -> OptimumResult:
    """Write `folder`, which must be new. Raises RepositoryError or SpecError, one line each; nothing is left behind."""
    started = time.perf_counter()
    refuse_existing(folder)
    card, spec_file = repository.card(checkpoint_id), read_spec(spec_path)
    base, checkpoint = repository.base_dir(card), repository.checkpoint_dir(card.id)
    weights = open_weights(base, checkpoint, card.kind)
    family = open_family(repository.root / "families", base, progress)
    check_fits(spec_file, card, {"family": family.key, "weights": weights_sha256(base, checkpoint)})
    storage = STORAGE[spec_file.spec.storage]
    with atomic_directory(folder) as place:
        unet = unet_graph(family, spec_file)
        (place / "unet").mkdir()
        source = weights.component("unet")
        write_graph(unet.model, unet.tensors, source.read, place / "unet" / MODEL, DATA, progress)
        for name in (one for one in ENCODERS if one in family.configs):
            model = text_graph(family, name, weights.component(name))
            _write(model, weights.component(name), place / name, storage)
        _write(vae_graph(family), weights.component("vae"), place / "vae_decoder", storage)
        write_settings(family, read_settings(base, checkpoint), weights, place)
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    of_unet = sum(size for file, size in sizes.items() if file.parent.name == "unet")
    seconds = time.perf_counter() - started
    return OptimumResult(folder, spec_file.spec.name, sum(sizes.values()), of_unet, unet.census, seconds)


def refuse_existing(folder: Path) -> None:
    """Raise RepositoryError when the folder is there already: it is never written into."""
    if folder.exists():
        raise RepositoryError(f"{folder}: must not exist yet, got something of that name; name a new --out folder")


def unet_graph(family: Family, spec_file: SpecFile) -> Lowered:
    """The `ort` lowering under the names optimum reads, text embeddings in place of rows."""
    rows = family.graph("text_rows")
    unet = lower_unet(family.graph("unet"), spec_file, entrance=lambda model: inline_rows(model, rows))
    scalar_timestep(unet.model)
    unet.model.graph.outputs[0].name = "out_sample"
    return unet


def text_graph(family: Family, name: str, weights: ComponentWeights) -> ir.Model:
    """A text encoder under the names optimum reads. SDXL takes hidden_states[-2]: the one state we have, shown as layer 0."""
    model = family.graph(name)
    fit_vocabulary(model, weights)
    if SECOND_ENCODER in family.configs:
        build = Builder(model.graph, "states")
        last = next(value for value in model.graph.outputs if value.name == "last_hidden_state")
        layer = build("Identity", last)
        layer.name, layer.type, layer.shape = "hidden_states.0", last.type, last.shape
        pooled = [value for value in model.graph.outputs if value is not last]
        model.graph.outputs[:] = [*pooled, last, layer]  # diffusers takes the first for the pooled text
        model.graph.sort()
    return model


def vae_graph(family: Family) -> ir.Model:
    """The decoder under the names optimum reads."""
    model = family.graph("vae_decoder")
    model.graph.inputs[0].name, model.graph.outputs[0].name = "latent_sample", "sample"
    return model


def _write(model: ir.Model, weights: ComponentWeights, folder: Path, storage: ir.DataType) -> None:
    folder.mkdir()
    write_graph(model, store_floats(model, set(), storage), weights.read, folder / MODEL, DATA)


def write_settings(family: Family, settings: Settings, weights: CheckpointWeights, place: Path) -> None:
    """Component configs, tokenizers, scheduler and model_index.json."""
    is_sdxl = SECOND_ENCODER in family.configs
    configs = {**settings.configs, "vae_decoder": {"scaling_factor": 0.18215, **settings.configs["vae"]}}
    models = [name for name in ("unet", *ENCODERS, "vae_decoder") if name in configs]
    for name in models:
        config = configs[name] | ({"num_hidden_layers": 1} if is_sdxl and name in ENCODERS else {})
        _write_json(place / name / "config.json", config)
    (place / "scheduler").mkdir()
    _write_json(place / SCHEDULER, dict(settings.scheduler_config))
    index: dict[str, Any] = {"_class_name": PIPELINES[is_sdxl], "_diffusers_version": "0.35.2"}
    index["scheduler"] = ["diffusers", scheduler_class(settings.scheduler_config)]
    for name in write_tokenizer_folders(settings, weights, place):
        index[name] = ["transformers", "CLIPTokenizer"]
    index |= {name: ["diffusers", "OnnxRuntimeModel"] for name in models}
    if is_sdxl:
        index["force_zeros_for_empty_prompt"] = settings.index.get("force_zeros_for_empty_prompt", True)
    _write_json(place / "model_index.json", index)


def scheduler_class(config: Mapping[str, Any]) -> str:
    """The scheduler's class in diffusers; a base's own word for the module is not taken: optimum imports what stands there."""
    name = config.get("_class_name")
    if not (isinstance(name, str) and name.isidentifier() and name.endswith("Scheduler")):
        raise RepositoryError(
            f"{SCHEDULER}: _class_name must be a scheduler of diffusers, got {name!r}; copy the base again"
        )
    return name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
