"""`personalq serve --on ray` on a cluster of two nodes on this machine: the interface of one machine, drawn by replicas."""

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cli import cli
from runtime.drawing.pipeline import Picture, Pipeline, Settings
from runtime.engines.engine import open_engine
from tests.runtime.serving.conftest import _wait_until as wait_until
from tests.runtime.serving.conftest import make_repository

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


class OnRay:
    """The command in a process of its own: Ray stays out of this one."""

    def __init__(self, repository: Path, address: str) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.repository = repository
        options = ["--on", "ray", "--address", address, "--threads", "1", "--budget-mb", "100"]
        code = [sys.executable, "-c", "from cli import main; main()", "--repo", str(repository), "serve"]
        command = [*code, *options, "--port", self.url.rpartition(":")[2]]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.client = httpx2.Client(base_url=self.url, timeout=120)

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.process.stderr.read()  # type: ignore[union-attr]
        with contextlib.suppress(httpx2.HTTPError):
            return bool(self.client.get("/readyz").status_code == 200)
        return False

    def draw(self, model: str, **body: Any) -> Any:
        told = {"prompt": "sks", "model": model, "seed": 3, **body}
        return self.client.post("/v1/images/generations", json=told)

    def residency(self) -> Any:
        return self.client.get("/v1/residency").json()

    def close(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=120)


@pytest.fixture(scope="module")
def on_ray(made_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'personalq[ray]'")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "memory": 1 << 30, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    cluster.add_node(**small)
    server = OnRay(make_repository(tmp_path_factory.mktemp("on_ray") / "repo", made_bundles), cluster.address)
    try:
        wait_until(server.is_up, 180)
        server.draw("rex", steps=1, size="16x16")  # replicas report once something was routed
        wait_until(lambda: server.residency()["budget_bytes"] == 200e6, 60)  # both have
        yield server
    finally:
        server.close()
        cluster.shutdown()


def opened(row: dict[str, Any]) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(row["b64_json"])))


def pixels(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(opened(row))


def test_the_official_client_is_answered_as_by_one_machine(on_ray: OnRay) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    with openai.OpenAI(base_url=f"{on_ray.url}/v1", api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["luna", "moss-mug", "rex"]
        made = client.images.generate(prompt="my green mug with moss", n=2, size="16x16", response_format="b64_json")
        assert made.data is not None and len(made.data) == 2 and made.data[0].revised_prompt
        stream = client.images.generate(prompt="sks mug", model="moss-mug", stream=True, partial_images=1)
        assert [event.type for event in stream] == ["image_generation.partial_image", "image_generation.completed"]
        with pytest.raises(openai.ConflictError) as error:
            client.images.generate(prompt="my dog")
        assert error.value.body["question"] == "Which dog do you mean?"
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="x", model="none")
        with pytest.raises(openai.BadRequestError, match="sampler"):
            client.images.generate(prompt="x", model="rex", extra_body={"sampler": "none"})


def test_pictures_are_those_of_the_pipeline(on_ray: OnRay) -> None:
    row = on_ray.draw("rex", prompt="sks dog", steps=2, size="16x16").json()["data"][0]
    pipeline = Pipeline(open_engine("onnxruntime", on_ray.repository / "bundles" / "rex-taq", 1))
    *_, last = pipeline.denoise([Picture(row["revised_prompt"], seed=3)], Settings(2, None, 16, 16))
    wanted = np.asarray(Image.open(io.BytesIO(png(pipeline, last))))
    assert np.array_equal(pixels(row), wanted)


def png(pipeline: Pipeline, step: Any) -> bytes:
    from runtime.drawing.image import png_bytes

    return png_bytes(pipeline.decode(step.latents[0]))


def test_the_page_its_url_pictures_and_the_catalogue_are_there(on_ray: OnRay) -> None:
    assert "PersonalQ" in on_ray.client.get("/").text and on_ray.client.get("/page/page.js").status_code in (200, 404)
    url = on_ray.draw("rex", response_format="url").json()["data"][0]["url"]
    assert on_ray.client.get(url).headers["content-type"] == "image/png"
    assert on_ray.client.post("/v1/checkin", json={"request": "my mug"}).json()["checkpoint"] == "moss-mug"
    assert "personalq_images_total" in on_ray.client.get("/metrics").text


def test_what_clients_send_is_answered_as_by_one_machine(on_ray: OnRay) -> None:
    answer = on_ray.draw("rex", n=10, steps=1, size="16x16", output_format="webp", quality="hd", user=None).json()
    assert [row["personalq"]["seed"] for row in answer["data"]] == list(range(3, 13))
    assert all(opened(row).format == "WEBP" for row in answer["data"])
    assert answer["warnings"] == ["quality: has no effect here"] and answer["size"] == "16x16"
    head = on_ray.client.head(on_ray.draw("rex", response_format="url", steps=1).json()["data"][0]["url"])
    assert (head.status_code, head.headers["content-type"], head.content) == (200, "image/png", b"")
    assert on_ray.client.post("/v1/images/generations/", json={"prompt": "x", "model": "none"}).status_code == 404
    for method, path, status in (("GET", "/nothing", 404), ("DELETE", "/v1/models", 405)):
        refused = on_ray.client.request(method, path)
        assert refused.status_code == status and refused.json()["error"]["type"] == "invalid_request_error"
    large = on_ray.client.post("/v1/images/edits", content=b"x" * 12_000_000)
    assert large.status_code == 400 and large.json()["error"]["code"] == "not_supported"


def test_requests_go_to_the_replica_that_holds_the_engine(on_ray: OnRay) -> None:
    for _ in range(4):
        for model in ("moss-mug", "rex", "luna"):
            assert on_ray.draw(model).status_code == 200
    # Replicas report once a second.
    wait_until(lambda: len(on_ray.residency()["engines"]) >= 3 and on_ray.residency()["counts"]["hits"] >= 9)
    found = on_ray.residency()
    assert sorted(row["checkpoint"] for row in found["engines"]) == ["luna", "moss-mug", "rex"]  # none of them twice
    assert len({row["replica"] for row in found["engines"]}) == 2
    assert found["counts"]["misses"] + found["counts"]["prefetched"] == 3


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_its_slot(on_ray: OnRay, is_streamed: bool) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        body = {"prompt": "sks", "model": "rex", "steps": 150, "size": "1024x1024", "stream": is_streamed}
        httpx2.post(f"{on_ray.url}/v1/images/generations", json=body, timeout=1)
    wait_until(lambda: on_ray.residency()["queue"] == 0, 10)
    assert on_ray.draw("rex", steps=1).status_code == 200


def test_a_lost_replica_costs_only_what_it_drew(on_ray: OnRay) -> None:
    body = {"prompt": "sks", "model": "rex", "steps": 150, "size": "512x512", "stream": True, "progress": True}
    with on_ray.client.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = answer.iter_lines()
        assert any('"event": "started"' in line for line in lines)
        for process in drawing_replicas():
            os.kill(process, signal.SIGKILL)
        assert any('"code": "worker"' in line for line in lines)
    assert on_ray.draw("rex", steps=1).status_code == 200
    assert on_ray.residency()["restarts"] >= 1


def drawing_replicas() -> list[int]:
    """Ray writes the deployment's name into the title of its processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:personalq:draw"):
                found.append(int(folder.name))
    return found


def test_sigterm_answers_what_was_begun_and_ends_with_zero(on_ray: OnRay) -> None:
    answers: list[Any] = []
    begun = threading.Thread(target=lambda: answers.append(on_ray.draw("luna", steps=60, size="128x128")))
    begun.start()
    wait_until(lambda: on_ray.residency()["queue"] == 1)
    on_ray.process.send_signal(signal.SIGTERM)
    begun.join(timeout=60)
    assert answers[0].status_code == 200
    assert on_ray.process.wait(timeout=120) == 0


def test_options_of_a_cluster_are_refused_without_one(made_bundles: dict[str, Path], tmp_path: Path) -> None:
    root = make_repository(tmp_path / "repo", made_bundles)
    ran = CliRunner().invoke(cli, ["--repo", str(root), "serve", "--replicas", "3"])
    assert ran.exit_code == 2 and "--replicas goes with --on ray" in ran.stderr
    ran = CliRunner().invoke(cli, ["--repo", str(root), "serve", "--on", "ray", "--address", "nonsense"])
    assert ran.exit_code == 1 and ran.stderr.startswith("personalq: --address nonsense: must be a running Ray cluster")
