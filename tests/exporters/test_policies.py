"""Every policy's graph computes what its spec says: ONNX Runtime against the spec's own arithmetic, layer by layer in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from personalq.numerics import INT8, QTYPES, absmax_scale, cosine, fake_quantize, quantize
from personalq.spec import SpecFile, read_spec
from runtime.engines.ort import OrtEngine

POLICIES = [
    "q-diffusion-w4a8",
    "svdquant-like-w4a8",
    "ptqd-w8a8",
    "taq-w4a8",
    "mixdq-w6a8",
    "rtn-w7a8",
    "smoothquant-w8a8",
    "taq-w4a16",
]


class SpecLayer(nn.Module):
    """A Conv2d or Linear computed by the formulas of the spec, with personalq.numerics alone."""

    def __init__(self, name: str, module: nn.Module, spec_file: SpecFile):
        super().__init__()
        self.name, self.module, self.file, self.layer = name, module, spec_file, spec_file.spec.layers[name]

    def tensor(self, part: str) -> np.ndarray:
        return np.asarray(self.file.tensors[f"{self.name}.{part}"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, weight, layer = x.numpy(), self.module.weight.detach().numpy(), self.layer
        inner = value
        if layer.balanced:
            shape = (1, -1, 1, 1) if layer.op == "conv" else (-1,)
            inner = inner / self.tensor("input_balance").reshape(shape)
        if layer.activation == "int8":
            inner = fake_quantize(inner, self.tensor("input_scale"), INT8)
        scale = self.tensor("weight_scale")
        if layer.group is not None:
            scale = np.repeat(scale, layer.group, axis=1)
        scale = scale.reshape(len(weight), -1, *([1] * (weight.ndim - 2)))
        stored = layer.rounding == "stored"
        q = self.tensor("weight_q") if stored else quantize(weight, scale.ravel(), QTYPES[layer.weight], 0)
        weight = torch.from_numpy(q.astype(np.float32) * scale)
        inner_t, bias = torch.from_numpy(inner), self.module.bias
        if layer.op == "conv":
            m = self.module
            out = nn.functional.conv2d(inner_t, weight, bias, m.stride, m.padding)
            if layer.activation == "float":
                return out
            return torch.from_numpy(fake_quantize(out.detach().numpy(), self.tensor("output_scale"), INT8))
        out = nn.functional.linear(inner_t, weight, bias)
        if layer.low_rank:
            down, up = (self.tensor(f"low_rank_{part}").astype(np.float32) for part in ("down", "up"))
            out = out + torch.from_numpy(value @ down @ up)
        return out


def reference_prediction(
    repository: Any, file: SpecFile, sample: Any, timestep: float, rows: Any, *added: Any
) -> np.ndarray:
    """The spec's prediction, from its checkpoint's FP32 weights and the bundle's rows; SDXL: text_embeds, time_ids too."""
    from calibration.model.pipeline import load_pipeline, quantisable_layers
    from exporters.graphs.trace import UNetFromRows

    unet = load_pipeline(repository, repository.card(file.spec.checkpoint)).unet
    parameters = dict(unet.named_parameters())
    for name in file.spec.tuned:
        parameters[name].data.copy_(torch.from_numpy(file.tensors[f"{name}.tuned"]))
    for name, module in list(quantisable_layers(unet).items()):
        if file.spec.layers[name].weight != "float":
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, SpecLayer(name, module, file))
    with torch.no_grad():
        inputs = (sample, np.array([timestep], np.float32), rows, *added)
        found = UNetFromRows(unet)(*(torch.from_numpy(value) for value in inputs)).numpy()
    if file.spec.corrected:
        part = min(int(timestep * 5 / 1000), 4)
        mean = file.tensors["correction.mean"][part].reshape(1, -1, 1, 1)
        found = (found - mean) / (1 + file.tensors["correction.gain"][part])
    return found


def fp32_prediction(repository: Any, sample: Any, timestep: float, rows: Any) -> np.ndarray:
    """What the checkpoint itself predicts from these rows."""
    from calibration.model.pipeline import load_pipeline
    from exporters.graphs.trace import UNetFromRows

    unet = UNetFromRows(load_pipeline(repository, repository.card("rex")).unet)
    with torch.no_grad():
        return unet(torch.from_numpy(sample), torch.tensor([timestep]), torch.from_numpy(rows)).numpy()


@pytest.mark.parametrize("name", POLICIES)
def test_onnx_runtime_computes_what_the_spec_says(exported, name, monkeypatch):
    from calibration.calibrate import CalibrateOptions, calibrate
    from calibration.rounding import adaround, tune
    from exporters.export import export_checkpoint

    monkeypatch.setattr(tune, "STEPS", 4)
    monkeypatch.setattr(adaround, "ITERATIONS", 10)
    policy, bits = name.rsplit("-", 1)
    repository, _ = exported
    made = calibrate(repository, "rex", CalibrateOptions(policy=policy, bits=bits, samples=2, steps=3))
    engine = OrtEngine(export_checkpoint(repository, "rex", made.spec_path).bundle, threads=1)
    file = read_spec(made.spec_path)
    generator = np.random.default_rng(0)
    ids = np.full((1, 77), engine.manifest.text.eos_id, np.int64)
    ids[0, :5] = [engine.manifest.text.bos_id, 3, 4, 5, 6]
    made_rows = engine.text_rows(engine.encode(ids).states, np.zeros((1, file.spec.rows.kept.slots), np.int64))
    widths = np.repeat([layer.width for layer in file.spec.rows.layers], 2)
    rows = made_rows["rest"].astype(np.float32) * np.repeat(made_rows["rest_scale"], widths, axis=2)
    sample = generator.standard_normal((1, 4, 8, 8)).astype(np.float32)
    conditioning = {**made_rows, "row_index": np.arange(77, dtype=np.int64)[None]}
    exact = fp32_prediction(repository, sample, 450.0, rows)
    found = engine.denoiser(conditioning, 8, 8)(sample, 450.0).copy()
    wanted = reference_prediction(repository, file, sample, 450.0, rows)
    # Values on a rounding edge may fall to the other side and be followed by others, so the two agree as two draws of the
    # same rounding noise do; a wrong formula (a balance left out, a branch added twice) agrees far less.
    assert cosine(found, wanted) > 0.99
    if bits == "w4a16":  # no activation is rounded, so nothing flips
        np.testing.assert_allclose(found, wanted, atol=5e-3 * float(np.abs(wanted).max()))
    if bits in ("w4a8", "w4a16"):
        assert cosine(found, wanted) > cosine(found, exact)


def test_policies_leave_different_specs(exported):
    specs = {name: exported[0].root / "specs" / "rex" / f"{name}.json" for name in POLICIES}
    contents = {name: read_spec(path).content_sha256() for name, path in specs.items() if path.exists()}
    assert len(set(contents.values())) == len(contents) >= 2


def test_rows_at_four_bits_are_what_numerics_says_and_kept_rows_stay_exact(exported):
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint

    repository, _ = exported
    made = calibrate(repository, "rex", CalibrateOptions(policy="rtn", row_bits=4, samples=2, steps=3))
    engine = OrtEngine(export_checkpoint(repository, "rex", made.spec_path).bundle, threads=1)
    ids = np.full((1, 77), engine.manifest.text.eos_id, np.int64)
    ids[0, :5] = [engine.manifest.text.bos_id, 3, 4, 5, 6]
    slots = np.zeros((1, engine.manifest.rows.kept.slots), np.int64)
    slots[0, 0] = 3
    found = engine.text_rows(engine.encode(ids).states, slots)
    start = 0
    for layer in engine.manifest.rows.layers:
        for part in range(2):
            exact = found["rows"][0, :, start : start + layer.width]
            scale = absmax_scale(exact, QTYPES["int4"], 0, where=layer.name)
            np.testing.assert_allclose(
                found["rest_scale"][0, :, 2 * engine.manifest.rows.layers.index(layer) + part], scale
            )
            q = found["rest"][0, :, start : start + layer.width]
            np.testing.assert_array_equal(q, quantize(exact, scale, QTYPES["int4"], 0))
            start += layer.width
    assert found["rest"].min() >= -8 and found["rest"].max() <= 7
    np.testing.assert_array_equal(found["kept"][0, 0], found["rows"][0, 3].astype(np.float16))
