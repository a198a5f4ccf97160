"""A tiny repository with several LoRAs over one traced base, and what they look like when exported one after the other."""

import json
from pathlib import Path
from typing import Any

import pytest

from exporters.request import export_request
from tests.fleet.many import NAMES, add_lora, content, fresh_copy


@pytest.fixture(scope="session")
def many(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rex with its calibrated specs and goldens; four more without; one whose base is nowhere; a card without weights."""
    root = tmp_path_factory.mktemp("many") / "repository"
    fresh_copy(exported[0].root, root)
    for strength, name in enumerate(NAMES, 1):
        add_lora(root, name, strength / 4)
    add_lora(root, "homeless", 1.0, base="nowhere")
    card = {"id": "wish", "kind": "lora", "base": "tiny", "trigger": ["zwx"], "class_noun": "cat"}
    (root / "checkpoints" / "cards.jsonl").write_text(json.dumps(card) + "\n")
    return root


@pytest.fixture(scope="session")
def sequential(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bundles of the four, fp16, exported one after the other in this process."""
    repository = fresh_copy(many, tmp_path_factory.mktemp("sequential") / "repository")
    for name in NAMES:
        export_request(repository, name, Path("fp16"), ["onnxruntime"])
    return content(repository.root / "bundles")
