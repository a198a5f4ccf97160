"""One tiny pipeline of every architecture as a repository, its bundles, and a spec that quantises it without calibration."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporters.export import export_checkpoint
from exporters.graphs.family import Family, open_family
from exporters.plain import unquantised_spec
from personalq.numerics import INT8, absmax_scale
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from personalq.rows import KeptTokens
from personalq.spec import LayerSpec, SpecFile
from runtime.drawing.pipeline import Pipeline
from runtime.engines.ort import OrtEngine
from tests.exporters import architectures
from tests.repositories import add_family

FLOAT = ("conv_in", "conv_out")
Torch = Callable[[np.ndarray, float], Any]


@dataclass
class Made:
    """One architecture: its pipeline as diffusers runs it, its repository, and the bundles of checkpoint 'rex'."""

    name: str
    root: Path
    traces: Path

    @cached_property
    def pipe(self) -> Any:
        pipe = getattr(architectures, self.name)()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def repository(self) -> Repository:
        """bases/tiny and two checkpoints of it: 'rex' is the base's own UNet, 'max' another one."""
        self.pipe.save_pretrained(self.root / "bases" / "tiny")
        for name, seed in (("rex", 0), ("max", 1)):
            folder = self.root / "checkpoints" / name
            unet = self.pipe.unet if seed == 0 else getattr(architectures, self.name)(seed).unet
            unet.save_pretrained(folder / "unet")
            card = {"id": name, "name": name, "kind": "dreambooth", "base": "tiny", "trigger": ["sks"]}
            (folder / "card.json").write_text(json.dumps(card))
        add_family(self.root, "tiny", self.traces)
        return Repository.open(self.root)

    def family(self, repository: Repository) -> Family:
        return open_family(repository.root / "families", repository.base_dir(repository.card("rex")))

    def plain(self, checkpoint: str, repository: Repository) -> SpecFile:
        """The spec that quantises nothing."""
        base = repository.base_dir(repository.card(checkpoint))
        sha256 = weights_sha256(base, repository.checkpoint_dir(checkpoint))
        return unquantised_spec(self.family(repository), checkpoint, sha256, "fp32")

    def export(
        self, checkpoint: str = "rex", repository: Repository | None = None, spec: SpecFile | None = None
    ) -> Path:
        repository = repository or self.repository
        spec = spec or self.plain(checkpoint, repository)
        path = spec.write(repository.root / "specs" / checkpoint / f"{spec.spec.name}.json")
        return export_checkpoint(repository, checkpoint, path).bundle

    @cached_property
    def bundle(self) -> Path:
        return self.export()

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(OrtEngine(self.bundle, threads=1))

    def quantised(self, predict: Torch) -> tuple[SpecFile, Path]:
        """A W8A8 spec from the ranges of one prediction, and its bundle. predict: (sample, timestep) -> by self.pipe.unet."""
        file = eight_bits(self.plain("rex", self.repository), self.pipe.unet, ranges(self.pipe.unet, predict))
        return file, self.export("rex", spec=file)


def ranges(unet: Any, predict: Torch) -> dict[str, tuple[float, float]]:
    """layer -> the largest value that goes in, and that comes out, in one prediction."""
    seen: dict[str, tuple[float, float]] = {}
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: (float(given[0].abs().max()), float(out.abs().max()))})
        )
        for name, module in unet.named_modules()
        if hasattr(module, "weight")
    ]
    predict(np.random.default_rng(2).standard_normal((1, 4, 8, 8)).astype(np.float32), 450.0)
    for hook in hooks:
        hook.remove()
    return seen


def eight_bits(plain: SpecFile, unet: Any, seen: Mapping[str, tuple[float, float]]) -> SpecFile:
    """Every layer but FLOAT in 8 bits: absmax scales of `unet`'s weights, and of what was `seen` to go in and out."""
    layers, tensors = dict(plain.spec.layers), {}
    for name in plain.spec.layers:
        given, out = seen[name]
        if name in FLOAT:
            continue
        layers[name] = LayerSpec(op=layers[name].op, weight="int8", activation="int8", found_by="absmax")
        weight = unet.get_submodule(name).weight.detach().numpy()
        tensors[f"{name}.weight_scale"] = absmax_scale(weight, INT8, 0)
        tensors[f"{name}.input_scale"] = np.asarray(given / 127, np.float32)
        if layers[name].op == "conv":
            tensors[f"{name}.output_scale"] = np.asarray(out / 127, np.float32)
    rows = plain.spec.rows.model_copy(update={"kept": KeptTokens(slots=8)})
    update = {"name": "w8a8", "policy": "absmax", "bits": "w8a8", "storage": "float16"}
    update |= {"layers": layers, "rows": rows}
    return SpecFile(plain.spec.model_copy(update=update), tensors)
