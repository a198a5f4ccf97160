"""Pickles run code when they are opened, so they are refused by name, with a command that converts them."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import RepositoryError

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
# What trainers leave beside the weights; not weights.
_TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler|training_args|random_states|rng_state|sampler).*")


def is_trainer_file(path: Path) -> bool:
    """Tell whether a file is what trainers leave beside the weights."""
    return _TRAINER_FILES.fullmatch(path.name) is not None


def refuse_pickles(folder: Path) -> None:
    """Raise when weights lie here only as a pickle: leaving them out would give another model than its author's."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
    for path in paths:
        is_pickle = path.suffix in PICKLES and not is_trainer_file(path)
        if is_pickle and not path.with_suffix(".safetensors").exists():
            raise pickle_refusal(path)


def pickle_refusal(path: Path) -> RepositoryError:
    """The refusal of one pickle."""
    script = f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')"
    return RepositoryError(
        f"{path}: must be safetensors, got a pickle, which can run code when opened; convert it where you "
        f'trust it: python -c "import torch, safetensors.torch as s; {script}"'
    )
