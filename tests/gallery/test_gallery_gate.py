"""The committed baselines are of the committed specs, of today's weights and of today's layers: `make gate` can pass."""

import pytest

from gallery.gate import BASELINES, FOLDER, GATED, HERE, SPEC
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from personalq.spec import read_spec
from runtime.gate.baseline import decisions, read_baselines

REMADE = "run 'python -m gallery.gate --update'"


@pytest.mark.parametrize("name", GATED)
def test_the_committed_baseline_is_of_the_committed_spec_and_weights(name: str) -> None:
    repository, spec_file = Repository.open(HERE / "repository"), read_spec(FOLDER / name / f"{SPEC}.json")
    entry = read_baselines(BASELINES).bundles[f"{name}/{SPEC}"]
    card = repository.card(name)
    weights = weights_sha256(repository.base_dir(card), repository.checkpoint_dir(name))
    assert entry.checkpoint_sha256 == spec_file.spec.provenance.checkpoint_sha256 == weights, REMADE
    assert entry.spec_sha256 == spec_file.content_sha256(), REMADE
    assert entry.decisions == decisions(spec_file.spec) and set(entry.layers) >= set(spec_file.spec.layers)


def test_nothing_else_is_gated() -> None:
    assert set(read_baselines(BASELINES).bundles) == {f"{name}/{SPEC}" for name in GATED}
    assert not any(
        "judge" in metric for entry in read_baselines(BASELINES).bundles.values() for metric in entry.metrics
    )
