"""Every refusal has OpenAI's shape and a true status, whatever was sent: the official client can always read it."""

import logging
import socket
from typing import Any

import pytest

httpx2 = pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install 'personalq[dev]'")
DRAW = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


def checked(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The `error` object, after a look at its shape."""
    assert answer.status_code == status and answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys() and error["code"] == code and error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert answer.headers["x-should-retry"] == "false" and answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("content", "headers", "status", "code", "message"),
    [
        (b"{", JSON, 400, "invalid_json", "body: must be JSON, got Expecting property name"),
        (b"", JSON, 400, "invalid_request", "body: must be a JSON object, got nothing"),
        (b"null", JSON, 400, "invalid_request", "body: must be a JSON object, got nothing"),
        (b"[1]", JSON, 400, "invalid_request", "body: must be a JSON object, got an array"),
        (b'"x"', JSON, 400, "invalid_request", "body: must be a JSON object, got a string"),
        (b"7", JSON, 400, "invalid_request", "body: must be a JSON object, got a number"),
        (b"{}", JSON, 400, "missing_required_parameter", "prompt: must be given; add it"),
        (b'{"prompt": "\xff"}', JSON, 400, "invalid_json", "body: must be JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "invalid_request", "prompt: Input should be a valid string"),
        (b"[" * 60_000, JSON, 400, "invalid_json", "body: must be JSON in UTF-8"),
        (b'{"prompt": "x", "guidance": NaN}', JSON, 400, "invalid_request", "guidance: Input should be"),
        (b'{"prompt": "x", "n": 1.5}', JSON, 400, "invalid_request", "n: Input should be a valid integer"),
        (b'{"prompt": "x", "answers": [null]}', JSON, 400, "invalid_request", "answers.0: Input should be"),
        (b'{"prompt": "x"}', {}, 415, "unsupported_media_type", "content-type: must be application/json, got none"),
        (
            b'{"prompt": "x"}',
            {"Content-Type": "application/x-www-form-urlencoded"},
            415,
            "unsupported_media_type",
            "content-type: must be application/json, got 'application/x-www-form-urlencoded'",
        ),
    ],
    ids=lambda value: value.decode("latin-1")[:30] or "empty" if isinstance(value, bytes) else "",
)
def test_a_body_of_another_kind_is_said_to_be_that(
    served: Any, content: bytes, headers: dict[str, str], status: int, code: str, message: str
) -> None:
    error = checked(served.client.post(DRAW, content=content, headers=headers), status, code)
    assert error["message"].startswith(message)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/chat/completions", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("GET", "/v1/images/nothing", 404, "unknown_url"),
        ("POST", "/images/generations", 404, "unknown_url"),
        ("GET", "/favicon.ico", 404, "unknown_url"),
        ("GET", "/v1/images/files/nothing.png", 404, "gone"),
        ("GET", "/page/nothing.js", 404, "not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/models/%00", 404, "model_not_found"),
        ("GET", "/v1/models/..%2f..%2fetc", 404, "model_not_found"),
        ("GET", "/v1/models/" + "x" * 5000, 404, "model_not_found"),
        ("POST", "/v1/images/edits", 400, "not_supported"),
        ("POST", "/v1/images/variations", 400, "not_supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_there_is_refused_in_the_same_shape(
    served: Any, method: str, path: str, status: int, code: str
) -> None:
    error = checked(served.client.request(method, path), status, code)
    assert str(served.repository) not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", DRAW, "POST"),
        ("HEAD", DRAW, "POST"),
        ("OPTIONS", DRAW, "POST"),
        ("DELETE", "/v1/models/rex", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/images/files/a.png", "GET, HEAD"),
        ("PATCH", "/healthz", "GET, HEAD"),
    ],
)
def test_another_method_is_405_with_those_that_are_allowed(served: Any, method: str, path: str, allowed: str) -> None:
    answer = served.client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        checked(answer, 405, "method_not_supported")


@pytest.mark.parametrize("path", ["/", "/docs", "/healthz", "/metrics", "/v1/models", "/openapi.json", "/page/page.js"])
def test_head_is_get_without_the_body(served: Any, path: str) -> None:
    head, get = served.client.head(path), served.client.get(path)
    assert (head.status_code, head.content) == (200, b"") and head.headers["content-type"] == get.headers[
        "content-type"
    ]
    assert served.client.head("/nothing").status_code == 404


@pytest.mark.parametrize("path", [DRAW + "/", "//v1//images/generations", "/v1/images/generations//"])
def test_slashes_too_many_are_no_other_path(served: Any, path: str) -> None:
    """What a base URL with a slash at its end makes of every path; over a socket, as clients tidy paths up."""
    body = b'{"prompt": "sks mug", "model": "moss-mug", "steps": 1}'
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("path", [DRAW, "/v1/images/edits", "/v1/nothing"])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["declared", "chunked"])
def test_a_client_with_a_large_body_can_read_why_it_is_refused(served: Any, path: str, is_streamed: bool) -> None:
    """12 MB do not fit into the sockets' buffers: without reading on, the client would see a reset connection."""
    content = iter([b"x" * 1_000_000] * 12) if is_streamed else b"x" * 12_000_000
    status, code = {DRAW: (413, "body_too_large"), "/v1/nothing": (404, "unknown_url")}.get(
        path, (400, "not_supported")
    )
    checked(served.client.post(path, content=content, headers=JSON), status, code)


def test_who_asks_before_sending_a_body_is_answered_without_it(served: Any) -> None:
    head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(head.encode() + b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_a_bug_is_500_and_the_log_names_its_place_but_not_what_was_sent(
    served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_streamed: bool
) -> None:
    words = "a secret prompt"

    def broken(*_: Any) -> Any:
        raise RuntimeError(words)

    monkeypatch.setattr(served.service, "stream" if is_streamed else "choose", broken)
    with caplog.at_level(logging.ERROR, "personalq.runtime"):
        answer = served.draw(stream=is_streamed, steps=1)
    if is_streamed:
        assert answer.status_code == 200 and answer.text.startswith(
            'event: error\ndata: {"error": {"message": "the serv'
        )
    else:
        checked(answer, 500, "internal_error")
    assert "secret" not in answer.text + caplog.text
    assert answer.headers["x-request-id"] in answer.text and answer.headers["x-request-id"] in caplog.text
    assert "RuntimeError" in caplog.text and "in broken" in caplog.text
    monkeypatch.undo()
    assert served.draw(steps=1).status_code == 200


def test_the_description_has_no_other_shape_of_refusals(served: Any) -> None:
    described = served.client.get("/openapi.json")
    assert "detail" not in described.text and "ValidationError" not in described.text
    answers = [route["responses"] for methods in described.json()["paths"].values() for route in methods.values()]
    assert answers and all("Refusal" in str(one["default"]) for one in answers)
    assert described.json()["components"]["schemas"]["Fault"]["required"] == ["message", "type", "param", "code"]


def test_the_official_client_raises_the_error_that_it_has_for_each(served: Any) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="moss-mug", messages=[{"role": "user", "content": "hello"}])
        assert error.value.code == "unknown_url"
        with pytest.raises(openai.BadRequestError, match="edits and variations are not supported"):
            client.images.edit(image=b"\x89PNG" + b"x" * 3_000_000, prompt="a hat")
        with pytest.raises(openai.NotFoundError) as error:
            client.images.generate(prompt="x", model="gpt-image-1")
        assert (error.value.code, error.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as error:
            client.images.generate(prompt="x", n=11)
        assert (error.value.code, error.value.param, error.value.type) == ("limit", "n", "invalid_request_error")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")
