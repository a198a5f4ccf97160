"""The server as clients use it: keys in every spelling, null for a default, formats, ten pictures, links, other sites' pages."""

import base64
import io
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from PIL import Image

from runtime.drawing.pipeline import Picture, Pipeline, Settings
from runtime.engines.ort import OrtEngine
from runtime.serving.api import Checked, CheckinRequest, ImageRequest
from runtime.serving.drawing_process.formats import Format, encode
from runtime.serving.kept import KeptPictures
from runtime.serving.options import checked_origins

httpx2 = pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install 'personalq[dev]'")
KEY, SITE = "0123456789abcdef0123", "http://app.example"  # of the `locked` server
DRAW = "/v1/images/generations"
ASKED = {"prompt": "sks mug", "model": "moss-mug", "steps": 1, "seed": 7}


def opened(content: bytes) -> Any:
    return Image.open(io.BytesIO(content))


def decoded(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(opened(base64.b64decode(row["b64_json"])).convert("RGB"), dtype=int)


def asked_raw(url: str, text: bytes) -> tuple[int, bytes]:
    """Status and everything else of an answer to these bytes, over a socket of our own."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(text)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split()[1]), answer


# Pictures that are answered as URLs


def test_a_picture_url_opens_without_a_key_and_nothing_else_does(locked: Any) -> None:
    rows = locked.draw(response_format="url", n=2, steps=1).json()["data"]
    names = [row["url"].rpartition("/")[2].removesuffix(".png") for row in rows]
    assert len(set(names)) == 2 and all(re.fullmatch(r"[A-Za-z0-9_-]{32}", name) for name in names)  # 32 x 6 bits
    with httpx2.Client() as nobody:
        got = nobody.get(rows[0]["url"])
        assert got.status_code == 200 and opened(got.content).size == (16, 16)
        assert got.headers["cross-origin-resource-policy"] == "cross-origin"
        assert re.fullmatch(r"private, max-age=(599|600)", got.headers["cache-control"])
        head = nobody.head(rows[0]["url"])
        assert (head.status_code, head.content) == (200, b"") and head.headers["content-length"] == str(
            len(got.content)
        )
        for method, path in (
            ("POST", rows[0]["url"].removeprefix(locked.url)),
            ("GET", "/v1/images/files"),
            ("GET", "/v1/models"),
            ("GET", "/v1/images/files/../../models"),
            ("POST", DRAW),
            ("POST", "/v1/checkin"),
            ("GET", "/v1/residency"),
        ):
            assert nobody.request(method, locked.url + path).status_code == 401, (method, path)
    for path in (b"//v1/models", b"/v1//models", b"/v1/images/files/../../models", b"/v1/models/"):
        assert asked_raw(locked.url, b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path)[0] in (401, 404)


def test_kept_pictures_go_after_ten_minutes_and_beyond_64_mib() -> None:
    now = [0.0]
    pictures = KeptPictures(lambda: now[0])
    first = pictures.keep(b"x" * (40 << 20), "png")
    assert pictures.get(first)[1] == 600 and pictures.get(first)[0].media_type == "image/png"
    second = pictures.keep(b"y" * (30 << 20), "webp")
    with pytest.raises(Exception, match=r"^this picture is not kept \(any more\)"):
        pictures.get(first)
    now[0] = 600.5
    with pytest.raises(Exception, match="draw it again"):
        pictures.get(second)
    assert pictures.get(pictures.keep(b"z", "jpeg"))[0].content == b"z" and len(pictures._kept) == 1


def test_behind_a_proxy_urls_have_the_scheme_and_host_that_it_names(served: Any) -> None:
    headers = {"Host": "pictures.example", "X-Forwarded-Proto": "https"}
    row = served.client.post(DRAW, json={**ASKED, "response_format": "url"}, headers=headers).json()["data"][0]
    assert row["url"].startswith("https://pictures.example/v1/images/files/")


# null, and fields that are not ours


@pytest.mark.parametrize("kind", [ImageRequest, CheckinRequest], ids=["images", "checkin"])
def test_null_in_any_optional_field_means_its_default(kind: type[Checked]) -> None:
    needed = {name: "a mug" for name, field in kind.model_fields.items() if field.is_required()}
    optional = kind.model_fields.keys() - needed.keys()
    assert optional and kind.model_validate({**needed, **dict.fromkeys(optional)}) == kind.model_validate(needed)
    described = kind.model_json_schema()["properties"]
    assert all({"type": "null"} in described[name]["anyOf"] for name in optional)


def test_a_request_full_of_nulls_draws_what_one_without_them_draws(served: Any) -> None:
    nulls = dict.fromkeys(ImageRequest.model_fields.keys() - ASKED.keys())
    full, bare = (served.client.post(DRAW, json=ASKED | more).json() for more in (nulls, {}))
    assert full["data"][0]["b64_json"] == bare["data"][0]["b64_json"] and full["warnings"] == bare["warnings"] == []
    without = dict.fromkeys(ImageRequest.model_fields.keys() - {"prompt", "steps"})
    answer = served.client.post(DRAW, json={"prompt": "my green mug with moss", "steps": 1, **without})
    assert answer.json()["personalq"]["checkpoint"] == "moss-mug"  # model: null lets Check-in choose


def test_every_field_of_the_official_client_is_taken_or_refused_by_name(served: Any) -> None:
    pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    from openai.types import image_generate_params

    theirs = image_generate_params.ImageGenerateParamsNonStreaming.__annotations__.keys()
    theirs |= image_generate_params.ImageGenerateParamsBase.__annotations__.keys()
    refused = {"svg", "frame_count", "frame_duration_ms"}  # of formats that are not drawn
    assert theirs - refused <= ImageRequest.model_fields.keys()
    for name in refused & theirs:
        error = served.draw(**{name: 2}).json()["error"]
        assert (error["code"], error["param"]) == ("unknown_parameter", name)


def test_what_has_no_effect_is_said_and_what_is_so_anyway_is_not(served: Any) -> None:
    silent = {"quality": "standard", "background": "opaque", "style": "auto", "moderation": "auto", "user": ""}
    assert served.draw(steps=1, **silent).json()["warnings"] == []
    said = {"quality": "hd", "background": "transparent", "user": "u-1", "partial_images": 1, "answers": ["rex"]}
    warnings = served.draw(steps=1, **said).json()["warnings"]
    assert [line.split(":")[0] for line in warnings] == ["quality", "background", "user", "partial_images", "answers"]
    assert "u-1" not in str(warnings)


# Keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer {KEY}"}, 200),
        ({"Authorization": f"BEARER   {KEY}  "}, 200),
        ({"Authorization": f"Bearer\t{KEY}"}, 200),
        ({"authorization": f"bEaReR {KEY}"}, 200),
        ({"api-key": KEY}, 200),
        ({"API-Key": f" {KEY} "}, 200),
        ({"Authorization": "Bearer of-a-proxy-between", "api-key": KEY}, 200),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": f"Bearer {KEY} {KEY}"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"x-api-key": KEY}, 401),
        ({}, 401),
    ],
    ids=lambda value: str(value).replace(KEY, "KEY") if isinstance(value, dict) else str(value),
)
def test_a_key_is_read_as_clients_write_it(locked: Any, headers: dict[str, str], status: int) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    text = f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{lines}Connection: close\r\n\r\n"
    got, answer = asked_raw(locked.url, text.encode())
    assert got == status
    if status == 401:
        assert b"www-authenticate: Bearer\r\n" in answer and b'"code": "invalid_api_key"' in answer


def test_openais_clients_show_their_key(locked: Any) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    with openai.OpenAI(base_url=f"{locked.url}/v1/", api_key=KEY) as client:
        assert client.images.generate(prompt="sks mug", model="moss-mug", extra_body={"steps": 1}).data
    azure = openai.AzureOpenAI(base_url=f"{locked.url}/v1", api_key=KEY, api_version="2026-09-01")
    with azure as client:  # sends 'api-key', and ?api-version
        assert client.images.generate(prompt="my green mug with moss", extra_body={"steps": 1}).data
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as error:
            client.models.list()
        assert error.value.code == "invalid_api_key" and "got one that is not known" in str(error.value)


# Pages of other sites


def preflight(one: Any, origin: str, method: str = "POST", path: str = DRAW) -> Any:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-os"
    return httpx2.request("OPTIONS", one.url + path, headers=headers)


def test_a_preflight_of_an_allowed_site_needs_no_key(locked: Any) -> None:
    for path in (DRAW, "/v1/models", "/v1/checkin"):
        allowed = preflight(locked, SITE, path=path)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == SITE
        names = allowed.headers["access-control-allow-headers"].lower()
        assert all(name in names for name in ("authorization", "content-type", "x-stainless-os"))
        assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in allowed.headers


def test_an_allowed_site_reads_answers_and_refusals(locked: Any) -> None:
    for headers, status in (({}, 200), ({"Authorization": "Bearer wrong"}, 401)):
        answer = locked.client.get("/v1/models", headers={"Origin": SITE, **headers})
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == SITE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


def test_another_site_reads_nothing(locked: Any, served: Any) -> None:
    refused = preflight(locked, "https://evil.example")
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "cors"
    for one in (locked, served):  # served allows no site at all
        answer = one.client.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
    assert preflight(served, SITE).status_code == 405


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/path", "https://a.example,https://b.example", ""]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(Exception, match=r"^--allow-origin: must be '\*' or SCHEME://HOST\[:PORT\], got "):
        checked_origins([origin])


def test_origins_are_written_as_browsers_write_them() -> None:
    assert checked_origins(["http://App.example/", "*", "http://localhost:3000"]) == (
        SITE,
        "*",
        "http://localhost:3000",
    )


# Formats


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("how", ["b64_json", "url"])
def test_pictures_come_in_the_format_that_is_asked_for(served: Any, name: str, how: str) -> None:
    answer = served.client.post(DRAW, json={**ASKED, "output_format": name, "response_format": how}).json()
    assert answer["output_format"] == name and answer["size"] == "16x16" and answer["background"] == "opaque"
    row = answer["data"][0]
    if how == "url":
        fetched = served.client.get(row["url"])
        assert fetched.headers["content-type"] == f"image/{name}" and row["url"].endswith(f".{name}")
    content = fetched.content if how == "url" else base64.b64decode(row["b64_json"])
    assert opened(content).format == name.upper() and opened(content).size == (16, 16)


def test_at_full_quality_nothing_is_lost_but_a_jpegs_rounding(served: Any) -> None:
    png, jpeg, webp = (
        decoded(served.draw(seed=5, output_format=name).json()["data"][0]) for name in ("png", "jpeg", "webp")
    )
    assert np.abs(jpeg - png).max() <= 8  # rounding of colours and of coefficients, none of it quantised
    assert np.array_equal(webp, png)


def test_more_compression_is_fewer_bytes_and_more_error() -> None:
    y, x = np.mgrid[:64, :64]
    grain = np.random.default_rng(0).integers(0, 40, (64, 64, 3))  # a picture that also costs a lossless file something
    picture = (np.stack([2 * x + y, 255 - x - 2 * y, 4 * np.abs(x - y)], axis=2) + grain).clip(0, 255).astype(np.uint8)
    for name in ("jpeg", "webp"):
        made = [encode(picture, Format(name, quality)) for quality in (0, 50, 100)]
        errors = [np.abs(np.asarray(opened(one).convert("RGB"), dtype=int) - picture).mean() for one in made]
        assert sorted(map(len, made)) == list(map(len, made)) and sorted(errors, reverse=True) == errors


def test_a_streams_pictures_come_in_that_format_too(served: Any) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    body = {"output_format": "webp", "output_compression": 60, "stream": True, "partial_images": 1}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        events = list(client.images.generate(prompt="sks mug", model="moss-mug", extra_body={"steps": 4}, **body))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    for event in events:
        assert opened(base64.b64decode(event.b64_json)).format == "WEBP"
        assert (event.output_format, event.size) == ("webp", "16x16")
    assert events[1].warnings == []


# Ten pictures


def test_ten_pictures_come_in_one_answer_in_the_order_of_their_seeds(served: Any) -> None:
    answer = served.draw(n=10, seed=40, steps=2).json()
    assert [row["personalq"]["seed"] for row in answer["data"]] == list(range(40, 50))
    assert max(row["personalq"]["batch"] for row in answer["data"]) == 4  # --max-batch
    pipeline = Pipeline(OrtEngine(served.repository / "bundles" / "moss-mug-taq", threads=1))
    for row in (answer["data"][0], answer["data"][9]):
        alone = Picture(row["revised_prompt"], seed=row["personalq"]["seed"])
        *_, last = pipeline.denoise([alone], Settings(steps=2))
        assert np.abs(decoded(row) - pipeline.decode(last.latents[0])).max() <= 1  # kernels round by batch


def test_ten_pictures_wait_their_turn_and_a_full_queue_is_429(repository: Path, serve: Any, wait_until: Any) -> None:
    with serve(repository, queue=12, max_batch=2) as one, ThreadPoolExecutor(1) as pool:
        first = pool.submit(one.draw, n=10, steps=60, size="128x128")
        wait_until(lambda: one.service.drawing.outstanding == 10)
        refused = one.draw(n=10)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error" and "x-should-retry" not in refused.headers
        assert len(first.result().json()["data"]) == 10
        assert one.draw(n=10, steps=1).status_code == 200


def test_more_pictures_than_the_queue_holds_are_refused_for_good(repository: Path, serve: Any) -> None:
    with serve(repository, queue=4) as one:
        refused = one.draw(n=5)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "n: must be at most 4 on this server, got 5"


# What did not fit


def words_that_fit(file: Path, words: list[str], room: int) -> int:
    """How many of these words, one after the other, have at most `room` tokens: by the tokenizers library alone."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts = (
        len(tokenizer.encode(" ".join(words[:n]), add_special_tokens=False).ids) for n in range(1, len(words) + 1)
    )
    return sum(count <= room for count in counts)


def test_a_cut_prompt_is_said_with_the_first_word_that_was_lost(served: Any) -> None:
    asked = "sks mug " + " ".join(f"w{i}" for i in range(80))
    answer = served.draw(asked, steps=1).json()
    words = answer["data"][0]["revised_prompt"].split()  # what was asked for, not what was used
    assert words[-1] == "w79"
    fit = words_that_fit(served.repository / "bundles" / "moss-mug-taq" / "tokenizer.json", words, 75)
    (warning,) = answer["warnings"]
    assert warning.startswith("prompt: only 77 tokens fit; ") and f"from {words[fit]!r} on" in warning
    both = served.draw(asked, negative_prompt=asked, steps=1, n=2).json()["warnings"]
    assert [line.split()[0] for line in both] == ["prompt:", "negative_prompt:"]


def test_marks_are_read_told_or_refused(served: Any) -> None:
    answer = served.draw("a (sks:1.2) mug AND snow <lora:moss-mug:1>", negative_prompt="a [cat|dog]", steps=1).json()
    assert answer["data"][0]["revised_prompt"] == "a (sks:1.2) mug AND snow <lora:moss-mug:1>"
    assert [line.split(":")[0] for line in answer["warnings"]] == ["prompt", "negative_prompt"]
    refused = served.draw("sks mug <lora:moss-mug:0.8>", steps=1)
    assert refused.status_code == 400
    told = "prompt: <lora:moss-mug:0.8> must have strength 1 in all, got 0.8; 'moss-mug' is merged into its bundle at full "
    assert refused.json()["error"]["message"] == told + "strength: write 1, or remove it"


def test_a_prompt_that_was_cut_stays_out_of_the_drawing_process_log(
    served: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert served.draw("sks mug " + "secretword " * 90, steps=1).json()["warnings"]
    assert "secretword" not in capfd.readouterr().err


def test_the_drawing_process_may_warn_of_anything(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finish: Callable[..., Any] = served.service._finish

    async def finish_with(drawing: Any) -> Any:
        made = await finish(drawing)
        return type(made)(made.told, made.content, ("sampler: one thing", "rows: another"))

    monkeypatch.setattr(served.service, "_finish", finish_with)
    warnings = served.draw(n=2, steps=1, quality="hd").json()["warnings"]
    assert warnings == ["quality: has no effect here", "sampler: one thing", "rows: another"]
