"""The HTTP interface: pictures as OpenAI's API has them, Check-in's question as 409, limits, keys, metrics."""

import base64
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.drawing.pipeline import Pipeline
from runtime.engines.ort import OrtEngine


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def decoded(row: dict[str, Any]) -> np.ndarray:
    return pixels(base64.b64decode(row["b64_json"]))


def test_a_named_model_is_drawn_as_the_pipeline_draws_it(served: Any) -> None:
    answer = served.draw("a mug in the snow", seed=3, steps=2).json()
    (row,) = answer["data"]
    assert row["revised_prompt"] == answer["personalq"]["prompt"] == "a photo of sks mug in the snow"
    assert row["personalq"]["engine"] == "onnxruntime" and row["personalq"]["seed"] == 3
    pipeline = Pipeline(OrtEngine(served.repository / "bundles" / "moss-mug-taq", threads=1))
    assert (decoded(row) == pipeline.image("a photo of sks mug in the snow", seed=3, steps=2)).all()


def test_without_a_model_checkin_picks_it_and_says_why(served: Any) -> None:
    answer = served.draw("my green mug with moss on the beach", model="auto").json()
    assert answer["personalq"]["checkpoint"] == "moss-mug"
    assert answer["personalq"]["candidates"][0]["id"] == "moss-mug"
    assert any("moss" in reason for reason in answer["personalq"]["candidates"][0]["reasons"])


def test_an_open_question_is_409_and_its_answer_draws(served: Any) -> None:
    asked = served.draw("my dog on the beach", model="auto")
    error = asked.json()["error"]
    assert asked.status_code == 409 and error["code"] == "clarify" and asked.headers["x-should-retry"] == "false"
    assert error["message"] == error["question"] == "Which dog do you mean?"
    assert [option.split(":")[0] for option in error["options"]] == ["luna", "rex"]
    answered = served.draw("my dog on the beach", model="auto", answers=[error["options"][1]])
    assert answered.json()["personalq"]["checkpoint"] == "rex"


def test_while_a_question_is_open_the_likely_engines_are_loaded(served: Any, wait_until: Any) -> None:
    served.draw("my dog in the snow", model="auto")
    wait_until(
        lambda: {"rex", "luna"} <= {e["checkpoint"] for e in served.client.get("/v1/residency").json()["engines"]}
    )


def test_nothing_that_fits_is_404(served: Any) -> None:
    refused = served.draw("a cathedral at night", model="auto")
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "no_checkpoint"


def test_n_pictures_have_seeds_in_a_row_and_share_a_batch(served: Any) -> None:
    rows = served.draw(n=3, seed=7, steps=2).json()["data"]
    assert [row["personalq"]["seed"] for row in rows] == [7, 8, 9]
    assert max(row["personalq"]["batch"] for row in rows) > 1
    alone = served.draw(seed=8, steps=2).json()["data"][0]
    assert np.abs(decoded(rows[1]).astype(int) - decoded(alone)).max() <= 1


def test_a_url_can_be_fetched(served: Any) -> None:
    row = served.draw(response_format="url", steps=1).json()["data"][0]
    assert "b64_json" not in row
    fetched = served.client.get(row["url"])
    assert fetched.headers["content-type"] == "image/png" and pixels(fetched.content).shape == (16, 16, 3)
    gone = served.client.get("/v1/images/files/nothing.png")
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "gone"


def test_the_reference_bundle_can_be_drawn_to_compare_with(served: Any) -> None:
    best, reference = (served.draw(seed=1, variant=name).json()["data"][0] for name in ("best", "reference"))
    assert best["personalq"]["bundle"] == "moss-mug-taq" and reference["personalq"]["bundle"] == "moss-mug-fp32"
    none = served.draw(model="rex", variant="reference")
    assert none.status_code == 404 and none.json()["error"]["message"].startswith(
        "rex: must have an unquantised bundle"
    )


def test_a_stream_has_progress_previews_and_the_picture(served: Any) -> None:
    body = {"prompt": "sks mug", "model": "moss-mug", "stream": True, "partial_images": 2, "progress": True, "seed": 5}
    events = []
    with served.client.stream("POST", "/v1/images/generations", json={**body, "steps": 6}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
    kinds = [event["type"].partition(".")[2] for event in events]
    assert kinds.count("partial_image") == 2 and kinds[-1] == "completed"
    steps = [event["step"] for event in events if event.get("event") == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (decoded(events[-1]) == decoded(served.draw(seed=5, steps=6).json()["data"][0])).all()


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"model": "mos-mug"}, 404, "model_not_found", "nearest: moss-mug"),
        ({"size": "17x16"}, 400, "invalid", "width: must be a multiple of 2, got 17; nearest: 16 or 18"),
        ({"size": "big"}, 400, "size", "size: must be 'auto' or WIDTHxHEIGHT, got 'big'"),
        ({"size": "9000x9000"}, 400, "limit", "size: must be at most 1048576 pixels, got 81000000"),
        ({"n": 11}, 400, "limit", "n: must be at most 10 on this server, got 11"),
        ({"steps": 151}, 400, "limit", "steps: must be at most 150 on this server, got 151"),
        ({"prompt": "x" * 2001}, 400, "limit", "prompt: must be at most 2000 characters, got 2001; shorten it"),
        ({"prompt": ""}, 400, "invalid_request", "prompt: String should have at least 1 character"),
        (
            {"colour": "red"},
            400,
            "unknown_parameter",
            "colour: must be a field of this request, got a name that is not",
        ),
        ({"output_compression": 50}, 400, "output_compression", "output_compression: must be 100 for png, got 50"),
        ({"output_format": "gif"}, 400, "invalid_request", "output_format: Input should be 'png', 'jpeg' or 'webp'"),
        ({"prompt": None}, 400, "missing_required_parameter", "prompt: must be given; add it"),
        ({"sampler": "plms"}, 400, "sampler", "sampler: must be one of ddim, "),
        ({"prompt": "snow " * 74 + "sks mug"}, 400, "PromptError", "prompt: its trigger 'sks' must be within"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, dict) else "-".join(value),
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(
    served: Any, body: dict[str, Any], status: int, code: str, message: str
) -> None:
    refused = served.draw(**body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (status, code) and message in error["message"]


def test_models_are_listed_in_openais_shape(served: Any) -> None:
    listed = served.client.get("/v1/models").json()
    assert listed["object"] == "list" and [row["id"] for row in listed["data"]] == ["luna", "moss-mug", "rex"]
    one = served.client.get("/v1/models/moss-mug").json()
    assert one["object"] == "model" and one["personalq"]["class_noun"] == "mug"
    assert one["personalq"]["is_drawable"] and one["personalq"]["has_reference"]
    assert served.client.get("/v1/models/none").status_code == 404
    assert served.client.get("/v1/models/rex/sheet").json()["error"]["code"] == "no_picture"


def test_checkin_answers_as_the_command_line_does(served: Any) -> None:
    decision = served.client.post("/v1/checkin", json={"request": "my green mug with moss"}).json()
    assert decision["decision"] == "select" and decision["checkpoint"] == "moss-mug"
    assert served.client.post("/v1/checkin", json={"request": " "}).status_code == 400


def test_bodies_over_the_limit_are_refused_before_they_are_read(served: Any) -> None:
    for content in (b"x" * 100_000, iter([b"x" * 50_000, b"x" * 50_000])):
        refused = served.client.post("/v1/checkin", content=content)
        assert refused.status_code == 413 and refused.json()["error"]["code"] == "body_too_large"


def test_health_metrics_and_documentation_are_there(served: Any) -> None:
    served.draw(steps=1)
    assert served.client.get("/healthz").text == "ok\n" and served.client.get("/readyz").text == "ready\n"
    text = served.client.get("/metrics").text
    assert 'personalq_images_total{checkpoint="moss-mug"}' in text
    assert 'personalq_requests_total{path="/v1/images/generations",status="200"}' in text
    assert "personalq_engine_lookups_total" in text and "personalq_engine_load_seconds_bucket" in text
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/v1/models", "/v1/checkin", "/metrics"} <= paths.keys()


def test_every_answer_keeps_browsers_to_this_server(served: Any) -> None:
    headers = served.client.get("/").headers
    assert (
        headers["content-security-policy"].startswith("default-src 'self'")
        and headers["x-content-type-options"] == "nosniff"
    )
    for name in ("page.css", "page.js", "api.js", "draw.js", "repository.js", "engines.js", "docs.js", "elements.js"):
        part = served.client.get(f"/page/{name}")
        assert part.status_code == 200 and not re.search(r"https?://|innerHTML|eval\(", part.text)
    for path in ("/", "/docs"):
        text = served.client.get(path).text
        assert not re.search(r"(src|href)=.(https?:)?//|style=|<script>|onclick", text)
    assert served.client.get("/page/..%2fapp.py").status_code == 404


def test_the_log_has_one_line_a_request_and_no_prompt(
    served: Any, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "personalq.access"):
        served.draw("a secret mug", steps=1)
        wait_until(lambda: any("generations" in message for message in caplog.messages))
    lines = [json.loads(one.getMessage()) for one in caplog.records if one.name == "personalq.access"]
    (line,) = [line for line in lines if line["path"] == "/v1/images/generations"]
    assert line["path"] == "/v1/images/generations" and line["status"] == 200 and line["checkpoint"] == "moss-mug"
    assert "secret" not in caplog.text


def test_keys_and_prompts_in_the_log_are_as_asked(
    repository: Path, serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from runtime.serving.options import read_keys

    (tmp_path / "keys").write_text("# ours\n0123456789abcdef0123\n")
    options = {"key_digests": read_keys(tmp_path / "keys"), "key": "0123456789abcdef0123", "logs_prompts": True}
    with serve(repository, **options) as one, caplog.at_level(logging.INFO, "personalq.access"):
        assert one.draw("a told mug", steps=1).status_code == 200
        for key in ("", "Bearer wrong", "Bearer 0123456789abcdef012"):
            refused = one.client.get("/v1/models", headers={"Authorization": key})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert one.client.get("/healthz", headers={"Authorization": ""}).status_code == 200
    assert "a told mug" in caplog.text and "0123456789abcdef0123" not in caplog.text


def test_the_official_client_works_unchanged(served: Any) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        assert [model.id for model in client.models.list()] == ["luna", "moss-mug", "rex"]
        made = client.images.generate(prompt="my green mug with moss", n=2, size="16x16", response_format="b64_json")
        assert made.data is not None and len(made.data) == 2 and made.data[0].revised_prompt
        assert pixels(base64.b64decode(made.data[0].b64_json or "")).shape == (16, 16, 3)
        stream = client.images.generate(prompt="sks mug", model="moss-mug", stream=True, partial_images=1)
        events = list(stream)
        assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
        with pytest.raises(openai.ConflictError) as error:
            client.images.generate(prompt="my dog")
        assert error.value.body["question"] == "Which dog do you mean?"  # type: ignore[index]
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="x", model="none")
