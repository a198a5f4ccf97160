"""The base's engine that the gallery ships is today's, whole, and draws without torch what was never exported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.manifest import EXPORTER_VERSION
from gallery.record import BASE, REPOSITORY
from gallery.ship import shipped
from personalq.bundle import check_files
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from runtime.store import Store

NO_TORCH = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnx_ir"):
    sys.modules[name] = None
from cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    root = tmp_path / "gallery"
    skipped = shutil.ignore_patterns("specs", "families", "shared", "index", "engines")
    shutil.copytree(REPOSITORY, root, ignore=skipped)
    for folder in (root / "bundles").iterdir():
        if folder.name not in {one.name for one, _ in shipped()}:
            shutil.rmtree(folder)
    return Repository.open(root)


def test_one_engine_is_shipped_of_todays_exporter_and_base() -> None:
    ((folder, manifest),) = shipped()
    assert (manifest.kind, manifest.exporter_version) == ("base", EXPORTER_VERSION)
    assert manifest.key_parts["weights"] == weights_sha256(BASE, None)
    assert check_files(folder, manifest) == []


def test_it_serves_every_checkpoint_that_is_an_adapter(repository: Repository) -> None:
    from bench._forms import adapters_of

    store, (_, manifest) = Store(repository.root), shipped()[0]
    assert store.on_base(BASE.name).bundle.name == manifest.key
    assert len(adapters_of(repository)) == 12


@pytest.mark.parametrize(
    "request_",
    [
        ["my spotted dog on the beach", "--checkpoint", "domino-the-dog", "--adapter", "pastel-outline:0.5"],
        ["my spotted dog on the beach <lora:domino-the-dog:1> <lora:pastel-outline:0.5>"],
    ],
    ids=["by options", "by tags"],
)
def test_a_request_is_drawn_at_once_without_torch(repository: Repository, tmp_path: Path, request_: list[str]) -> None:
    """As after `pip install 'personalq[cpu]'`: nothing is calibrated or exported first."""
    out = tmp_path / "dog.png"
    command = [sys.executable, "-c", NO_TORCH, "--repo", str(repository.root), "generate", *request_]
    command += ["-o", str(out), "--steps", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["form"] == "attached"
    strengths = {one["id"]: one["strength"] for one in told["adapters"]}
    assert strengths == {"domino-the-dog": 1.0, "pastel-outline": 0.5}
    assert out.read_bytes().startswith(b"\x89PNG")
