"""Pictures that were answered as URLs, kept in memory for a while. Whoever knows a name may fetch its picture."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from .api import ApiError
from .drawing_process.formats import MEDIA_TYPES

_BYTES, _SECONDS = 64 << 20, 600.0
_NAME_BYTES = 24  # of randomness: 192 bits. An <img> shows no key, so the name is all that guards a picture


@dataclass(frozen=True)
class Kept:
    """One picture. until: on the store's clock, in seconds."""

    content: bytes
    media_type: str
    until: float


class KeptPictures:
    """At most 64 MiB of the newest pictures, each for ten minutes. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def keep(self, content: bytes, form: str) -> str:
        """Keep a picture of format `form`; return its name, which ends as its file would."""
        name = f"{secrets.token_urlsafe(_NAME_BYTES)}.{form}"
        self._kept[name] = Kept(content, MEDIA_TYPES[form], self._clock() + _SECONDS)
        self._bytes += len(content)
        while self._kept and (self._bytes > _BYTES or next(iter(self._kept.values())).until < self._clock()):
            self._bytes -= len(self._kept.popitem(last=False)[1].content)
        return name

    def get(self, name: str) -> tuple[Kept, int]:
        """A picture, and the whole seconds that it will still be kept. Raises ApiError when it is gone."""
        found = self._kept.get(name)
        left = 0.0 if found is None else found.until - self._clock()
        if found is None or left <= 0:
            text = "this picture is not kept (any more): pictures are for ten minutes, the newest 64 MiB; draw it again"
            raise ApiError(404, "gone", text)
        return found, int(left)
