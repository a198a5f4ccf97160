"""A tiny repository with one LoRA, for the calibration tests."""

from pathlib import Path

import pytest

from tests.conftest import tiny_pipeline
from tests.repositories import tiny_repository


@pytest.fixture(scope="session")
def rex(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, traces: Path):
    """Repository with checkpoint 'rex' (LoRA over the tiny base)."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    return tiny_repository(tmp_path_factory.mktemp("calibration"), tiny_base, tiny_pipeline(), traces)
