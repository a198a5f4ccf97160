"""LoRA, DoRA and LyCORIS files to edits: their factors (alpha, rank, configuration), and one edit per parameter.

W' = W + alpha/r * up @ down (Hu et al. 2021); DoRA (Liu et al. 2024) then gives every output the length the file says.
Alpha is the module's own tensor, else what diffusers' metadata or peft's adapter_config.json say, else r: kohya-ss,
diffusers and ComfyUI take it so. Only headers and tensors of one number are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import RepositoryError
from ..models import COMPONENTS
from ..tensorfile import TensorFile
from .algorithms import Trained, edit_of
from .edits import ANOTHER_BASE, Added, Delta, Shapes
from .lora_names import Module, lengths, parts_by_module

Settings = Mapping[str, object]  # of one component, as peft names them: r, lora_alpha, use_rslora, alpha_pattern, ...

_PEFT_FILE = "adapter_model.safetensors"  # in unet/, text_encoder/ or alone
PEFT_CONFIG = "adapter_config.json"
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")
_BIASES = ("bias", "diff_b", "b_norm")


def foreign_lengths(shapes: Shapes) -> list[str]:
    """The lengths of a DoRA that peft did not write for a UNet: kohya's and LyCORIS', and those of a text encoder."""
    peft = re.compile(r"\.lora_magnitude_vector(?:\.weight)?$")
    return [name for name in lengths([*shapes]) if not peft.search(name) or name.startswith("text_encoder")]


def adapter_paths(folder: Path) -> list[Path]:
    """peft's own files in a checkpoint's folder, one in the sub-folder of each component that was trained."""
    paths = (folder / component / _PEFT_FILE for component in COMPONENTS)
    return [path for path in paths if path.is_file()]


def is_adapter(path: Path) -> bool:
    """Tell whether a file is one of `adapter_paths`."""
    return path.name == _PEFT_FILE and path.parent.name in COMPONENTS


def lora_edits(file: TensorFile, shapes: Mapping[str, Shapes], delta: Delta) -> None:
    """Put the edits of every module that was trained into `delta`. shapes: component -> parameter -> shape of the base."""
    home = file.path.parent.name if is_adapter(file.path) else ""
    settings = _settings(file, [home] if home else [*shapes])
    modules = parts_by_module(file, shapes, home)
    is_dora = any(said.get("use_dora") for said in settings.values())
    if is_dora and not lengths(file.names()):
        raise RepositoryError(f"{file.path.name}: a DoRA must hold its lengths, got none; save the LoRA again")
    for module, parts in modules.items():
        _put_module(file, module, parts, shapes[module.component], settings.get(module.component, {}), delta)


def _put_module(
    file: TensorFile, module: Module, parts: dict[str, str], shapes: Shapes, settings: Settings, delta: Delta
) -> None:
    where = f"{file.path.name}: {module.component}.{module.name}"
    factor = _Factor(file, module, parts, settings)
    trained = Trained(file, where, parts, shapes[f"{module.name}.weight"], factor.of_rank)
    delta.put(module.component, f"{module.name}.weight", edit_of(trained))
    biases = [part for part in _BIASES if part in parts]
    if len(biases) > 1:
        raise RepositoryError(f"{where}: must have one change of its bias, got {' and '.join(biases)}; save it again")
    for part in biases:
        if shapes.get(f"{module.name}.bias") != trained.shape(part):
            raise RepositoryError(
                f"{where}: {'LoRA bias' if part == 'bias' else part} must fit the base's bias, "
                f"got {list(trained.shape(part))}; {ANOTHER_BASE}"
            )
        scale = trained.scale(trained.shape("down")[0]) if part == "bias" else 1.0
        delta.put(module.component, f"{module.name}.bias", Added(file, parts[part], scale))


@dataclass(frozen=True)
class _Factor:
    """What one module's change is multiplied with."""

    file: TensorFile
    module: Module
    parts: Mapping[str, str]
    settings: Settings

    def of_rank(self, rank: int) -> float:
        """alpha / rank. rank 0: the tensors have none (LoKr of two whole matrices); then peft's own, else no factor at all."""
        if "alpha" in self.parts and rank:
            return self._stored() / rank
        if "lora_alpha" not in self.settings or not (rank or "r" in self.settings):
            return 1.0
        alpha = self._by_pattern("alpha_pattern", "lora_alpha")
        rank = rank or int(self._by_pattern("rank_pattern", "r"))
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _stored(self) -> float:
        """The `.alpha` tensor: one number. LyCORIS takes 0 for the rank, diffusers for no change at all."""
        values = self.file.read(self.parts["alpha"]).reshape(-1)
        if values.size != 1 or not values[0]:
            raise RepositoryError(
                f"{self.file.path.name}: {self.parts['alpha']}: must be one number that is not 0, "
                f"got {values.tolist()[:3]}; save the LoRA again"
            )
        return float(values[0])

    def _by_pattern(self, patterns: str, default: str) -> float:
        """peft's alpha_pattern and rank_pattern: module name (or its end) -> value. Plain names: a regex could run forever."""
        chosen, name = self.settings[default], self.module.name
        said = self.settings.get(patterns)
        for pattern, value in said.items() if isinstance(said, dict) else ():
            plain = str(pattern).removeprefix("^").replace("\\.", ".")
            if re.search(r"[^\w.]", plain):
                raise RepositoryError(
                    f"{self.file.path.name}: {patterns} must name modules plainly, got {pattern!r}; write it out"
                )
            plain = plain.removeprefix("text_model.")
            if name.removeprefix("text_model.") == plain or (
                name.endswith(f".{plain}") and not str(pattern).startswith("^")
            ):
                chosen = value
                break
        if not isinstance(chosen, int | float) or (default == "r" and chosen < 1):
            raise RepositoryError(
                f"{self.file.path.name}: {name}: {default} must be a number, got {chosen!r}; save the LoRA again"
            )
        return float(chosen)


def _settings(file: TensorFile, components: Sequence[str]) -> dict[str, Settings]:
    """component -> peft's configuration: of adapter_config.json beside a file of peft's, else of the metadata (diffusers')."""
    if file.path.name == _PEFT_FILE:
        beside = file.path.with_name(PEFT_CONFIG)
        if not beside.is_file():
            raise RepositoryError(
                f"{beside}: must be there, it says the LoRA's alpha, got nothing; copy it from beside it"
            )
        settings = _peft_settings(str(beside), beside.read_text(encoding="utf-8", errors="replace"))
        return dict.fromkeys(components, settings)
    metadata = _json_object(
        f"{file.path.name}: lora_adapter_metadata", file.metadata.get("lora_adapter_metadata", "{}")
    )
    found: dict[str, dict[str, object]] = {}
    for key, value in metadata.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return dict(found)


def _peft_settings(where: str, text: str) -> Settings:
    settings = _json_object(where, text)
    kind = settings.get("peft_type")
    if kind not in _PEFT_TYPES:
        raise RepositoryError(
            f"{where}: peft_type must be one of {', '.join(_PEFT_TYPES)}, got {kind!r}; merge it into a whole model"
        )
    # LoHa's and LoKr's configurations have plain `alpha`
    return {"lora_alpha": settings["alpha"], **settings} if "alpha" in settings else settings


def _json_object(where: str, text: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RepositoryError(f"{where} must be a JSON object, got {text!r:.60}; save it again")
    return content
