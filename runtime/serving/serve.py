"""Run the server until it is told to stop: SIGTERM and SIGINT finish what was begun, and take nothing new."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from personalq.repository import Repository
from personalq.repository.remote import Remote

from ..cache import take_cards
from .app import create_app
from .options import ServeOptions, options_of

_GRACE_SECONDS = 3600  # requests have a deadline of their own


def serve_repository(repository: Path, **options: Any) -> None:
    """`personalq serve`: the options of its command line."""
    told = options_of(repository, **options)
    if told.draw.store:
        take_cards(Repository.open(repository), Remote(told.draw.store))
    serve(told)


def serve(options: ServeOptions) -> None:
    """Serve until a signal; returns when the last request was answered."""
    start_access_log()
    app = create_app(options)
    service = app.state.service
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=_GRACE_SECONDS,
        server_header=False,
        ws="none",
    )
    server = _Server(config, lambda: setattr(service, "is_draining", True))
    print(f"personalq: http://{options.host}:{options.port}", file=sys.stderr)
    server.run()


class _Server(uvicorn.Server):
    """uvicorn, which also says that it is draining, so that /readyz turns before the last answer is out, and ends with 0."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_drain = on_drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_drain()
        self.force_exit = self.should_exit and sig == signal.SIGINT  # Ctrl-C twice does not wait
        self.should_exit = True


def start_access_log() -> None:
    """One JSON line a request on stderr."""
    access = logging.getLogger("personalq.access")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
