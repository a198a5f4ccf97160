"""A base from one file: models in folders of their own, with the configs, scheduler and tokenizers of its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import RepositoryError
from ..weights.header import Header, read_header
from ..weights.marks import read_marks
from ..weights.models import SECOND_ENCODER
from ..weights.one_file.clip_tokenizer import END, N_TOKENS, write_tokenizer
from ..weights.one_file.infer import family_of, infer_configs, infer_shapes
from ..weights.one_file.original import averaged_tensors, is_original, read_original, unpack
from ..weights.tensorfile import TensorFile

_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# The schedulers that the families were published with.
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, **_NOISE},
    "sd2": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False, **_NOISE},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", **_NOISE},
}
# Neither tensors nor shapes tell SD 2.x's two kinds apart: the larger model, which most fine-tunes are of, predicts v.
_PREDICTS = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
_PAD = "!"  # of OpenCLIP's text encoders


def write_base(file: Path, folder: Path) -> tuple[str, ...]:
    """Write a whole base pipeline from a one-file checkpoint into `folder`; return what its owner should know.

    Raises RepositoryError when the file is not a whole Stable Diffusion 1.x, 2.x or XL, or has a tensor nothing would use.
    """
    header = read_header(file)
    if not is_original(header.shapes):
        raise RepositoryError(
            f"{file}: must be a whole model in the original layout, got none of its UNet's tensors; "
            "a delta is added as a SOURCE, with --base of the model it was trained on"
        )
    opened = TensorFile(file)
    family, configs = family_of(opened.shapes), infer_configs(opened.shapes)
    if (n_tokens := configs["text_encoder"]["vocab_size"]) < N_TOKENS:
        raise RepositoryError(
            f"{file}: text encoder must have CLIP's {N_TOKENS} tokens, got {n_tokens}; "
            "add the model as a diffusers folder, with its own tokenizer"
        )
    unpack(read_original(opened, infer_shapes(opened.shapes, configs)), folder)
    scheduler, warnings = _scheduler(family, header, file.name)
    if family == "sd2" and scheduler["prediction_type"] == "v_prediction":
        configs["unet"]["sample_size"] = 96
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for component, config in configs.items():
        write_json(folder / component / "config.json", config)
    _write_tokenizers(folder, family)
    write_json(folder / "model_index.json", _index(configs, scheduler))
    if averaged := averaged_tensors(opened.entries):
        warnings += (f"left out {averaged} tensors of model_ema: training's moving average of the weights",)
    return warnings


def _scheduler(family: str, header: Header, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The family's scheduler with what the file says of itself; a warning when the kind of prediction is only likely."""
    config = {**_SCHEDULERS[family], "prediction_type": _PREDICTS[family]}
    marks = read_marks(header, name)
    said = {**marks.by_header, **marks.by_tensors}
    config |= {field: value for field, (value, _) in said.items()}
    if config.get("rescale_betas_zero_snr"):
        config["timestep_spacing"] = "trailing"  # zero terminal SNR is seen at the last time step only
    if family == "sd2" and "prediction_type" not in said:
        guess = "the file does not say what it predicts: taken for v_prediction, as SD 2.x at 768 pixels; "
        return config, (guess + "for a 512 model set prediction_type to epsilon in the base's scheduler_config.json",)
    return config, ()


def _write_tokenizers(folder: Path, family: str) -> None:
    write_tokenizer(folder / "tokenizer", _PAD if family == "sd2" else END)
    if family == "sdxl":
        write_tokenizer(folder / "tokenizer_2", _PAD)


def _index(configs: dict[str, dict[str, Any]], scheduler: dict[str, Any]) -> dict[str, Any]:
    """model_index.json, as diffusers reads a pipeline."""
    is_sdxl = SECOND_ENCODER in configs
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if not is_sdxl:
        nothing = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        return index | nothing
    return index | {
        SECOND_ENCODER: ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
