"""A tiny base with checkpoints of every kind attached, made once."""

from pathlib import Path

import pytest

from tests.conftest import tiny_pipeline
from tests.runtime.gate.attached import Attached, make_attached


@pytest.fixture(scope="session")
def attached(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, traces: Path) -> Attached:
    """Read only: copy a bundle before changing it."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    return make_attached(tmp_path_factory.mktemp("attached"), tiny_base, tiny_pipeline(), traces)
