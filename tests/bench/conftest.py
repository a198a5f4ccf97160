"""Two tiny LoRA checkpoints calibrated and exported once, for the gate's faults, baselines and reports."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from personalq.repository import Repository
from runtime.gate.subject import Sources
from tests.conftest import tiny_pipeline
from tests.repositories import tiny_repository, write_lora


@dataclass(frozen=True)
class Tiny:
    """repository, rex's bundle and another checkpoint's, and what the gate may look at for rex."""

    repository: Repository
    bundle: Path
    other: Path
    sources: Sources


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, traces: Path) -> Tiny:
    """'rex' and 'max', two random LoRAs over one base, under rex's W8A8 spec. Read only: copy a bundle before changing it."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    from bench._faults import export_with
    from bench.gate import weights_reader
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint
    from runtime.gate.request import sources_of

    root = tmp_path_factory.mktemp("gate")
    repository = tiny_repository(root, tiny_base, tiny_pipeline(), traces)
    spec = calibrate(repository, "rex", CalibrateOptions(samples=1, steps=2))
    bundle = export_checkpoint(repository, "rex", spec.spec_path).bundle
    add_sibling(root)
    repository = Repository.open(root)
    spec_file = spec.spec_file
    spec_file.spec = spec_file.spec.model_copy(update={"checkpoint": "max"})
    calibrate(repository, "max", CalibrateOptions(policy="fp32"))  # its goldens
    other = export_with(repository, "max", spec_file)
    return Tiny(repository, bundle, other, sources_of(bundle, repository, weights_reader))


def add_sibling(root: Path) -> None:
    """Checkpoint 'max': rex's card under another name, with a LoRA of its own."""
    import torch

    folder = root / "checkpoints" / "max"
    shutil.copytree(root / "checkpoints" / "rex", folder)
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"id": "max", "name": "Max"}))
    pipeline = tiny_pipeline()
    torch.manual_seed(5)
    write_lora(folder, pipeline)
