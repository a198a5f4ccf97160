"""Which precision a machine computes in: bfloat16 where its hardware multiplies it, float32 elsewhere."""

import torch


def has_bfloat16(device: str) -> bool:
    """Whether `device` ('cpu', 'cuda') multiplies bfloat16 itself; a CPU that emulates it is 15 times slower than in float32."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: str) -> torch.autocast:
    """A block in which products and convolutions of `device` run in bfloat16 where that is faster."""
    return torch.autocast(device, torch.bfloat16, enabled=has_bfloat16(device))
