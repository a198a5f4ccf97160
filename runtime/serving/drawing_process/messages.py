"""How the two processes speak: a JSON object and a blob, each with its length before it. No pickles.

Frame: two big-endian uint32 (JSON bytes, blob bytes), then the JSON in UTF-8, then the blob.
"""

import json
import struct
from typing import Any, BinaryIO

Message = dict[str, Any]
HEAD = struct.Struct(">II")
MAX_BYTES = 256 << 20


def pack(message: Message, blob: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(message).encode()
    return HEAD.pack(len(text), len(blob)) + text + blob


def sizes(head: bytes) -> tuple[int, int]:
    """Length of the JSON and of the blob that follow. Raises ValueError when it is not a frame of ours."""
    text, blob = HEAD.unpack(head)
    if text + blob > MAX_BYTES:
        raise ValueError(f"frame of {text + blob} bytes: must be at most {MAX_BYTES}")
    return text, blob


def read(stream: BinaryIO) -> tuple[Message, bytes] | None:
    """The next frame of a blocking stream; None at its end, also in the middle of a frame."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    n_text, n_blob = sizes(head)
    text, blob = stream.read(n_text), stream.read(n_blob)
    return (json.loads(text), blob) if len(text) == n_text and len(blob) == n_blob else None
