"""Engines stay in memory by what a reload costs: one load however many ask, never over the budget, never while in use."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bench.serve import growth_mb
from bench.switch import replay
from personalq.errors import EngineError
from runtime.residency import GreedyDual, LeastRecent, Loaded, Ranking, Residency


class Disk:
    """Values of 10 bytes unless told otherwise; loading can be held up, counted and made to fail."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.sizes: dict[str, int] = {}
        self.stale: set[str] = set()

    def load(self, key: str) -> Loaded[str]:
        self.open.wait(10)
        self.loads.append(key)
        if key == "broken":
            raise EngineError("broken: cannot be opened")
        return Loaded(key.upper(), self.size(key))

    def size(self, key: str) -> int:
        return self.sizes.get(key, 10)


@pytest.fixture
def disk() -> Disk:
    return Disk()


def residency(disk: Disk, budget: int, ranking: Ranking | None = None) -> Residency[str]:
    return Residency(
        disk.load, disk.size, budget, ranking=ranking, is_fresh=lambda value: value.lower() not in disk.stale
    )


def use(kept: Residency[str], *keys: str) -> None:
    for key in keys:
        assert kept.pin(key).result(10) == key.upper()
        kept.unpin(key)


def waited(is_so: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not is_so() and time.monotonic() < until:
        time.sleep(0.005)
    return is_so()


def test_many_who_ask_at_once_share_one_load(disk: Disk) -> None:
    kept = residency(disk, 100)
    disk.open.clear()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(kept.pin, "a") for _ in range(8)]
        loading = [future.result() for future in futures]
    disk.open.set()
    assert {future.result(10) for future in loading} == {"A"} and disk.loads == ["a"]
    assert (kept.counts.hits, kept.counts.misses) == (7, 1)


def test_the_budget_holds_whatever_is_asked_for(disk: Disk) -> None:
    kept = residency(disk, 35)
    for key in "abcdabcde":
        use(kept, key)
        assert kept.used_bytes() <= 35
    assert len(kept.snapshot()) == 3 and kept.counts.evictions == len(disk.loads) - 3


def test_what_values_share_counts_against_the_budget(disk: Disk) -> None:
    kept = Residency(disk.load, disk.size, 35, shared_bytes=lambda: 10)
    use(kept, "a", "b", "c")
    assert kept.used_bytes() == 30 and len(kept.snapshot()) == 2 and kept.counts.evictions == 1


def test_what_is_in_use_is_not_evicted_and_a_new_engine_waits_for_room(disk: Disk) -> None:
    kept = residency(disk, 20)
    kept.pin("a").result(10)
    kept.pin("b").result(10)
    waiting = kept.pin("c")
    time.sleep(0.05)
    assert not waiting.done() and kept.ready("a") and kept.ready("b")
    kept.unpin("b")
    assert waiting.result(10) == "C" and kept.ready("a") and not kept.ready("b")


def test_an_engine_larger_than_the_budget_says_what_to_raise(disk: Disk) -> None:
    disk.sizes["whale"] = 60_000_000
    with pytest.raises(EngineError) as error:
        residency(disk, 50_000_000).pin("whale").result(10)
    assert str(error.value) == ("memory: an engine must fit the budget of 50 MB, got one of 60 MB; raise --budget-mb")
    assert not disk.loads


def test_a_failed_load_is_told_to_its_askers_and_tried_again(disk: Disk) -> None:
    kept = residency(disk, 100)
    for _ in range(2):
        with pytest.raises(EngineError, match="broken: cannot be opened"):
            kept.pin("broken").result(10)
        kept.unpin("broken")
    use(kept, "a")
    assert disk.loads == ["broken", "broken", "a"] and kept.counts.failures == 2


def test_a_hint_loads_ahead_but_never_pushes_out_what_is_in_use(disk: Disk) -> None:
    kept = residency(disk, 20)
    kept.prefetch("a")
    assert waited(lambda: kept.ready("a")) and disk.loads == ["a"]
    kept.pin("a")
    kept.pin("b").result(10)
    kept.prefetch("c")
    assert waited(lambda: kept.counts.failures == 1) and not kept.ready("c")
    kept.unpin("b")
    use(kept, "c")


def test_a_value_that_changed_on_disk_is_loaded_again(disk: Disk) -> None:
    kept = residency(disk, 100)
    use(kept, "a")
    disk.stale.add("a")
    use(kept, "a")
    assert disk.loads == ["a", "a"]


def test_threads_that_hammer_it_find_what_they_asked_for(disk: Disk) -> None:
    kept, random = residency(disk, 45), np.random.default_rng(0)
    keys = [str(key) for key in random.integers(0, 8, 400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: use(kept, key), keys))
    assert kept.used_bytes() <= 45 and not any(in_use for _, _, in_use in kept.snapshot())
    assert kept.counts.hits + kept.counts.misses == 400


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_greedy_dual_beats_lru_on_zipf_traces(exponent: float) -> None:
    random = np.random.default_rng(3)
    n = 60
    share = 1 / np.arange(1, n + 1) ** exponent
    sizes = random.choice([30, 140, 900, 1800], n).tolist()
    costs = [size / 900 * float(random.uniform(0.7, 1.3)) + 0.1 for size in sizes]
    trace = random.choice(n, 4000, p=share / share.sum()).tolist()
    mine, lru = (replay(ranking, trace, sizes, costs, 6000) for ranking in (GreedyDual(), LeastRecent()))
    assert mine["hit_rate"] > lru["hit_rate"] and mine["load_seconds"] < lru["load_seconds"]


def test_what_was_popular_once_leaves_in_the_end() -> None:
    ranking = GreedyDual()
    for _ in range(50):
        ranking.touch("old", 1, 1)
    held = {"old"}
    for i in range(400):
        ranking.touch(f"new{i}", 1, 1)
        held.add(f"new{i}")
        if len(held) > 3:
            held.discard(ranking.victim(held))
        ranking.touch(f"new{i}", 1, 1) if f"new{i}" in held else None
    assert "old" not in held


def test_growth_is_what_comes_after_warm_up() -> None:
    warming = [(float(i), 10_000_000 * min(i, 10)) for i in range(40)]
    assert growth_mb(warming) == 0
    assert growth_mb([(t, size + 1_000_000 * int(t)) for t, size in warming]) == pytest.approx(20, abs=1)
