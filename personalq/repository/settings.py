"""What pictures depend on besides weights and graphs: scheduler, tokenizers, latent scaling, recommended steps.

A checkpoint's own come before its base's, which lends what the checkpoint lacks. Where sources disagree about the
scheduler, tensors that are marks decide, then the checkpoint's config, then its files' headers, then the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architecture import architecture, read_config, read_configs
from ..bundle import file_sha256
from ..errors import RepositoryError
from ..scheduler import BaseScheduler, resolve_scheduler
from ..weights.header import read_header
from ..weights.marks import Marks, read_marks
from ..weights.models import SECOND_ENCODER

SCHEDULER = "scheduler/scheduler_config.json"
RECOMMENDED = "personalq.json"
INDEX = "model_index.json"
TOKENIZERS = ("tokenizer", "tokenizer_2")
_OF_CHECKPOINT, _OF_BASE = "checkpoint", "base"


@dataclass(frozen=True)
class Settings:
    """scheduler: with every field said; scheduler_config: as it was shipped, with marks put in.

    tokenizers: folder by name. configs: config.json by component. files: what was read, by its name in a pipeline folder.
    sources: where each thing comes from, in words. steps and guidance are what the author recommends, else Stable Diffusion's
    usual ones.
    """

    scheduler: BaseScheduler
    scheduler_config: Mapping[str, Any]
    tokenizers: Mapping[str, Path]
    configs: Mapping[str, dict[str, Any]]
    index: Mapping[str, Any]
    steps: int
    guidance: float
    files: Mapping[str, Path]
    sources: Mapping[str, str]

    def sampling(self) -> dict[str, Any]:
        """Steps and guidance, as keywords."""
        return {"steps": self.steps, "guidance": self.guidance}

    def sha256(self, told: Mapping[str, Any]) -> str:
        """Hash of everything here, and of `told` (JSON): part of a bundle's key."""
        lines = [f"{name}:{file_sha256(file)}\n" for name, file in self.files.items()]
        lines.append(f"scheduler:{self.scheduler.sha256()}\n")
        return hashlib.sha256("".join([json.dumps(told, sort_keys=True), *lines]).encode()).hexdigest()


def read_settings(base_dir: Path, checkpoint_dir: Path | None = None) -> Settings:
    """The settings of a checkpoint over its base (None: of the base). Raises RepositoryError for a file that is broken."""
    is_over_base = checkpoint_dir is not None and checkpoint_dir != base_dir and not checkpoint_dir.is_file()
    own = checkpoint_dir if is_over_base else None
    sources: dict[str, str] = {}
    scheduler_file = _found(base_dir, own, SCHEDULER, "scheduler", sources)
    if not scheduler_file.is_file():
        raise RepositoryError(f"{scheduler_file}: must exist in a base, got nothing; add the whole diffusers folder")
    config = _with_marks(base_dir, checkpoint_dir, _json(scheduler_file), sources)
    configs = _configs(base_dir, own, sources)
    tokenizers = dict(_tokenizers(base_dir, own, sources))
    index, recommended = _found(base_dir, own, INDEX), _found(base_dir, own, RECOMMENDED, "steps and guidance", sources)
    # a scheduler that the checkpoint brought is what its own config says, whatever the base's index names
    is_lent = sources["scheduler"] == _OF_CHECKPOINT and index.parent == base_dir
    pipeline = _json(index)
    named = {} if is_lent else pipeline
    scheduler = resolve_scheduler(config, named, is_xl=SECOND_ENCODER in configs, where=str(scheduler_file))
    wanted = _json(recommended)
    files = {INDEX: index, RECOMMENDED: recommended, SCHEDULER: scheduler_file}
    for name, folder in tokenizers.items():
        files |= {f"{name}/{file.name}": file for file in sorted(folder.glob("*"))}
    return Settings(
        scheduler,
        config,
        tokenizers,
        configs,
        pipeline,
        int(wanted.get("steps", 25)),
        float(wanted.get("guidance", 7.5)),
        {name: file for name, file in files.items() if file.is_file()},
        sources,
    )


def _found(base_dir: Path, own: Path | None, name: str, what: str = "", sources: dict[str, str] | None = None) -> Path:
    """A file of the checkpoint, else of the base."""
    place = own if own is not None and (own / name).is_file() else base_dir
    if what and sources is not None:
        sources[what] = _OF_BASE if place == base_dir else _OF_CHECKPOINT
    return place / name


def _tokenizers(base_dir: Path, own: Path | None, sources: dict[str, str]) -> Iterator[tuple[str, Path]]:
    for name in TOKENIZERS:
        if own is not None and any((own / name / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            sources[name] = _OF_CHECKPOINT
            yield name, own / name
        elif (base_dir / name).is_dir():
            sources[name] = _OF_BASE
            yield name, base_dir / name


def _configs(base_dir: Path, own: Path | None, sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The base's configs, with the checkpoint's in place of those whose model it brings.

    Raises RepositoryError when one means another graph than the base's.
    """
    configs = read_configs(base_dir)
    for component in configs:
        if own is None or not (own / component / "config.json").is_file():
            continue
        config = read_config(own, component)
        mine, theirs = architecture(component, config), architecture(component, configs[component])
        odd = next((field for field in {**theirs, **mine} if mine.get(field) != theirs.get(field)), None)
        if odd is not None:
            raise RepositoryError(
                f"{own.name}/{component}/config.json: {odd} must be {theirs.get(odd)!r} as in the base, "
                f"got {mine.get(odd)!r}; add the checkpoint with --base of the model it was trained on"
            )
        configs[component] = config
        sources[component] = _OF_CHECKPOINT
    return configs


def _with_marks(
    base_dir: Path, checkpoint_dir: Path | None, config: dict[str, Any], sources: dict[str, str]
) -> dict[str, Any]:
    """The scheduler's config with what the files themselves say put in, by the order above."""
    is_own = sources["scheduler"] == _OF_CHECKPOINT
    places = [base_dir] if not is_own else []  # what the base says is nothing to a checkpoint's own config
    places += [checkpoint_dir] if checkpoint_dir is not None and checkpoint_dir != base_dir else []
    for place in places:
        decides = is_own or place == base_dir  # its config, over its files' headers
        for marks in _marks_in(place):
            said = {field: value for field, value in marks.by_header.items() if not (decides and field in config)}
            for field, (value, source) in {**said, **marks.by_tensors}.items():
                if config.get(field) != value:
                    config, sources[f"scheduler.{field}"] = {**config, field: value}, source
    if "scheduler.rescale_betas_zero_snr" in sources and not (is_own and "timestep_spacing" in config):
        config = {**config, "timestep_spacing": "trailing"}
        sources["scheduler.timestep_spacing"] = "zero terminal SNR is seen at the last time step only"
    return config


def _marks_in(place: Path) -> Iterator[Marks]:
    """What the weight files of a checkpoint say: those beside its card, and its UNet's."""
    files = (
        [place]
        if place.is_file()
        else [*sorted(place.glob("*.safetensors")), *sorted(place.glob("unet/*.safetensors"))]
    )
    for file in files:
        yield read_marks(read_header(file), file.name)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; nothing for a file that is not there."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise RepositoryError(f"{file}: must be JSON, got {str(error)[:60]}; copy the file again") from error
    if not isinstance(data, dict):
        raise RepositoryError(f"{file}: must be a JSON object, got {type(data).__name__}; copy the file again")
    return data
