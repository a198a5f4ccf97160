"""The main job on the shipped gallery: a request in words becomes a compressed, exported, verified picture."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cli import cli
from gallery.ship import shipped

GALLERY = Path(__file__).parents[1] / "gallery" / "repository"

DEMO_KEYS = {
    "request",
    "checkpoint",
    "prompt",
    "image",
    "reference_image",
    "bundle",
    "psnr_db",
    "bytes",
    "bytes_fp16",
    "seconds",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the gallery, so that what the tests export is theirs."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    root = tmp_path_factory.mktemp("gallery") / "repository"
    for part in ("bases", "checkpoints"):
        shutil.copytree(GALLERY / part, root / part)
    for bundle, _ in shipped():
        shutil.copytree(bundle, root / "bundles" / bundle.name, ignore=shutil.ignore_patterns("engines"))
    return root


def run(repository: Path, *arguments: str) -> dict:
    """One command with --json; its one object."""
    result = CliRunner().invoke(cli, ["--repo", str(repository), *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def demo(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(repository, "demo", "--out", str(tmp_path_factory.mktemp("demo")))


def test_demo_finds_the_right_dog_and_keeps_its_promises(demo):
    assert demo.keys() >= DEMO_KEYS
    assert demo["checkpoint"] == "biscuit-the-dog"
    assert "sks" in demo["prompt"]
    assert demo["psnr_db"] >= 28
    assert demo["bytes"] <= 0.6 * demo["bytes_fp16"]
    assert demo["bytes"] <= 0.29 * demo["bytes_fp32"]


def test_demo_pictures_show_the_concept_in_the_asked_scene(demo):
    from gallery.concepts import reference_images
    from gallery.judge import Judge

    with Image.open(demo["image"]) as image:
        picture = np.asarray(image)[None]
    judge = Judge.load()
    assert judge.facets(picture)["object"] == ["dog"]
    assert judge.facets(picture)["background"] == ["beach"]
    own, other = (
        judge.concept_score(picture, reference_images(name, 16, 5))[0] for name in ("biscuit-the-dog", "domino-the-dog")
    )
    assert own > other
    with Image.open(Path(demo["image"]).with_name("side_by_side.png")) as wide:
        assert wide.width > 2 * 64


def test_a_second_checkpoint_goes_from_calibrate_to_a_picture(repository, demo, tmp_path):
    spec = run(repository, "calibrate", "moss-mug")
    assert spec["policy"] == "taq"
    assert spec["kept_tokens"][0].startswith("<moss-mug>")
    bundle = run(repository, "export", "moss-mug", "--form", "merged")
    assert Path(bundle["bundle"], "manifest.json").is_file()
    report = run(repository, "verify", "moss-mug")
    assert report["passed"]
    values = {check["name"]: check["value"] for check in report["checks"]}
    assert values["conv layers on integer kernels"] > 40
    assert values["linear layers on integer kernels"] > 80
    picture = run(
        repository, "generate", "my green mug with brown stripes in the forest", "-o", str(tmp_path / "mug.png")
    )
    assert picture["checkpoint"] == "moss-mug"
    assert "<moss-mug>" in picture["prompt"]
    with Image.open(tmp_path / "mug.png") as image:
        assert image.size == (64, 64)


def test_drawing_a_picture_leaves_torch_out_of_the_process(repository, demo, tmp_path):
    code = """
import sys
from pathlib import Path
from personalq.repository import Repository
from runtime.drawing.generate import Order, generate

repository = Repository.open(Path(sys.argv[1]))
generate(repository, "a photo of sks dog on the beach", Path(sys.argv[2]), Order(checkpoint="biscuit-the-dog"))
found = {"torch", "diffusers", "transformers", "onnx"} & set(sys.modules)
sys.exit(f"imported {found}" if found else 0)
"""
    arguments = [sys.executable, "-c", code, str(repository), str(tmp_path / "dog.png")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=GALLERY.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dog.png").is_file()
