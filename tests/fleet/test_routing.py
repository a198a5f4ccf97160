"""Which replica is asked first: a holder of the engine, unless others have much less to do."""

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'personalq[ray]'")

from fleet.drawing import merged
from fleet.routing import SLACK, Seen, ranked


def seen(name: str, queue: int, *held: str) -> Seen:
    return Seen(name, frozenset(held), queue)


def test_a_holder_comes_first_though_another_is_idle() -> None:
    assert ranked("mug", [seen("a", 0), seen("b", SLACK, "mug"), seen("c", 1)]) == [["b"], ["a", "c"]]


def test_a_holder_with_a_long_queue_is_left_for_the_shortest_which_will_load() -> None:
    replicas = [seen("a", 1, "x"), seen("b", SLACK + 2, "mug"), seen("c", 1)]
    assert ranked("mug", replicas) == [["c"], ["a", "b"]]


def test_of_several_holders_all_can_be_taken() -> None:
    assert ranked("mug", [seen("a", 1, "mug"), seen("b", 0, "mug"), seen("c", 0)]) == [["b", "a"], ["c"]]


def test_what_nobody_holds_goes_to_the_idlest_with_the_fewest_checkpoints() -> None:
    assert ranked("mug", [seen("a", 0, "x", "y"), seen("b", 0, "x"), seen("c", 1)]) == [["b"], ["a", "c"]]


def test_reports_are_one_and_counts_of_a_lost_replica_stay() -> None:
    row = {"checkpoint": "mug", "engine": "onnxruntime", "bytes": 5}
    sizes = {"used_bytes": 5, "budget_bytes": 9, "process_bytes": 7}
    counts = {"hits": 3, "misses": 1, "evictions": 0, "failures": 0, "prefetched": 0}
    report = {"engines": [row], "counts": counts, **sizes}
    found = merged({"b": report}, {"a": counts, "b": counts})
    assert found["engines"] == [{**row, "replica": "b"}]
    assert found["counts"]["hits"] == 6 and found["counts"]["misses"] == 2
    assert {name: found[name] for name in sizes} == sizes and found["load_seconds"] == []
