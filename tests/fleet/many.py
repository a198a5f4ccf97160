"""Checkpoints by the handful for the tests of a fleet, and what their bundles hold."""

import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from personalq.repository import Repository

NAMES = ("one", "two", "three", "four")
LEFT_OUT = ("bundles", "shared", "engines")


def add_lora(root: Path, name: str, strength: float, base: str = "tiny") -> None:
    """Another checkpoint: rex's LoRA, stronger or weaker."""
    folder = root / "checkpoints" / name
    folder.mkdir()
    card = {"id": name, "kind": "lora", "base": base, "trigger": ["sks"], "class_noun": "dog"}
    (folder / "card.json").write_text(json.dumps(card))
    file = next((root / "checkpoints" / "rex").glob("*.safetensors"))
    save_file({key: value * strength for key, value in load_file(file).items()}, folder / file.name)


def fresh_copy(source: Path, root: Path) -> Repository:
    """The same repository, nothing exported yet."""
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return Repository.open(root)


def content(bundles: Path) -> dict[str, bytes]:
    """Every file of every bundle, the gate's notes left out (seconds are not in them, but nothing promises their bytes)."""
    files = [file for file in sorted(bundles.glob("[!.]*/**/*")) if file.is_file()]  # a killed export leaves .tmp-*
    return {str(file.relative_to(bundles)): file.read_bytes() for file in files if file.name != "verified.json"}
