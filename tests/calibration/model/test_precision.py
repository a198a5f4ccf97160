"""Which precision a machine computes in."""

import pytest
import torch

from calibration.model import precision


@pytest.mark.parametrize(("flags", "expected"), [({"avx2": True}, False), ({"avx512_bf16": True}, True)], ids=str)
def test_a_cpu_without_bfloat16_products_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert precision.has_bfloat16("cpu") is expected
    with precision.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected else torch.float32)


def test_this_machines_flags_are_read() -> None:
    assert isinstance(precision.has_bfloat16("cpu"), bool)
