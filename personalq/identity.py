"""What a checkpoint is, as hashes: the family its architecture belongs to, and the digest of its weights. Paths never enter."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .bundle import HASHED_AT_ONCE, file_sha256
from .errors import RepositoryError

COMPONENTS = ("unet", "text_encoder", "vae")
SECOND_ENCODER = "text_encoder_2"
# Config fields that change no graph: where the file came from, and sizes that a checkpoint's own tensors tell.
_IGNORED = {
    "_name_or_path",
    "_diffusers_version",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "vocab_size",
    "architectures",
}


# UNet config fields that change what the UNet computes or is told, and what they may be. One that is absent is fine.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "in_channels": (4,),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "attention_type": ("default",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
}
_WHY = {
    "in_channels": "inpainting, depth and upscaling UNets are told more than a prompt, which is not supported",
    "time_cond_proj_dim": "guidance-distilled UNets (LCM) are not supported; their LoRA form on a plain base is",
}
_STILL_S = 2.0
_DIGESTS: dict[tuple[str, int, int, int], str] = {}
_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


def read_configs(base_dir: Path) -> dict[str, dict[str, Any]]:
    """A base pipeline's component configs: SD 1.x, 2.x, or SDXL, which has text_encoder_2 too.

    Raises RepositoryError for a base that PersonalQ would get silently wrong.
    """
    configs = {"unet": _read_config(base_dir, "unet")}
    _check_known(base_dir, configs["unet"])
    is_sdxl = configs["unet"].get("addition_embed_type") == "text_time"
    for component in (*COMPONENTS[1:], *((SECOND_ENCODER,) if is_sdxl else ())):
        configs[component] = _read_config(base_dir, component)
    if is_sdxl:
        _check_sdxl(base_dir, configs)
    for field in ("latents_mean", "latents_std"):
        if configs["vae"].get(field) is not None:
            raise RepositoryError(f"{base_dir}: vae {field} must be absent, got values; this VAE is not supported yet")
    return configs


def _read_config(base_dir: Path, component: str) -> dict[str, Any]:
    file = base_dir / component / "config.json"
    if not file.is_file():
        raise RepositoryError(
            f"{file}: must exist in a Stable Diffusion base, got nothing; add the whole diffusers folder"
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise RepositoryError(f"{file}: must be JSON, got {error}; copy the base again") from error
    if not isinstance(config, dict):
        raise RepositoryError(f"{file}: must be a JSON object, got {type(config).__name__}; copy the base again")
    return config


def _check_known(base_dir: Path, unet: dict[str, Any]) -> None:
    for field, allowed in _KNOWN.items():
        value = unet.get(field, allowed[0])
        if value not in allowed:
            wanted = " or ".join(str(choice) for choice in allowed)
            why = _WHY.get(field, "only Stable Diffusion 1.x, 2.x and XL are supported")
            raise RepositoryError(f"{base_dir}: unet {field} must be {wanted}, got {value!r}; {why}")
    blocks = [*unet.get("down_block_types", ()), *unet.get("up_block_types", ())]
    odd = next((block for block in blocks if block not in _BLOCKS), None)
    if odd is not None:
        raise RepositoryError(f"{base_dir}: unet blocks must be of {', '.join(_BLOCKS)}, got {odd!r}; use another base")


def _check_sdxl(base_dir: Path, configs: dict[str, dict[str, Any]]) -> None:
    """The UNet's added input is six time ids beside the second encoder's pooled text; the refiner has five."""
    unet, second = configs["unet"], configs[SECOND_ENCODER]
    pooled = second.get("projection_dim", 512)
    wanted = pooled + 6 * (unet.get("addition_time_embed_dim") or 0)
    found = unet.get("projection_class_embeddings_input_dim")
    if found != wanted:
        raise RepositoryError(
            f"{base_dir}: unet projection_class_embeddings_input_dim must be {wanted} (pooled text and six time ids), "
            f"got {found}; SDXL refiners are not supported"
        )


def family_key(configs: dict[str, dict[str, Any]]) -> str:
    """32 hex digits over the configs' architecture fields: equal for every checkpoint that shares the graphs."""
    kept = {part: {k: v for k, v in config.items() if k not in _IGNORED} for part, config in configs.items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def weights_sha256(base_dir: Path, checkpoint_dir: Path | None) -> str:
    """sha256 over the bytes of every weight file of base and delta, by role and name inside its folder."""
    files: dict[str, Path] = {}
    for role, folder in (("base", base_dir), ("delta", checkpoint_dir)):
        if folder is not None:
            found = sorted(folder.rglob("*.safetensors"))
            files |= {f"{role}/{file.relative_to(folder).as_posix()}": file for file in found}
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        digests = pool.map(_file_digest, files.values())
    lines = [f"{name}:{digest}\n" for name, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    """file_sha256, once a process for a file that lay still: a base is hashed for every checkpoint over it."""
    stat = file.stat()
    key = (str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key in _DIGESTS:
        return _DIGESTS[key]
    digest = file_sha256(file)
    if time.time() - stat.st_mtime > _STILL_S:  # a change within one tick of the file system's clock would not show
        _DIGESTS[key] = digest
    return digest


def sampling_defaults(base_dir: Path) -> dict[str, Any]:
    """Steps and guidance the base recommends (`personalq.json` in its folder), else Stable Diffusion's usual ones."""
    file = base_dir / "personalq.json"
    wanted = json.loads(file.read_text()) if file.is_file() else {}
    return {"steps": int(wanted.get("steps", 25)), "guidance": float(wanted.get("guidance", 7.5))}
