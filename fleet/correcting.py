"""`export ID --correct RANK`: a low-rank correction of a base's rounding for one checkpoint, from calibration to its adapter."""

from typing import TYPE_CHECKING

from exporters.adapters import Corrected
from personalq.adapters import Correction
from personalq.bundle import read_manifest
from personalq.cards.card import folder_name
from personalq.repository.identity import weights_sha256
from personalq.spec import read_spec
from runtime.console import Report

if TYPE_CHECKING:
    from pathlib import Path

    from personalq.repository import Repository


def corrected(repository: "Repository", checkpoint_id: str, rank: int, progress: Report) -> Corrected:
    """The correction of the rounding that the base's engine does. Raises SpecError when the base has no spec."""
    from calibration.calibrate import CalibrateOptions
    from calibration.correction import correction

    spec = base_spec(repository, checkpoint_id)
    branches = correction(repository, spec, checkpoint_id, rank, CalibrateOptions(), progress)
    return Corrected(branches, Correction(spec_sha256=read_spec(spec).content_sha256(), rank=rank))


def base_spec(repository: "Repository", checkpoint_id: str) -> "Path":
    """The spec of the base's best engine where both are here, else the base's last one."""
    whole = repository.whole(checkpoint_id)
    engines = repository.base_engines(weights_sha256(whole.base_dir, None))
    if engines:
        wanted = read_manifest(engines[-1]).spec
        file = repository.root / "specs" / folder_name(whole.card.base) / f"{wanted.name}.json"
        if file.is_file() and read_spec(file).content_sha256() == wanted.sha256:
            return file
    from exporters.request import last_spec

    return last_spec(repository, whole.card.base)
