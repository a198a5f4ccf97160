"""What `bench switch` and `bench capacity` measure of an engine, on a real, tiny one."""

from typing import Any

from bench import capacity, switch
from personalq.bundle import read_manifest


def test_an_engine_is_measured_for_the_capacity_model(exported: Any) -> None:
    bundle = exported[1]["taq"].bundle
    costs, seen = capacity.measure([bundle], "onnxruntime", rounds=2)
    assert len(seen["load_s"]) == len(seen["draw_s"]) == len(seen["engine_bytes"]) == 2  # the first round is left out
    assert costs.bytes > 0 and costs.draw_s > 0 and costs.load_s > 0
    assert seen["steps"] == read_manifest(bundle).steps


def test_a_switch_is_measured_first_of_its_base_and_beside_another(exported: Any) -> None:
    repository, made = exported
    bundles = [made[name].bundle for name in ("taq", "fp32")]
    row = switch.measure("onnxruntime", "w8a8", bundles, rounds=2)
    assert (row["engine"], row["bits"]) == ("onnxruntime", "w8a8")
    assert len(row["first_s"]) == len(row["cold_s"]) == 2
    assert row["resident_p50_ms"] > 0 and row["cold_p50_s"] > 0
    assert switch.of_bits(repository.root, "rex", "w8a8") == bundles[0]
    assert switch.reference(repository.root, "rex") == bundles[1]
    assert switch.of_bits(repository.root, "rex", "w2a2") is None
