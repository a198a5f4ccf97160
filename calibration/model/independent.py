"""An independent look at a checkpoint: diffusers' own loaders, and whether they arrive at the weights that the reader gives."""

import gc
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from personalq.architecture import read_configs
from personalq.cards.card import Card
from personalq.repository import Repository
from personalq.repository.results import Whole
from personalq.repository.settings import Settings, read_settings
from personalq.weights.checkpoint import CheckpointWeights, open_weights
from personalq.weights.deltas.custom_diffusion import is_custom_diffusion, replaced_parameter
from personalq.weights.deltas.embeddings import parts_by_encoder
from personalq.weights.deltas.lora import foreign_lengths
from personalq.weights.deltas.lora_names import is_lora, unread_names
from personalq.weights.header import read_header

from .conditioning import Pipe
from .pipeline import LATENT_MODELS, TEXT_MODELS, open_base, quiet_libraries

TOLERANCE = 1e-5  # of a parameter's largest value: float32 on both sides, only the order of additions differs


def checked_against(repository: Repository, card: Card) -> str:
    """'diffusers <version>' when its loaders give the reader's weights, else why they were not compared, or what differs.

    A base is compared as it is. Raises RepositoryError when the reader itself cannot read the checkpoint.
    """
    whole = repository.whole(card.id)
    ours = open_weights(whole.base_dir, whole.checkpoint_dir, card.kind)
    settings = read_settings(whole.base_dir, whole.checkpoint_dir)  # ours: what it raises is not diffusers' failure
    tool = f"diffusers {version('diffusers')}"
    if why := _dropped(whole.checkpoint_dir):
        return f"not checked: {tool} {why}"
    try:
        pipe = _loaded(whole, settings)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"not checked: {tool} does not load it ({said})"
    different = next(_differences(pipe, ours, [*read_configs(whole.base_dir)]), "")
    del pipe
    gc.collect()
    return f"differs from {tool}: {different}" if different else tool


def load_by_diffusers(repository: Repository, card: Card) -> Pipe:
    """The checkpoint's (or base's) FP32 pipeline as diffusers' own loaders make it. Whatever they raise comes through."""
    whole = repository.whole(card.id)
    return _loaded(whole, read_settings(whole.base_dir, whole.checkpoint_dir))


def _loaded(whole: Whole, settings: Settings) -> Pipe:
    with quiet_libraries():
        pipe = open_base(whole.base_dir, settings, {})
        if whole.checkpoint_dir is not None:
            LOADERS[whole.card.kind](pipe, whole.checkpoint_dir)
    return pipe


def _differences(pipe: Pipe, weights: CheckpointWeights, components: list[str]) -> Iterator[str]:
    """Each parameter that is not the same on both sides."""
    for component in components:
        ours = weights.component(component)
        named = getattr(pipe, component).named_parameters()
        # Custom Diffusion's own projections come after those they replace
        theirs = {replaced_parameter(name): value.detach().numpy() for name, value in named}
        if missing := sorted(theirs.keys() ^ set(ours.names())):
            yield f"{component}.{missing[0]} is on one side only"
        for name, value in theirs.items():
            mine = np.asarray(ours.read(name), np.float32)
            if mine.shape != value.shape:
                yield f"{component}.{name} is {list(value.shape)} there, {list(mine.shape)} here"
            elif (error := np.abs(mine - value).max(initial=0)) > TOLERANCE * max(np.abs(value).max(initial=0), 1e-3):
                yield f"{component}.{name} by {error:.2g}"


def _dropped(folder: Path | None) -> str:
    """What diffusers 0.42.1 is known to leave out of a file without an error; '' when nothing."""
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        shapes = read_header(file).shapes
        if lost := foreign_lengths(shapes):
            return f"drops the lengths of this DoRA ({lost[0]})"
        if is_lora(shapes) and (unread := unread_names(shapes)):
            return f"passes over some names of this LoRA ({unread[0]})"
    return ""


def _load_whole(pipe: Pipe, folder: Path) -> None:
    for name, model in {**LATENT_MODELS, **TEXT_MODELS}.items():
        if (folder / name).is_dir():
            setattr(pipe, name, model.from_pretrained(folder / name, torch_dtype=pipe.dtype))


def _load_lora(pipe: Pipe, folder: Path) -> None:
    file = _only(folder, is_lora)
    pipe.load_lora_weights(folder, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _load_custom_diffusion(pipe: Pipe, folder: Path) -> None:
    file = _only(folder, is_custom_diffusion)
    # without _pipeline, diffusers 0.42 reads the file and sets nothing
    pipe.unet.load_attn_procs(folder, weight_name=file.name, _pipeline=pipe)
    _load_tokens(pipe, folder)


def _load_tokens(pipe: Pipe, folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        if is_custom_diffusion(read_header(file).shapes):
            continue
        if isinstance(pipe, StableDiffusionXLPipeline):
            for encoder, vectors in parts_by_encoder(load_file(file)).items():
                tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
                where: dict[str, object] = {"text_encoder": getattr(pipe, encoder), "tokenizer": tokenizer}
                pipe.load_textual_inversion(vectors, token=file.stem, **where)
        else:
            pipe.load_textual_inversion(folder, weight_name=file.name)


LOADERS: dict[str, Callable[[Pipe, Path], None]] = {
    "dreambooth": _load_whole,
    "lora": _load_lora,
    "textual_inversion": _load_tokens,
    "custom_diffusion": _load_custom_diffusion,
}


def _only(folder: Path, is_it: Callable[[dict[str, tuple[int, ...]]], bool]) -> Path:
    """The folder's file of this kind; the reader has made sure that there is one."""
    return next(file for file in sorted(folder.glob("*.safetensors")) if is_it(read_header(file).shapes))
