"""Every spelling of a LoRA merges to W + alpha/r up @ down, and to what diffusers makes of it where diffusers loads it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'personalq[export]'")

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: E402  (after the skip)
from safetensors.torch import save_file  # noqa: E402

from personalq.weights.checkpoint import CheckpointWeights, open_weights  # noqa: E402
from personalq.weights.one_file.original import UNET, places  # noqa: E402
from tests.exporters import architectures  # noqa: E402

TOLERANCE = 1e-6  # of a parameter's largest value: float32 on both sides, only the order of additions differs
PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
RANK, ALPHA = 4, 3.0

Pair = tuple[Any, Any]  # down, up
Trained = Mapping[tuple[str, str], Pair]  # (component, module as diffusers and transformers name it) -> pair


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny pipeline, made when it is asked for."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            getattr(architectures, name)().save_pretrained(root / name)
        return root / name

    return folder


def random_pairs(base: Path) -> Trained:
    """One pair for every Linear and Conv2d of the UNet and the text encoders."""
    torch.manual_seed(13)
    plain, pairs = open_weights(base, None, "lora"), {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if component not in plain.components:
            continue
        weights = plain.component(component)
        for name in weights.names():
            shape = weights.shape(name)
            if not name.endswith(".weight") or len(shape) < 2 or "embedding.weight" in name:
                continue
            down = torch.randn(RANK, *shape[1:]) * 0.1
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2)) * 0.1
            pairs[component, name.removesuffix(".weight")] = (down, up)
    return pairs


# --- how tools spell a pair


@dataclass(frozen=True)
class Spelling:
    """stem: (component, module, its name in the original layout) -> what stands before the ending; '' to leave it out."""

    stem: Callable[[str, str, str], str]
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alpha: str = ""
    families: tuple[str, ...] = ("sd1", "sd2", "sdxl")
    loads: tuple[str, ...] = ()  # the families for which diffusers 0.42.1 loads it


KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
COMFY = {"text_encoder": "text_encoders.clip_l.transformer", "text_encoder_2": "text_encoders.clip_g.transformer"}
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
DOWN_UP = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
HALVES = {"down": ".lora.down.weight", "up": ".lora.up.weight"}
OLD_HALVES = {"down": "_lora.down.weight", "up": "_lora.up.weight"}
ALL = ("sd1", "sd2", "sdxl")


def full(component: str, module: str) -> str:
    """A text encoder's module with transformers 4's text_model., which every file has."""
    is_bare = component.startswith("text_encoder") and not module.startswith(("text_model.", "text_projection"))
    return f"text_model.{module}" if is_bare else module


def dotted(component: str, module: str, original: str) -> str:
    return f"{component}.{full(component, module)}"


def of_unet(prefix: str) -> Callable[[str, str, str], str]:
    return lambda component, module, original: f"{prefix}{module}" if component == "unet" else ""


def with_peft(component: str, module: str, original: str) -> str:
    return f"{component}.base_model.model.{full(component, module)}"


def processor(prefix: str) -> Callable[[str, str, str], str]:
    """An attention processor of diffusers 0.12 to 0.21; it knew nothing else of the UNet."""

    def stem(component: str, module: str, original: str) -> str:
        if component != "unet":
            head, _, projection = full(component, module).rpartition(".")
            return f"{component}.{head}.{OLD[projection]}" if projection in OLD else ""
        found = re.fullmatch(r"(.*attn\d)\.(to_[qkv]|to_out)(?:\.0)?", module)
        return f"{prefix}{found[1]}.processor.{found[2]}" if found else ""

    return stem


def kohya(first: str, is_original: bool) -> Callable[[str, str, str], str]:
    def stem(component: str, module: str, original: str) -> str:
        name = original if component == "unet" and is_original else full(component, module)
        return f"{first if component == 'text_encoder' else KOHYA[component]}_{name.replace('.', '_')}"

    return stem


def comfy(component: str, module: str, original: str) -> str:
    return f"diffusion_model.{original}" if component == "unet" else f"{COMFY[component]}.{full(component, module)}"


def comfy_of_sd2(component: str, module: str, original: str) -> str:
    return comfy(component, module, original).replace("clip_l", "clip_h")


def clip(component: str, module: str, original: str) -> str:
    names = {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return f"{names[component]}.{full(component, module)}"


def bare(component: str, module: str, original: str) -> str:
    return full(component, module)


SPELLINGS = {
    "diffusers": Spelling(of_unet("unet."), **HALVES, loads=ALL),
    "diffusers, one ending for both models": Spelling(dotted, **HALVES),
    "diffusers, with alpha": Spelling(dotted, **HALVES, alpha=".alpha"),
    "diffusers, with the LoRA layer's alpha": Spelling(dotted, **HALVES, alpha=".lora.alpha"),
    "diffusers' text layers": Spelling(
        lambda component, *names: dotted(component, *names) if component != "unet" else "",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        loads=ALL,
    ),
    "attention processors": Spelling(processor("unet."), **OLD_HALVES, loads=ALL),
    "attention processors, no prefix": Spelling(processor(""), **OLD_HALVES),
    "attention processors, with alpha": Spelling(processor("unet."), **OLD_HALVES, alpha="_lora.alpha"),
    "peft": Spelling(dotted, loads=ALL),
    "peft, no prefix": Spelling(of_unet("")),
    "peft, no prefix, both models": Spelling(bare, families=("sd1", "sd2")),
    "peft, base_model.model": Spelling(of_unet("base_model.model.")),
    "peft, a prefix each": Spelling(with_peft),
    "peft, adapter default": Spelling(dotted, ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft, adapter default_0": Spelling(dotted, ".lora_A.default_0.weight", ".lora_B.default_0.weight"),
    "peft, adapter my-dog": Spelling(dotted, ".lora_A.my-dog.weight", ".lora_B.my-dog.weight"),
    "kohya": Spelling(kohya("lora_te", False), **DOWN_UP, alpha=".alpha", loads=("sd1", "sd2")),
    "kohya, no alpha": Spelling(kohya("lora_te", False), **DOWN_UP),
    "kohya, te1": Spelling(kohya("lora_te1", False), **DOWN_UP, alpha=".alpha", loads=("sd1", "sd2")),
    "kohya, original blocks": Spelling(kohya("lora_te1", True), **DOWN_UP, alpha=".alpha", loads=("sdxl",)),
    "OneTrainer": Spelling(dotted, **DOWN_UP, alpha=".alpha"),
    "OneTrainer, clip_l and clip_g": Spelling(clip, **DOWN_UP, alpha=".alpha"),
    "OneTrainer, original": Spelling(lambda component, _, name: name if component == "unet" else "", alpha=".alpha"),
    "ComfyUI": Spelling(comfy, **DOWN_UP, alpha=".alpha"),
    "ComfyUI, A and B": Spelling(comfy, alpha=".alpha"),
    "ComfyUI, SD2": Spelling(comfy_of_sd2, **DOWN_UP, alpha=".alpha", families=("sd2",)),
    "LyCORIS' wrapper": Spelling(of_unet("lycoris_"), **DOWN_UP, alpha=".alpha"),
    "original, base_model.model": Spelling(
        lambda component, _, name: f"base_model.model.{name}" if component == "unet" else ""
    ),
}
CASES = [(name, family) for name, spelling in SPELLINGS.items() for family in spelling.families]
LOADED = [(name, family) for name, spelling in SPELLINGS.items() for family in spelling.loads]


def written(base: Path, spelling: Spelling, pairs: Trained) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """The tensors as a tool names them, and the modules it has a name for."""
    unet = open_weights(base, None, "lora").component("unet")
    shapes = {name: unet.shape(name) for name in unet.names() if name.endswith(".weight")}
    originals = {name: place.name.removeprefix(UNET) for name, place in places("unet", shapes, frozenset()).items()}
    state, modules = {}, set()
    for (component, module), (down, up) in pairs.items():
        original = originals[f"{module}.weight"].removesuffix(".weight") if component == "unet" else ""
        if stem := spelling.stem(component, module, original):
            state |= {f"{stem}{spelling.down}": down, f"{stem}{spelling.up}": up}
            state |= {f"{stem}{spelling.alpha}": torch.tensor(ALPHA)} if spelling.alpha else {}
            modules.add((component, module))
    return state, modules


def assert_close(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    assert ours.shape == theirs.shape, name
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(np.abs(theirs).max(), 1e-3), name


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_spelling_is_merged_by_the_formula(
    bases: Callable[[str], Path], tmp_path: Path, name: str, family: str
) -> None:
    base, spelling = bases(family), SPELLINGS[name]
    pairs = random_pairs(base)
    state, modules = written(base, spelling, pairs)
    save_file(state, tmp_path / "lora.safetensors")
    weights, plain = open_weights(base, tmp_path, "lora"), open_weights(base, None, "lora")
    scale = ALPHA / RANK if spelling.alpha else 1.0
    assert len(modules) >= 8
    for component in plain.components:
        ours = weights.component(component)
        assert ours.changed == {f"{module}.weight" for home, module in modules if home == component}
        for parameter in ours.changed:
            down, up = pairs[component, parameter.removesuffix(".weight")]
            weight = plain.component(component).read(parameter)
            product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).numpy()
            assert_close(ours.read(parameter), weight + np.float32(scale) * product, parameter)


@pytest.mark.parametrize(("name", "family"), LOADED)
def test_a_spelling_is_merged_as_diffusers_fuses_it(
    bases: Callable[[str], Path], tmp_path: Path, name: str, family: str
) -> None:
    base = bases(family)
    state, _ = written(base, SPELLINGS[name], random_pairs(base))
    save_file(state, tmp_path / "lora.safetensors")
    assert_equal(open_weights(base, tmp_path, "lora"), fused(base, family, tmp_path / "lora.safetensors"))


def fused(base: Path, family: str, file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = PIPELINES[family].from_pretrained(base)
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe


def assert_equal(weights: CheckpointWeights, pipe: Any) -> None:
    for component, ours in weights.components.items():
        for name, value in getattr(pipe, component).named_parameters():
            assert_close(np.asarray(ours.read(name), np.float32), value.detach().numpy(), f"{component}.{name}")
