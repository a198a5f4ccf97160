"""The capacity model: the replay agrees with what can be computed by hand, and the formula with the replay."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.capacity import (
    Costs,
    Demand,
    Fleet,
    best_bundles,
    formula,
    harmonics,
    hit_rate,
    main,
    replay,
    smallest,
    storage,
)
from personalq.errors import RepositoryError
from personalq.repository import Repository

COSTS = Costs(bytes=100e6, load_s=1.0, draw_s=2.0)


def test_the_harmonic_sum_and_the_share_of_the_popular() -> None:
    assert harmonics(3, 1.0).tolist() == pytest.approx([1, 1 + 1 / 2, 1 + 1 / 2 + 1 / 3])
    assert hit_rate(Demand(1000, 1.0, 1.0), 1000) == 1.0
    assert hit_rate(Demand(4, 0.0, 1.0), 2) == 0.5


def test_a_replica_that_holds_everything_always_hits_and_an_idle_one_makes_nobody_wait() -> None:
    found = replay(Demand(10, 1.0, 0.001), COSTS, 1, 10, routed=True, requests=2000)
    assert found["hit_rate"] == 1.0 and found["p95_wait_s"] == pytest.approx(0.0, abs=1e-9)


def test_one_queue_waits_as_the_formula_of_pollaczek_and_khinchine_says() -> None:
    """M/D/1 at 50 %: the mean wait is rho / (2 (1 - rho)) * service = service / 2; the median is below it."""
    fleet = Fleet(1, 1, Costs(1.0, 0.0, 1.0))
    import numpy as np

    times = np.cumsum(np.random.default_rng(1).exponential(2.0, 50_000))
    waits = [fleet.serve(0, 7, float(now))[1] - 1.0 for now in times]
    assert sum(waits) / len(waits) == pytest.approx(0.5, rel=0.05)


def test_routing_to_who_holds_the_engine_hits_more_than_chance() -> None:
    demand = Demand(200, 1.0, 2.0)
    idlest, routed = (replay(demand, COSTS, 8, 10, routed=way, requests=6000) for way in (False, True))
    assert routed["hit_rate"] > idlest["hit_rate"] + 0.15
    assert 0.5 * hit_rate(demand, 10) < idlest["hit_rate"] <= hit_rate(demand, 10) + 0.05
    assert routed["hit_rate"] <= hit_rate(demand, 80) + 0.05  # the formula's h: every replica holds other engines


def test_the_replay_needs_about_what_the_formula_says() -> None:
    demand = Demand(1000, 1.0, 5.0)
    row = smallest(demand, COSTS, 20, 2.0, routed=True)
    assert row["formula"] == formula(demand, COSTS, 20, routed=True)
    assert 0.6 * row["formula"] <= row["replicas"] <= 1.5 * row["formula"] and row["p95_wait_s"] <= 2.0
    assert row["memory_gb"] == round(row["replicas"] * 20 * 0.1, 2)
    assert formula(demand, COSTS, 20, routed=True) <= formula(demand, COSTS, 20, routed=False)


def make_bundle(folder: Path) -> Path:
    """What is counted of a bundle: two files and a manifest that lists them; every bundle has the same vae.data."""
    folder.mkdir()
    files = {"vae.data": b"v" * 5000, "weights.data": folder.name.encode() * 3000}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    listed = {n: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for n, data in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))
    return folder


def test_a_wait_that_no_number_of_replicas_keeps_is_said() -> None:
    slow = Costs(bytes=100e6, load_s=8.0, draw_s=2.0)
    row = smallest(Demand(5000, 1.0, 0.5), slow, 1, 2.0, routed=False)
    assert row["is_kept"] is False and row["p95_wait_s"] > 2.0


def test_equal_files_are_counted_once_where_they_are_one(tmp_path: Path) -> None:
    first, second = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b")
    apart = storage([first, second])
    total = sum(file.stat().st_size for file in first.iterdir())
    assert apart["bytes_on_disk"] == 2 * total
    (second / "vae.data").unlink()
    os.link(first / "vae.data", second / "vae.data")
    assert storage([first, second])["bytes_on_disk"] == 2 * total - 5000
    assert apart["bytes_each"] - apart["bytes_each_equal_files_once"] == 2500
    assert apart["bytes_in_every_bundle"] == 5000


def test_given_figures_are_replayed_and_half_given_ones_refused() -> None:
    options = ["--engine-mb", "100", "--load-s", "1", "--draw-s", "2", "--checkpoints", "100", "--rate", "1"]
    ran = CliRunner().invoke(main, options)
    assert ran.exit_code == 0, ran.output
    data = json.loads(ran.stdout.splitlines()[-1])
    assert data["engines_per_replica"] == 20 and [row["routed"] for row in data["rows"]] == [False, True]
    half = CliRunner().invoke(main, options[:2])
    assert half.exit_code == 2 and "--engine-mb, --load-s and --draw-s go together" in half.stderr


def test_a_repository_without_bundles_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="must hold bundles, got none; run 'personalq export --all'"):
        best_bundles(Repository.open(tmp_path / "empty", create=True), 12)
