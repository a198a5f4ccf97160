"""What goes wrong while serving hits the request it belongs to, with a clear error, and no other."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

httpx2 = pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install 'personalq[dev]'")

ROOT = Path(__file__).parents[3]


def slow_draw(one: Any, steps: int = 150, **body: Any) -> Any:
    return one.draw(steps=steps, size="1024x1024", **body)


@pytest.mark.parametrize("spoil", ["truncated", "replaced", "gone"])
def test_an_engine_file_changed_on_disk_hits_its_own_requests_only(
    repository: Path, serve: Any, spoil: str, wait_until: Any
) -> None:
    with serve(repository) as one:
        assert one.draw(model="rex", steps=1).status_code == 200
        file = repository / "bundles" / "rex-taq" / "unet.ort.onnx"
        content = file.read_bytes()
        if spoil == "gone":
            file.unlink()
        else:
            file.write_bytes(content[:-100] if spoil == "truncated" else b"x" * (len(content) + 1))
        refused = one.draw(model="rex", steps=1)
        assert refused.status_code == 500
        message = refused.json()["error"]["message"]
        assert message.startswith("unet.ort.onnx: ") and message.endswith("export the checkpoint again")
        assert one.draw(model="luna", steps=1).status_code == 200
        file.write_bytes(content)
        assert one.draw(model="rex", steps=1).status_code == 200


def test_a_killed_drawing_process_loses_only_what_it_drew(repository: Path, serve: Any, wait_until: Any) -> None:
    with serve(repository, max_batch=1) as one, ThreadPoolExecutor(4) as pool:
        one.draw(steps=1)
        drawn = pool.submit(slow_draw, one)
        wait_until(lambda: one.service.drawing.outstanding == 1)
        wait_until(lambda: any(job.has_started for job in one.service.drawing._jobs.values()))
        waiting = [pool.submit(one.draw, model=model, steps=1) for model in ("rex", "luna")]
        wait_until(lambda: one.service.drawing.outstanding == 3)
        os.kill(one.service.drawing.pid, signal.SIGKILL)
        lost = drawn.result()
        assert lost.status_code == 503
        assert lost.json()["error"]["message"] == (
            "the drawing process ended while it drew this picture; another one was started, ask again"
        )
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        assert one.draw(steps=1).status_code == 200
        assert "personalq_draw_process_restarts_total 1.0" in one.client.get("/metrics").text


def test_a_full_disk_costs_a_warning_not_a_picture(repository: Path, serve: Any, wait_until: Any) -> None:
    """No file may grow in a drawing process that is started under this limit: compiled engines cannot be kept."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'personalq[openvino]'")
    resource = pytest.importorskip("resource", reason="this system has no resource limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serve(repository, target="openvino") as one:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            os.kill(one.service.drawing.pid, signal.SIGKILL)
            wait_until(lambda: one.service.drawing.restarts == 1 and one.service.is_ready)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        made = one.draw(steps=1)
    assert made.status_code == 200 and made.json()["data"][0]["personalq"]["engine"] == "openvino"
    assert not list((repository / "bundles" / "moss-mug-taq").rglob("*.blob"))


def test_a_repository_edited_while_serving_is_served_as_it_is_now(
    repository: Path, serve: Any, add_bundle: Any, made_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with serve(repository) as one:
        assert one.draw(model="rex", steps=1).status_code == 200
        (repository / "bundles" / "rex-taq").rename(tmp_path / "away")
        gone = one.draw(model="rex", steps=1)
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "no_bundle"
        assert gone.json()["error"]["message"].startswith("rex: must have a bundle, got none")
        add_bundle(repository, made_bundles["split"], "rex", name="rex-again")
        row = one.draw(model="rex", steps=1).json()["data"][0]
        assert row["personalq"]["bundle"] == "rex-again"
        cards = repository / "checkpoints" / "cards.jsonl"
        cards.write_text(cards.read_text().replace("Luna is my white dog.", "Luna is my golden dog with a hat."))
        decision = one.client.post("/v1/checkin", json={"request": "my golden dog with a hat"}).json()
        assert decision["checkpoint"] == "luna"


def test_a_full_queue_is_429_with_retry_after_and_the_others_are_drawn(repository: Path, serve: Any) -> None:
    with serve(repository, queue=3, max_batch=1) as one, ThreadPoolExecutor(16) as pool:
        one.draw(steps=1)
        answers = [future.result() for future in [pool.submit(slow_draw, one, 40) for _ in range(16)]]
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429} and codes.count(200) >= 3
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["message"].startswith("the queue is full (3 pictures); try again in about ")
        assert one.draw(steps=1).status_code == 200


def test_a_request_past_its_deadline_is_504(repository: Path, serve: Any) -> None:
    with serve(repository, seconds=0.5) as one:
        late = slow_draw(one)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline"


@pytest.mark.parametrize("is_streamed", [True, False], ids=["streamed", "plain"])
def test_a_client_that_leaves_frees_its_slot(repository: Path, serve: Any, wait_until: Any, is_streamed: bool) -> None:
    with serve(repository, max_batch=1) as one:
        one.draw(steps=1)
        body = {"prompt": "sks mug", "model": "moss-mug", "steps": 150, "size": "1024x1024", "stream": is_streamed}
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{one.url}/v1/images/generations", json={**body, "partial_images": 0}, timeout=0.5)
        wait_until(lambda: one.service.drawing.outstanding == 0, 5)
        begun = time.monotonic()
        assert one.draw(steps=1).status_code == 200
        assert time.monotonic() - begun < 10


def test_sigterm_answers_what_was_begun_and_takes_nothing_new(repository: Path, wait_until: Any) -> None:
    code = "import sys, cli; sys.argv = ['personalq', *sys.argv[1:]]; cli.main()"
    port = "18931"
    command = [sys.executable, "-c", code, "--repo", str(repository), "serve", "--port", port, "--budget-mb", "500"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{port}"

            def is_up() -> bool:
                try:
                    return bool(httpx2.get(f"{url}/readyz").status_code == 200)
                except httpx2.HTTPError:
                    return False

            wait_until(is_up, 60)
            answers: list[Any] = []
            body = {"prompt": "sks mug", "model": "moss-mug", "steps": 60, "size": "128x128"}

            def ask() -> None:
                answers.append(httpx2.post(f"{url}/v1/images/generations", json=body, timeout=120))

            thread = threading.Thread(target=ask)
            thread.start()
            wait_until(lambda: "personalq_queue_pictures 1.0" in httpx2.get(f"{url}/metrics").text)
            process.send_signal(signal.SIGTERM)
            thread.join()
            assert answers[0].status_code == 200
            with pytest.raises(httpx2.HTTPError):
                httpx2.get(f"{url}/healthz")
            assert process.wait(timeout=60) == 0
            assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
        finally:
            process.kill()
