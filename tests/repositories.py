"""A small repository for tests: a tiny random base and one LoRA over it, made once a session."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from personalq.repository import Repository


def shared_traces(temporary: Path) -> Path:
    """Where a test run keeps traced families for all its processes: a trace takes seconds, and a run wants few of them.

    temporary: this process's folder for the run; pytest-xdist puts those of one run into one folder.
    """
    return (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "families"


def add_family(root: Path, base: str, traces: Path) -> None:
    """Give the repository its base's family, traced by this run or by none before."""
    from exporters.graphs.family import open_family

    found = open_family(traces, root / "bases" / base).folder
    shutil.copytree(found, root / "families" / found.name)


def tiny_repository(root: Path, base: Path, pipeline: Any, traces: Path) -> Repository:
    """bases/tiny with its family, and checkpoints/rex (a random rank-4 LoRA, alpha 8) under `root`."""
    shutil.copytree(base, root / "bases" / "tiny")
    (root / "bases" / "tiny" / "personalq.json").write_text('{"steps": 3, "guidance": 2.0}')
    folder = root / "checkpoints" / "rex"
    folder.mkdir(parents=True)
    card = {"id": "rex", "name": "Rex", "kind": "lora", "base": "tiny", "trigger": ["sks"], "class_noun": "dog"}
    (folder / "card.json").write_text(json.dumps(card))
    write_lora(folder, pipeline)
    add_family(root, "tiny", traces)
    return Repository.open(root)


def write_lora(folder: Path, pipeline: Any) -> None:
    """pytorch_lora_weights.safetensors of a random LoRA on every attention, as diffusers saves it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
