"""What a server is told when it starts. Frozen values; read once."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalq.errors import EngineError

MEGABYTE = 1_000_000
ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@,]+")


@dataclass(frozen=True)
class DrawOptions:
    """What the drawing process is told. threads: per operator, 0 = all cores. store: URL of further bundles, or ''."""

    repository: Path
    budget_mb: float = 2000.0
    target: str = "onnxruntime"
    threads: int = 0
    max_batch: int = 4
    store: str = ""
    cache_mb: float = 20_000.0


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait. seconds: a request's deadline, waiting included."""

    body_bytes: int = 64 * 1024
    prompt_chars: int = 2000
    images: int = 10
    pixels: int = 1024 * 1024
    steps: int = 150
    queue: int = 32
    seconds: float = 600.0


@dataclass(frozen=True)
class ServeOptions:
    """Where to listen, who may ask, and what may be asked.

    key_digests: sha256 of each API key; empty: everybody may. origins: whose pages may ask from a browser.
    """

    draw: DrawOptions
    host: str = "127.0.0.1"
    port: int = 8765
    limits: Limits = Limits()
    key_digests: frozenset[str] = frozenset()
    logs_prompts: bool = False
    origins: tuple[str, ...] = ()

    def allows(self, key: str) -> bool:
        """Whether a client that shows `key` may ask."""
        if not self.key_digests:
            return True
        digest = hashlib.sha256(key.encode()).hexdigest()
        return any([hmac.compare_digest(digest, known) for known in self.key_digests])  # every one: no timing to read


def read_keys(file: Path) -> frozenset[str]:
    """sha256 digests of the keys in a file, one a line; '#' starts a comment. Raises EngineError."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{file}: must be a readable file of API keys, got {type(error).__name__}; fix it") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or min(map(len, keys)) < 16:
        raise EngineError(
            f"{file}: must hold API keys of 16 characters or more, one a line; make one with 'openssl rand -hex 24'"
        )
    return frozenset(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def checked_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Origins as browsers send them, '*' for every one. Raises EngineError for what no browser sends."""
    plain = tuple(origin.strip().lower().rstrip("/") for origin in origins)
    for origin in plain:
        if origin != ANY_ORIGIN and not _ORIGIN.fullmatch(origin):
            raise EngineError(
                f"--allow-origin: must be '*' or SCHEME://HOST[:PORT], got {origin!r}; leave out paths, repeat the option"
            )
    return plain


def options_of(
    repository: Path,
    *,
    host: str,
    port: int,
    queue: int,
    api_keys: Path | None,
    log_prompts: bool,
    origins: Sequence[str] = (),
    **draw: Any,
) -> ServeOptions:
    """The options of `personalq serve`; draw: fields of DrawOptions. Raises EngineError for unusable keys or origins."""
    return ServeOptions(
        draw=DrawOptions(repository, **draw),
        host=host,
        port=port,
        limits=Limits(queue=queue),
        key_digests=frozenset() if api_keys is None else read_keys(api_keys),
        logs_prompts=log_prompts,
        origins=checked_origins(origins),
    )
