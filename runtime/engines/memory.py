"""How much memory this process holds, and malloc settings for a process that loads and evicts engines."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_LARGEST_FROM_HEAP = 32 << 20  # bytes: every packed weight of SD1.5 and SDXL; freed larger blocks go back
_NEVER = 1 << 40


def draw_environment() -> dict[str, str]:
    """The environment of a drawing process: os.environ, plus malloc settings unless it already has some.

    An evicted engine's memory is reused by the next one: clearing fresh pages takes Linux a third of the time to load an
    SD1.5 UNet. One heap, so that every thread can use what another freed; huge pages where Linux offers them on request.
    glibc reads this when a process starts; other C libraries ignore it.
    """
    settings = {"hugetlb": 1, "arena_max": 1, "mmap_threshold": _LARGEST_FROM_HEAP, "trim_threshold": _NEVER}
    told = ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())
    return {_TUNABLES: told} | os.environ


def memory_bytes() -> int:
    """Private memory of this process in bytes (0 where /proc is not there)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def allocated_bytes() -> int:
    """Bytes that malloc has handed out and not got back; private memory where glibc cannot say.

    Private memory does not grow when a freed engine's pages are used again.
    """
    mallinfo = _mallinfo()
    if mallinfo is None:
        return memory_bytes()
    told = mallinfo()
    return int(told.uordblks + told.hblkhd)


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h. uordblks: in use in heaps; hblkhd: in use in mappings of their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


@cache
def _mallinfo() -> Callable[[], _MallInfo] | None:
    try:
        function = ctypes.CDLL(None).mallinfo2  # glibc 2.33
    except (AttributeError, OSError, TypeError):
        return None
    function.restype = _MallInfo
    return function
