"""Goldens of what the UNet computes inside: the samples are those of real outputs, and old goldens are noticed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from personalq.goldens import TENSORS, sample_positions
from personalq.repository.settings import read_settings
from personalq.scheduler import BaseScheduler


def scheduler(repository) -> BaseScheduler:
    return read_settings(repository.root / "bases" / "tiny").scheduler


@pytest.fixture(scope="module")
def written(rex, tmp_path_factory) -> Path:
    from calibration.model.pipeline import load_pipeline
    from calibration.model.reference import golden_prompts, write_reference

    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    pipe, card = load_pipeline(rex, rex.card("rex")), rex.card("rex")
    told = {"steps": 3, "guidance": 2.0, "checkpoint_sha256": "abc", "checked_against": ""}
    write_reference(pipe, golden_prompts(card), path, scheduler=scheduler(rex), **told)
    return path


def test_samples_are_values_of_the_layers_real_outputs(rex, written):
    import torch

    from calibration.model.pipeline import load_pipeline

    pipe = load_pipeline(rex, rex.card("rex"))
    with safe_open(str(written), framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        notes = opened.metadata()
    assert set(tensors) == set(TENSORS)
    outputs: dict[str, torch.Tensor] = {}
    sizes = {kind: json.loads(notes[kind]) for kind in ("layers", "blocks")}
    watched = {"conv_in": "layers", "mid_block.attentions.0": "blocks", "up_blocks.0.resnets.0": "blocks"}
    modules = dict(pipe.unet.named_modules())
    for name in watched:
        modules[name].register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    embeds = torch.from_numpy(tensors["text_embeds"][tensors["prompt"][2]][None])
    with torch.no_grad():
        pipe.unet(torch.from_numpy(tensors["sample"][2:3]), torch.tensor(int(tensors["timestep"][2])), embeds)
    for name, kind in watched.items():
        out = outputs[name][0] if isinstance(outputs[name], tuple) else getattr(outputs[name], "sample", outputs[name])
        kept = tensors[kind][2][list(sizes[kind]).index(name)]
        flat = out.reshape(-1).numpy()
        assert sizes[kind][name] == flat.size
        np.testing.assert_allclose(kept, flat[sample_positions(name, flat.size, len(kept))], atol=1e-5)
    np.testing.assert_allclose(tensors["attention"].sum(axis=-1), 1, atol=1e-5)


def test_goldens_of_another_format_checkpoint_or_scheduler_are_not_current(rex, written, tmp_path):
    from calibration.model.reference import is_current

    drawn = scheduler(rex)
    assert is_current(written, "abc", drawn)
    assert not is_current(written, "abd", drawn)
    assert not is_current(tmp_path / "none.safetensors", "abc", drawn)
    other = replace(drawn, settings={**drawn.settings, "prediction_type": "v_prediction"})
    assert not is_current(written, "abc", other)


def test_positions_follow_the_name_and_stay_inside():
    a, b = sample_positions("conv_in", 1000, 32), sample_positions("conv_out", 1000, 32)
    assert (a == sample_positions("conv_in", 1000, 32)).all() and (a != b).any()
    assert a.min() >= 0 and a.max() < 1000 and (np.diff(a) >= 0).all()
