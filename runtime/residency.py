"""Which engines stay in memory: a byte budget, one load per engine however many ask, eviction by what a reload costs.

It knows keys, bytes and seconds, not what an engine is.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from personalq.errors import EngineError

logger = logging.getLogger("personalq.runtime")
V = TypeVar("V")


class Ranking(Protocol):
    """Decides which value to evict."""

    def touch(self, key: str, size: float, cost: float) -> None:
        """`key` (size in bytes, cost of loading it again in seconds) was used."""

    def victim(self, keys: Collection[str]) -> str:
        """Choose which of `keys` to evict, and forget it."""


class GreedyDual:
    """GreedyDual-Size with frequency: value = floor + uses * cost / size; the lowest is evicted and raises the floor.

    Cao and Irani, Cost-Aware WWW Proxy Caching Algorithms (USITS'97); frequency after Cherkasova (HPL-98-69R1). The
    floor ages what was popular once: whatever is used later starts above it.
    """

    def __init__(self) -> None:
        self._floor = 0.0
        self._value: dict[str, float] = {}
        self._uses: Counter[str] = Counter()

    def touch(self, key: str, size: float, cost: float) -> None:
        self._uses[key] += 1
        self._value[key] = self._floor + self._uses[key] * cost / max(size, 1.0)

    def victim(self, keys: Collection[str]) -> str:
        chosen = min(keys, key=lambda key: self._value.get(key, self._floor))
        self._floor = self._value.pop(chosen, self._floor)
        del self._uses[chosen]
        return chosen


class LeastRecent:
    """Least recently used: what GreedyDual is compared with."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[str, int] = {}

    def touch(self, key: str, size: float, cost: float) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def victim(self, keys: Collection[str]) -> str:
        chosen = min(keys, key=lambda key: self._last.get(key, 0))
        self._last.pop(chosen, None)
        return chosen


@dataclass(frozen=True)
class Loaded(Generic[V]):
    """What a loader made, and the bytes of memory that it takes."""

    value: V
    bytes: int


@dataclass
class Resident(Generic[V]):
    """One engine in memory."""

    loaded: Loaded[V]
    load_seconds: float
    uses: int = 0


@dataclass
class Counts:
    """What happened so far. load_seconds: every load's duration, for a histogram; the reader empties it."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    prefetched: int = 0
    load_seconds: list[float] = field(default_factory=list)


class Residency(Generic[V]):
    """Values in memory under a byte budget. Every method may be called from any thread.

    A pinned value stays until it is unpinned as often. `load` makes a value; `estimate` says what it will take before
    it is made; `is_fresh` tells whether a value in memory still is what lies on disk; `shared_bytes`, what values hold
    together beside what each takes.
    """

    def __init__(
        self,
        load: Callable[[str], Loaded[V]],
        estimate: Callable[[str], int],
        budget_bytes: int,
        *,
        ranking: Ranking | None = None,
        is_fresh: Callable[[V], bool] = lambda _: True,
        shared_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._load, self._estimate, self._is_fresh, self._shared_bytes = load, estimate, is_fresh, shared_bytes
        self.budget_bytes = budget_bytes
        self._ranking = ranking or GreedyDual()
        self._changed = threading.Condition()
        self._resident: dict[str, Resident[V]] = {}
        self._loading: dict[str, Future[V]] = {}
        self._pins: Counter[str] = Counter()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self.counts = Counts()

    def pin(self, key: str) -> "Future[V]":
        """Keep `key` in memory from when it is loaded until `unpin`; the future holds it, or why it cannot be loaded."""
        with self._changed:
            self._pins[key] += 1
            self._drop_if_stale(key)
            if key in self._resident or key in self._loading:
                self.counts.hits += 1
            else:
                self.counts.misses += 1
            return self._ensure(key)

    def unpin(self, key: str) -> None:
        with self._changed:
            self._pins[key] -= 1
            if self._pins[key] <= 0:
                del self._pins[key]
            self._changed.notify_all()

    def prefetch(self, key: str) -> None:
        """Load `key` if there is room beside what is pinned; a hint, so a failure is only counted."""
        with self._changed:
            if key not in self._resident and key not in self._loading:
                self.counts.prefetched += 1
                self._ensure(key)

    def ready(self, key: str) -> bool:
        """Whether `key` is in memory now."""
        with self._changed:
            return key in self._resident

    def snapshot(self) -> list[tuple[str, Resident[V], bool]]:
        """(key, what is known about it, whether it is in use) of everything in memory, largest first."""
        with self._changed:
            rows = [(key, resident, self._pins[key] > 0) for key, resident in self._resident.items()]
        return sorted(rows, key=lambda row: -row[1].loaded.bytes)

    def used_bytes(self) -> int:
        with self._changed:
            return self._shared_bytes() + sum(resident.loaded.bytes for resident in self._resident.values())

    def close(self) -> None:
        """Stop loading and forget everything."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        with self._changed:
            self._resident.clear()

    def _ensure(self, key: str) -> "Future[V]":
        if key in self._resident:
            found = self._resident[key]
            found.uses += 1
            self._ranking.touch(key, found.loaded.bytes, found.load_seconds)
            done: Future[V] = Future()
            done.set_result(found.loaded.value)
            return done
        if key not in self._loading:
            self._loading[key] = self._loader.submit(self._bring, key)
        return self._loading[key]

    def _bring(self, key: str) -> V:
        """On the loader's thread: make room, load, register."""
        try:
            self._make_room(key, self._estimate(key))
            started = time.perf_counter()
            loaded = self._load(key)
            seconds = time.perf_counter() - started
            with self._changed:
                self._make_room(key, loaded.bytes, is_loaded=True)
                self._resident[key] = Resident(loaded, seconds, uses=1)
                self._ranking.touch(key, loaded.bytes, seconds)
                self.counts.load_seconds.append(seconds)
            return loaded.value
        except Exception:
            self.counts.failures += 1
            raise
        finally:
            with self._changed:
                self._loading.pop(key, None)
                self._changed.notify_all()

    def _make_room(self, key: str, size: int, *, is_loaded: bool = False) -> None:
        """Evict idle values until `size` fits. A value that is already loaded is accepted even when nothing can be evicted.

        Waits while everything is in use and `key` is wanted. Raises EngineError when it never fits, or is only a hint.
        """
        if size > self.budget_bytes and not is_loaded:
            raise EngineError(
                f"memory: an engine must fit the budget of {self.budget_bytes / 1e6:.0f} MB, got one of "
                f"{size / 1e6:.0f} MB; raise --budget-mb"
            )
        with self._changed:
            while self.used_bytes() + size > self.budget_bytes:
                idle = [name for name in self._resident if not self._pins[name]]
                if idle:
                    self._evict(self._ranking.victim(idle))
                elif is_loaded:
                    return
                elif self._pins[key]:
                    self._changed.wait()
                else:
                    self._loading.pop(key, None)  # under the lock, so that nobody joins a load that fails
                    raise EngineError("memory: everything in the budget is in use; nothing is loaded ahead")

    def _evict(self, key: str) -> None:
        del self._resident[key]
        self.counts.evictions += 1

    def _drop_if_stale(self, key: str) -> None:
        found = self._resident.get(key)
        if found is not None and not self._is_fresh(found.loaded.value):
            logger.warning("%s: files changed on disk; loading it again", key)
            self._ranking.victim([key])
            self._evict(key)
