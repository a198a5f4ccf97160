"""A real S3 server on this machine: moto's, which `make test` installs into an environment of its own.

It cannot share one with us: botocore wants python-dateutil < 3, and what matplotlib has here is 4.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = "personalq-tests"
# moto looks only at which service a request is signed for.
_SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Yield the server's address, with an empty bucket in it; skip when there is no moto_server."""
    program = os.environ.get("PERSONALQ_MOTO_SERVER") or shutil.which("moto_server")
    if program is None:
        pytest.skip("PERSONALQ_MOTO_SERVER does not name a moto_server: run 'make test'")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    server = subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        make_bucket(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def make_bucket(address: str) -> None:
    """Create the bucket as soon as the server answers."""
    request = urllib.request.Request(
        f"{address}/{BUCKET}", data=b"", method="PUT", headers={"Authorization": _SIGNED, "Content-Type": "text/plain"}
    )
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=10).close()
            return
        time.sleep(0.1)
    raise AssertionError(f"no S3 server at {address}")


def s3_environment(address: str) -> dict[str, str]:
    """What a client is told through its environment."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test", "AWS_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT": address, "AWS_ALLOW_HTTP": "true"}
