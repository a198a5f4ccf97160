"""A tiny base's engine and checkpoints of every kind attached to it, for the tests of the gate and of its faults."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from personalq.repository import Repository
from personalq.weights.checkpoint import open_weights
from runtime.gate.check import Report
from runtime.gate.gate import Options, run_gate
from runtime.gate.request import sources_of
from runtime.gate.subject import Sources
from tests.repositories import tiny_repository

WIDTH = 32  # of the tiny text encoder
OPTIONS = Options(threads=1, level="numerics", blame=False)
KINDS = {"rex": "lora", "locon": "lora", "mug": "textual_inversion", "hat": "custom_diffusion"}


@dataclass(frozen=True)
class Attached:
    """engine: the base's 8-bit bundle; adapters: checkpoint -> its bundle. Read only: copy before changing one."""

    repository: Repository
    engine: Path
    adapters: dict[str, Path]

    def sources(self, name: str) -> Sources:
        return sources_of(self.engine, self.repository, lambda: open_weights, adapter=self.adapters[name])

    def judged(
        self, name: str, options: Options = OPTIONS, *, engine: Path | None = None, adapter: Path | None = None
    ) -> Report:
        """The gate's report of one, with the repository beside it. engine, adapter: in place of its own."""
        return run_gate(engine or self.engine, options, self.sources(name), adapter or self.adapters[name])


def make_attached(root: Path, base: Path, pipeline: Any, traces: Path) -> Attached:
    """A LoRA, one that changes convolutions, learned tokens, replaced K and V; goldens of each by torch in FP32."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.adapters import export_adapter
    from exporters.export import export_base

    repository = tiny_repository(root, base, pipeline, traces)
    add_others(root / "checkpoints", pipeline)
    for name in KINDS:
        calibrate(repository, name, CalibrateOptions(policy="fp16"))
    spec = calibrate(repository, "tiny", CalibrateOptions(samples=2, steps=3, over=tuple(KINDS)))
    engine = export_base(repository, "tiny", spec.spec_path).bundle
    return Attached(repository, engine, {name: export_adapter(repository, name).bundle for name in KINDS})


def add_others(folder: Path, pipeline: Any) -> None:
    """Checkpoints of the other kinds beside rex."""
    random = np.random.default_rng(3)
    places = [name for name, _ in pipeline.unet.named_modules() if name.endswith("attn2")]
    _card(folder, "locon", trigger=["zwx"], class_noun="cat")
    save_file(_locon(pipeline, random), folder / "locon" / "locon.safetensors")
    _card(folder, "mug", trigger=["<mug>"], class_noun="mug")
    save_file({"<mug>": _floats(random, 2, WIDTH)}, folder / "mug" / "learned_embeds.safetensors")
    _card(folder, "hat", trigger=["<new1>"], class_noun="cat")
    delta = {
        f"{place}.processor.to_{kind}_custom_diffusion.weight": _floats(random, *weight.shape) * 0.2
        for place in places
        for kind, weight in (("k", _to_k(pipeline, place)), ("v", _to_k(pipeline, place)))
    }
    save_file(delta, folder / "hat" / "pytorch_custom_diffusion_weights.safetensors")
    save_file({"<new1>": _floats(random, WIDTH)}, folder / "hat" / "<new1>.safetensors")


def _to_k(pipeline: Any, place: str) -> Any:
    module = pipeline.unet.get_submodule(place).to_k
    return getattr(module, "base_layer", module).weight


def _card(folder: Path, name: str, **words: Any) -> None:
    (folder / name).mkdir()
    card = {"id": name, "name": name, "kind": KINDS[name], "base": "tiny", **words}
    (folder / name / "card.json").write_text(json.dumps(card))


def _locon(pipeline: Any, random: np.random.Generator) -> dict[str, Any]:
    """kohya's names, rank 2, alpha 1: layers of every kind of the tiny UNet, convolutions too, and of its text encoder."""
    made: dict[str, Any] = {}
    ends = ("attn1.to_q", "conv1", "time_emb_proj", "proj_in", "q_proj", "fc1")
    parts = (("lora_unet", pipeline.unet), ("lora_te_text_model", pipeline.text_encoder))
    for prefix, name, module in ((prefix, *one) for prefix, model in parts for one in model.named_modules()):
        if not name.endswith(ends):
            continue
        n, *inner = getattr(module, "base_layer", module).weight.shape
        key = f"{prefix}_{name.replace('.', '_')}"
        made[f"{key}.lora_down.weight"] = _floats(random, 2, *inner) / np.float32(np.sqrt(np.prod(inner)))
        made[f"{key}.lora_up.weight"] = _floats(random, n, 2, *(1 for _ in inner[1:])) * np.float32(0.3)
        made[f"{key}.alpha"] = np.ones((), np.float32)
    return made


def _floats(random: np.random.Generator, *shape: int) -> Any:
    return random.standard_normal(shape).astype(np.float32)


def copied(bundle: Path, folder: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(bundle, folder / bundle.name))
