"""What a checkpoint is, as hashes: the family its architecture belongs to, and the digest of its weights. Paths never enter."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .bundle import file_sha256
from .errors import RepositoryError

COMPONENTS = ("unet", "text_encoder", "vae")
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


def read_configs(base_dir: Path) -> dict[str, dict[str, Any]]:
    """A base pipeline's component configs. Raises RepositoryError for one that PersonalQ would get silently wrong."""
    configs = {}
    for component in COMPONENTS:
        file = base_dir / component / "config.json"
        if not file.is_file():
            raise RepositoryError(
                f"{file}: must exist in a Stable Diffusion base, got nothing; add the whole diffusers folder"
            )
        configs[component] = json.loads(file.read_text())
    _check_known(base_dir, configs["unet"])
    return configs


def _check_known(base_dir: Path, unet: dict[str, Any]) -> None:
    channels = unet.get("in_channels")
    if channels != 4:
        raise RepositoryError(
            f"{base_dir}: unet in_channels must be 4, got {channels}; inpainting UNets are not supported yet"
        )
    extra = unet.get("addition_embed_type") or unet.get("class_embed_type")
    if extra:
        raise RepositoryError(
            f"{base_dir}: unet must take a prompt only (Stable Diffusion 1.x or 2.x), got conditioning {extra!r}"
        )


def family_key(configs: dict[str, dict[str, Any]]) -> str:
    """32 hex digits over the configs' architecture fields: equal for every checkpoint that shares the graphs."""
    kept = {part: {k: v for k, v in config.items() if k not in _IGNORED} for part, config in configs.items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def weights_sha256(base_dir: Path, checkpoint_dir: Path | None) -> str:
    """sha256 over the bytes of every weight file of base and delta, by role and name inside its folder."""
    digest = hashlib.sha256()
    for role, folder in (("base", base_dir), ("delta", checkpoint_dir)):
        if folder is None:
            continue
        for file in sorted(folder.rglob("*.safetensors")):
            digest.update(f"{role}/{file.relative_to(folder).as_posix()}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def sampling_defaults(base_dir: Path) -> dict[str, Any]:
    """Steps and guidance the base recommends (`personalq.json` in its folder), else Stable Diffusion's usual ones."""
    file = base_dir / "personalq.json"
    wanted = json.loads(file.read_text()) if file.is_file() else {}
    return {"steps": int(wanted.get("steps", 25)), "guidance": float(wanted.get("guidance", 7.5))}
