"""`generate` says what it did not use of a prompt, in its answer and on the log; what cannot be drawn is one line."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from personalq.errors import PromptError
from personalq.repository import Repository
from runtime.drawing.generate import Order, generate
from runtime.drawing.pipeline import Settings


@pytest.fixture
def repository(open_bundle: Path, tmp_path: Path) -> Repository:
    shutil.copytree(open_bundle, tmp_path / "repo" / "bundles" / open_bundle.name)
    folder = tmp_path / "repo" / "checkpoints" / "moss-mug"
    folder.mkdir(parents=True)
    card = {
        "id": "moss-mug",
        "name": "Moss mug",
        "kind": "textual_inversion",
        "base": "tiny",
        "trigger": ["<moss-mug>"],
    }
    (folder / "card.json").write_text(json.dumps(card))
    return Repository.open(tmp_path / "repo")


ORDER = Order("moss-mug", negative_prompt="a (cat", settings=Settings(steps=1))


def test_what_was_not_used_is_told(repository: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "personalq.runtime"):
        made = generate(repository, "a (<moss-mug>:1.2) AND snow <lora:moss-mug:1>", tmp_path / "a.png", ORDER)
    assert made.warnings == (
        "prompt: AND: prompts cannot be composed: it is read as the word 'and'",
        "negative_prompt: '(' at character 2 is never closed: it is read as a bracket",
    )
    assert made.prompt == "a (<moss-mug>:1.2) AND snow <lora:moss-mug:1>"
    assert sorted(caplog.messages) == sorted(text.replace("negative_", "") for text in made.warnings)
    assert (tmp_path / "a.png").is_file()


def test_a_prompt_without_marks_has_no_warnings(repository: Repository, tmp_path: Path) -> None:
    order = Order("moss-mug", settings=Settings(steps=1))
    assert generate(repository, "a <moss-mug> in the snow", tmp_path / "a.png", order).warnings == ()


def test_a_strength_that_cannot_be_had_is_refused(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(PromptError) as error:
        generate(repository, "a <moss-mug> <lora:moss-mug:0.8>", tmp_path / "a.png", ORDER)
    assert str(error.value).startswith(
        "prompt: <lora:moss-mug:0.8> must have strength 1 in all, got 0.8; 'moss-mug' is "
    )
    assert not (tmp_path / "a.png").exists()
