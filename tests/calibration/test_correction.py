"""A correction is the best low-rank part for its weighted error: the closed form, and a checkpoint's own inputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.correction import Errors, correction, correction_of, stands_for
from calibration.gather import gather
from calibration.model.pipeline import load_pipeline, quantisable_layers
from calibration.rounding.gptq import columns
from personalq.errors import SpecError
from personalq.spec import read_spec
from tests.calibration.test_base import repository  # noqa: F401 (a fixture)

FEW = {"samples": 2, "steps": 5}


def best(error: np.ndarray, hessian: np.ndarray, rank: int) -> float:
    """The least trace((E - L) H (E - L)^T) of any L of this rank: the squares of E H^(1/2)'s other singular values."""
    values, vectors = np.linalg.eigh(hessian)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return float((np.linalg.svd(error @ root, compute_uv=False)[rank:] ** 2).sum())


def left(error: np.ndarray, change: np.ndarray, hessian: np.ndarray) -> float:
    rest = error - change.reshape(error.shape)
    return float((rest @ hessian * rest).sum())


@pytest.mark.parametrize("shape", [(6, 12), (20, 7), (8, 4, 3, 3), (9, 9)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_nothing_of_this_rank_is_nearer(shape: tuple[int, ...], rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(shape, generator=generator)
    flat = error.reshape(len(error), -1)
    x = torch.randn(50, flat.shape[1], generator=generator) * torch.linspace(0.1, 3, flat.shape[1])
    hessian = x.T @ x
    total = flat @ hessian @ flat.T if len(error) <= flat.shape[1] else hessian
    branch = correction_of(error, total, rank)
    assert branch.rank == rank
    assert branch.is_conv == (len(shape) == 4)
    exact, weight = flat.double().numpy(), hessian.double().numpy()
    assert left(exact, branch.change(), weight) == pytest.approx(best(exact, weight, rank), rel=2e-3)  # float16 halves


def test_a_small_error_survives_half_precision() -> None:
    error = (
        torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * 1e-4
    )  # an eight-bit step of a small weight
    branch = correction_of(error, error @ error.T, 32)
    assert np.abs(branch.change() - error.numpy()).max() < 2e-3 * float(error.abs().max())


def test_errors_are_summed_over_what_a_layer_sees() -> None:
    for module, x in (
        (torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8)),
        (torch.nn.Linear(12, 5), torch.randn(2, 16, 12)),
        (torch.nn.Linear(3, 9), torch.randn(2, 16, 3)),
    ):
        one = Errors(module, torch.randn_like(module.weight))
        n_pixels = 16
        weights = torch.rand(2, 1, 4, 4)
        one.add(x, weights)
        matrix = columns(module, x).reshape(2 * n_pixels, -1)
        hessian = (matrix * weights.flatten(1).reshape(-1, 1)).T @ matrix
        flat = one.error.reshape(len(one.error), -1)
        expected = flat @ hessian @ flat.T if one.by_output else hessian
        torch.testing.assert_close(one.total, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def base_spec(repository) -> Path:  # noqa: F811
    return calibrate(repository, "tiny", CalibrateOptions(bits="w4a8", policy="gptq", over=("pot",), **FEW)).spec_path


def test_a_checkpoints_correction_lowers_the_error_of_what_it_draws(repository, base_spec: Path) -> None:  # noqa: F811
    file = read_spec(base_spec)
    made = correction(repository, base_spec, "rex", 4, CalibrateOptions(**FEW))
    assert set(made) == {name for name, layer in file.spec.layers.items() if layer.weight != "float"}
    assert {branch.rank for branch in made.values()} == {4}
    pipe = load_pipeline(repository, repository.whole("tiny").card)
    modules = quantisable_layers(pipe.unet)
    errors = {
        n: m.weight.detach().numpy() - stands_for(file, n, m.weight.detach().numpy())
        for n, m in modules.items()
        if n in made
    }
    evidence = gather(repository, repository.card("rex"), CalibrateOptions(**FEW))  # merged: the same inputs
    for name, error in errors.items():
        hessian = evidence.hessians["trigger"][name].total.double().numpy()
        flat = error.reshape(len(error), -1).astype(np.float64)
        after = left(flat, made[name].change(), hessian)
        assert after == pytest.approx(best(flat, hessian, 4), rel=5e-3, abs=1e-4 * left(flat, 0 * flat, hessian)), name


def test_only_the_layers_that_are_wanted_are_corrected(repository, base_spec: Path) -> None:  # noqa: F811
    made = correction(
        repository, base_spec, "rex", 2, CalibrateOptions(**FEW), wanted=lambda name: name.endswith("to_q")
    )
    assert made
    assert all(name.endswith("to_q") for name in made)


def test_a_spec_that_is_not_of_the_base_as_it_is_now_is_refused(repository, base_spec: Path, tmp_path: Path) -> None:  # noqa: F811
    merged = calibrate(repository, "rex", CalibrateOptions(policy="rtn", **FEW)).spec_path
    with pytest.raises(SpecError, match=r"must be a spec of the base of 'rex', got one of 'rex'"):
        correction(repository, merged, "rex", 4, CalibrateOptions(**FEW))
    for file in base_spec.parent.glob(f"{base_spec.stem}.*"):
        shutil.copy(file, tmp_path)
    other = tmp_path / base_spec.name
    content = json.loads(other.read_text())
    content["provenance"]["checkpoint_sha256"] = "0" * 64
    other.write_text(json.dumps(content))
    with pytest.raises(SpecError, match="must be of the base's weights"):
        correction(repository, other, "rex", 4, CalibrateOptions(**FEW))
