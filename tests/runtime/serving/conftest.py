"""A server over a small repository: a mug, and two dogs that only a question tells apart. Real process, real HTTP."""

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from personalq.bundle import MANIFEST, CheckpointEntry, SpecEntry, manifest_bytes, read_manifest
from personalq.repository import Repository

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'personalq[serve]'")
httpx = pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install 'personalq[dev]'")

CARDS: tuple[dict[str, Any], ...] = (
    {"id": "moss-mug", "trigger": ["sks"], "class_noun": "mug", "description": "My green mug with moss on it."},
    {"id": "rex", "trigger": ["sks"], "class_noun": "dog", "description": "Rex is my black dog."},
    {"id": "luna", "trigger": ["sks"], "class_noun": "dog", "description": "Luna is my white dog."},
)


def _add_bundle(
    root: Path, source: Path, checkpoint: str, *, name: str = "", policy: str = "taq", steps: int = 4
) -> Path:
    """A bundle of `source`'s graphs for another checkpoint; more steps make it slower."""
    folder = root / "bundles" / (name or f"{checkpoint}-{policy}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, folder)
    manifest = read_manifest(folder)
    entry = CheckpointEntry(id=checkpoint, name=checkpoint, kind="lora", base="tiny", trigger=("sks",), sha256="0")
    spec = SpecEntry(name=policy, policy=policy, bits="w8a8", sha256="0", storage="float16")
    changed = manifest.model_copy(update={"key": folder.name, "checkpoint": entry, "spec": spec, "steps": steps})
    (folder / MANIFEST).write_bytes(manifest_bytes(changed))
    return folder


def make_repository(root: Path, made_bundles: dict[str, Path]) -> Path:
    root.mkdir()
    for card in CARDS:
        _add_bundle(root, made_bundles["split"], card["id"])
    _add_bundle(root, made_bundles["full"], "moss-mug", policy="fp32")
    lines = root.parent / f"{root.name}.jsonl"
    lines.write_text("".join(json.dumps({"kind": "lora", "name": card["id"], **card}) + "\n" for card in CARDS))
    Repository.open(root, create=True).add_cards(lines)
    return root


@dataclass
class Running:
    """A server in a thread of this process; its drawing process is a real one."""

    url: str
    repository: Path
    service: Any
    key: str = ""
    client: Any = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.client = httpx.Client(base_url=self.url, timeout=120, headers=headers)

    def draw(self, prompt: str = "sks mug", **body: Any) -> Any:
        return self.client.post("/v1/images/generations", json={"prompt": prompt, "model": "moss-mug", **body})


@contextlib.contextmanager
def running(repository: Path, **options: Any) -> Iterator[Running]:
    """Serve until the block ends. options: fields of Limits, DrawOptions and ServeOptions, by name."""
    import uvicorn

    from runtime.serving.app import create_app
    from runtime.serving.options import DrawOptions, Limits, ServeOptions

    draw = {
        name: options.pop(name) for name in ("budget_mb", "max_batch", "target", "store", "cache_mb") if name in options
    }
    limits = {name: options.pop(name) for name in ("queue", "seconds", "images", "body_bytes") if name in options}
    key = options.pop("key", "")
    app = create_app(ServeOptions(DrawOptions(repository, threads=1, **draw), limits=Limits(**limits), **options))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", ws="none", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait_until(lambda: server.started, 60)
        one = Running(f"http://127.0.0.1:{port}", repository, app.state.service, key)
        yield one
        one.client.close()
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def _wait_until(is_so: Callable[[], Any], seconds: float = 30) -> None:
    """Return when `is_so()`; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def served(made_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for every test that only asks it for things."""
    with running(make_repository(tmp_path_factory.mktemp("served") / "repo", made_bundles)) as one:
        yield one


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>app</title>")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[str]:
    """The origin of another site: of this machine, as browsers ask before a page of the net may reach it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def locked(
    made_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, elsewhere: str
) -> Iterator[Running]:
    """A server with an API key, which the pages of two other sites may use."""
    from runtime.serving.options import read_keys

    folder, key = tmp_path_factory.mktemp("locked"), "0123456789abcdef0123"
    (folder / "keys").write_text(f"{key}\n")
    options = {"key_digests": read_keys(folder / "keys"), "key": key, "origins": ("http://app.example", elsewhere)}
    with running(make_repository(folder / "repo", made_bundles), **options) as one:
        yield one


@pytest.fixture
def repository(made_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A repository that a test may change."""
    return make_repository(tmp_path / "repo", made_bundles)


@pytest.fixture
def serve() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    return running


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return _wait_until


@pytest.fixture
def add_bundle() -> Callable[..., Path]:
    return _add_bundle
