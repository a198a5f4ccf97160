"""The step bench counts work as it is: convolutions and products are the same many whatever they are computed in."""

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
from bench._step import profile


def test_integer_kernels_do_as_many_multiply_adds_as_float_ones(exported) -> None:
    found = {}
    for name, result in exported[1].items():
        found[name] = {row["op"]: row["multiply_adds"] for row in profile(result.bundle, 1, 1)}
    assert found["taq"]["QLinearConv"] > 0
    integer, plain = ({op: n for op, n in found[name].items() if "Conv" in op} for name in ("taq", "fp32"))
    assert sum(integer.values()) == sum(plain.values())
