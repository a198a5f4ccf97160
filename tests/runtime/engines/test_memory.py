"""malloc's settings reach the drawing process, give way to a user's own, and freed memory is not counted as held."""

import os
import subprocess
import sys

import pytest

from runtime.engines.memory import allocated_bytes, draw_environment, memory_bytes

MEGABYTE = 1 << 20


def test_a_drawing_process_keeps_freed_memory_for_the_next_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("OTHER", "stays")
    environment = draw_environment()
    assert "glibc.malloc.trim_threshold=1099511627776" in environment["GLIBC_TUNABLES"].split(":")
    assert environment["OTHER"] == "stays" and "GLIBC_TUNABLES" not in os.environ


def test_settings_of_the_user_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert draw_environment()["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


HOLD_AND_FREE = """
import ctypes
from runtime.engines.memory import allocated_bytes, memory_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = allocated_bytes(), memory_bytes()
blocks = [libc.malloc(20 << 20) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, 20 << 20)
held = allocated_bytes(), memory_bytes()
for block in blocks:
    libc.free(block)
print(*(n - m for n, m in zip(held, before)), *(n - m for n, m in zip((allocated_bytes(), memory_bytes()), before)))
"""


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_what_was_freed_is_kept_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", HOLD_AND_FREE], env=draw_environment(), capture_output=True, text=True, check=True
    )
    allocated, private, still_allocated, still_private = (int(number) / MEGABYTE for number in done.stdout.split())
    assert allocated == pytest.approx(160, abs=2) and private == pytest.approx(160, abs=8)
    assert still_allocated == pytest.approx(0, abs=2) and still_private > 150


def test_this_process_holds_something() -> None:
    assert allocated_bytes() > MEGABYTE and memory_bytes() > MEGABYTE
