"""One tiny checkpoint calibrated and exported, shared by the exporter tests."""

from pathlib import Path

import pytest

from tests.conftest import tiny_pipeline
from tests.repositories import tiny_repository


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path):
    """(repository, {'fp32': ExportResult, 'taq': ExportResult}) of checkpoint 'rex'."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint

    repository = tiny_repository(tmp_path_factory.mktemp("repo"), tiny_base, tiny_pipeline())
    results = {}
    for policy in ("fp32", "taq"):
        spec = calibrate(repository, "rex", CalibrateOptions(policy=policy, samples=2, steps=3))
        results[policy] = export_checkpoint(repository, "rex", spec.spec_path)
    return repository, results
