"""Stable Diffusion 1.x, 2.x and XL: traced, exported and run without torch, each equals diffusers; others are refused."""

import json
import shutil
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.export import export_checkpoint
from exporters.family import open_family
from exporters.plain import unquantised_spec
from personalq.errors import RepositoryError, SpecError
from personalq.identity import read_configs, weights_sha256
from personalq.repository import Repository
from runtime.engine import OrtEngine
from runtime.pipeline import Pipeline, start_noise

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
from tests.exporters import architectures  # noqa: E402  (needs torch)

NAMES = ("sd1", "sd2", "sdxl")
# FP32 on both sides, sums in another order.
TOLERANCE = 1e-4
PROMPT = "a red mug on the beach! sks"


@dataclass
class Made:
    """One architecture: its pipeline as diffusers runs it, its repository, and the bundle of checkpoint 'rex'."""

    name: str
    root: Path

    @cached_property
    def pipe(self) -> Any:
        pipe = getattr(architectures, self.name)()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def repository(self) -> Repository:
        """bases/tiny and two checkpoints of it: 'rex' is the base's own UNet, 'max' another one."""
        self.pipe.save_pretrained(self.root / "bases" / "tiny")
        for name, seed in (("rex", 0), ("max", 1)):
            folder = self.root / "checkpoints" / name
            unet = self.pipe.unet if seed == 0 else getattr(architectures, self.name)(seed).unet
            unet.save_pretrained(folder / "unet")
            card = {"id": name, "name": name, "kind": "dreambooth", "base": "tiny", "trigger": ["sks"]}
            (folder / "card.json").write_text(json.dumps(card))
        return Repository.open(self.root)

    def export(self, checkpoint: str = "rex", repository: Repository | None = None) -> Path:
        repository = repository or self.repository
        base = repository.base_dir(repository.card(checkpoint))
        family = open_family(repository.root / "families", base)
        sha256 = weights_sha256(base, repository.checkpoint_dir(checkpoint))
        spec = unquantised_spec(family, checkpoint, sha256, "fp32")
        path = spec.write(repository.root / "specs" / checkpoint / "fp32.json")
        return export_checkpoint(repository, checkpoint, path).bundle

    @cached_property
    def bundle(self) -> Path:
        return self.export()

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(OrtEngine(self.bundle, threads=1))


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def encode(made: Made, prompt: str) -> tuple[Any, Any]:
    """(states, pooled or None) as the diffusers pipeline encodes a prompt."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if made.name == "sdxl":
            states, _, pooled, _ = made.pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
            return states, pooled
        return made.pipe.encode_prompt(prompt, "cpu", 1, False)[0], None


def test_text_embeddings_equal_diffusers(made: Made) -> None:
    states, pooled = encode(made, PROMPT)
    ours = made.pipeline.embed([PROMPT])
    assert np.abs(ours.states - states.numpy()).max() <= TOLERANCE
    if pooled is None:
        assert ours.pooled is None
    else:
        assert np.abs(ours.pooled - pooled.numpy()).max() <= TOLERANCE


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 8, 12), (2, 16, 4)])
def test_the_unet_equals_torch_at_any_batch_height_and_width(made: Made, batch: int, height: int, width: int) -> None:
    sample = np.random.default_rng(1).standard_normal((batch, 4, height, width)).astype(np.float32)
    rows = made.pipeline.rows(PROMPT).conditioning
    tiled = {name: np.repeat(value, batch, axis=0) for name, value in rows.items()}
    ours = made.pipeline.engine.denoiser(tiled, height, width)(sample, 321.0)
    states, pooled = encode(made, PROMPT)
    added = None
    if pooled is not None:
        size = [height * 2, width * 2]
        added = {
            "text_embeds": pooled.repeat(batch, 1),
            "time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(batch, 1),
        }
    with torch.no_grad():
        theirs = made.pipe.unet(
            torch.from_numpy(sample), 321.0, states.repeat(batch, 1, 1), added_cond_kwargs=added
        ).sample.numpy()
    assert np.abs(ours - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("negative", [None, "a blue forest"])
def test_pictures_equal_diffusers(made: Made, negative: str | None) -> None:
    noise = start_noise(3, (4, 8, 12))
    ours = made.pipeline.image(PROMPT, negative_prompt=negative or "", steps=3, guidance=4.0, noise=noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = made.pipe(
            PROMPT,
            negative_prompt=negative,
            num_inference_steps=3,
            guidance_scale=4.0,
            height=16,
            width=24,
            latents=torch.from_numpy(noise)[None],
            output_type="np",
        ).images[0]
    assert np.abs(ours / 255 - theirs).max() <= 1.01 / 255


@pytest.mark.parametrize("made", ["sd1"], indirect=True)
def test_another_checkpoint_of_the_stored_family_is_byte_identical_to_a_fresh_trace(made: Made, tmp_path: Path) -> None:
    """'max' is exported through the family that 'rex' traced, then again where no family is stored."""
    assert made.bundle
    through_stored = made.export("max")
    fresh = Repository.open(tmp_path, create=True)
    for room in ("bases", "checkpoints"):
        shutil.copytree(made.repository.root / room, tmp_path / room, dirs_exist_ok=True)
    again = made.export("max", fresh)
    names = sorted(file.name for file in through_stored.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    assert [n for n in names if (through_stored / n).read_bytes() != (again / n).read_bytes()] == []


@pytest.mark.parametrize("made", ["sd1"], indirect=True)
def test_an_unknown_reference_is_refused(made: Made) -> None:
    family = open_family(made.repository.root / "families", made.repository.root / "bases" / "tiny")
    with pytest.raises(
        SpecError, match="spec: must be one of fp32, fp16 or a file, got 'fp8'; calibrate the checkpoint"
    ):
        unquantised_spec(family, "rex", "0", "fp8")


REFUSALS = {
    "inpainting": ({"in_channels": 9}, "unet in_channels must be 4, got 9; inpainting, depth and upscaling UNets"),
    "lcm": ({"time_cond_proj_dim": 256}, "unet time_cond_proj_dim must be None, got 256; guidance-distilled UNets"),
    "classes": ({"class_embed_type": "timestep"}, "unet class_embed_type must be None, got 'timestep'; only Stable"),
    "image": ({"addition_embed_type": "image"}, "addition_embed_type must be None or text_time, got 'image'"),
    "blocks": (
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"]},
        "unet blocks must be of DownBlock2D, CrossAttnDownBlock2D, UpBlock2D, CrossAttnUpBlock2D, got 'Simple",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_would_be_silently_wrong_is_refused(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RepositoryError, match=message):
        read_configs(edited(tiny_base, tmp_path, "unet", changes))


def test_a_vae_with_latent_statistics_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="vae latents_mean must be absent, got values"):
        read_configs(edited(tiny_base, tmp_path, "vae", {"latents_mean": [0.0] * 4}))


def test_an_sdxl_refiner_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    base = edited(tiny_base, tmp_path, "unet", {**added, "projection_class_embeddings_input_dim": 20 + 5 * 8})
    (base / "text_encoder_2").mkdir()
    (base / "text_encoder_2" / "config.json").write_text('{"projection_dim": 20}')
    wanted = r"must be 68 \(pooled text and six time ids\), got 60; SDXL refiners are not supported"
    with pytest.raises(RepositoryError, match=wanted):
        read_configs(base)


def edited(base: Path, folder: Path, component: str, changes: dict[str, Any]) -> Path:
    """Copies of a base's configs, one of them changed."""
    for name in ("unet", "text_encoder", "vae"):
        config = json.loads((base / name / "config.json").read_text())
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config | (changes if name == component else {})))
    return folder
