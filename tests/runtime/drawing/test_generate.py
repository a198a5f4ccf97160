"""A request becomes a picture: with Check-in's choice, with a named checkpoint, and not at all when a question is open."""

import json
from pathlib import Path
from typing import Any

import pytest

from personalq import checkin
from personalq.checkin import Decision
from personalq.errors import CheckinError, EngineError, RepositoryError
from personalq.repository import Repository
from runtime.drawing.generate import Order, Settings, generate


@pytest.fixture
def repository(tmp_path: Path, make_bundle: Any) -> Repository:
    """A card and a bundle of moss-mug; the card needs no weights to be drawn."""
    make_bundle("repo/bundles/one")
    opened = Repository.open(tmp_path / "repo")
    cards = tmp_path / "cards.jsonl"
    cards.write_text(json.dumps({"id": "moss-mug", "kind": "lora", "trigger": ["sks"], "class_noun": "mug"}))
    opened.add_cards(cards)
    return opened


def decides(monkeypatch: pytest.MonkeyPatch, decision: str, **fields: Any) -> None:
    whole: dict[str, Any] = {"checkpoint": None, "prompt": None, "question": None, "options": (), "candidates": ()}
    answer = Decision(decision, **{**whole, **fields}, milliseconds=1.0)  # type: ignore[arg-type]
    monkeypatch.setattr(checkin, "ask", lambda *_: answer)


def test_a_request_is_drawn_with_the_checkpoint_and_prompt_that_checkin_gives(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decides(monkeypatch, "select", checkpoint="moss-mug", prompt="a photo of sks mug")
    told: list[tuple[str, float]] = []
    out = tmp_path / "new folder" / "mug.png"
    made = generate(
        repository,
        "my mug",
        out,
        order=Order(seed=3, settings=Settings(steps=2)),
        progress=lambda text, done: told.append((text, done)),
    )
    assert (made.checkpoint, made.prompt, made.engine) == ("moss-mug", "a photo of sks mug", "onnxruntime")
    assert out.read_bytes().startswith(b"\x89PNG") and made.image == str(out)
    assert 0 < made.seconds_per_step < made.seconds
    assert [text for text, _ in told] == ["asking Check-in", "opening the engine", "step 1 of 2", "step 2 of 2"]
    assert [done for _, done in told] == sorted(done for _, done in told)


def test_the_seed_decides_the_picture(repository: Repository, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        generate(repository, "sks mug", file, Order("moss-mug", seed=seed, settings=Settings(steps=2)))
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_another_target_falls_back_with_its_reason(repository: Repository, tmp_path: Path) -> None:
    order = Order("moss-mug", "tensorrt", settings=Settings(steps=1))
    made = generate(repository, "sks mug", tmp_path / "a.png", order)
    assert made.engine == "onnxruntime" and "tensorrt is not installed" in made.fallback_reason


def test_an_open_question_is_the_error(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decides(monkeypatch, "clarify", question="Which mug?", options=("the red one", "the moss one"))
    with pytest.raises(CheckinError, match=r"^Which mug\? \(the red one / the moss one\): say it in the request, or "):
        generate(repository, "my mug", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_no_fitting_checkpoint_is_the_error(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decides(monkeypatch, "abstain")
    with pytest.raises(CheckinError, match=r"^no checkpoint fits this request; list them with 'personalq ls'"):
        generate(repository, "a cathedral", tmp_path / "a.png")


def test_unknown_names_are_refused(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="nearest: moss-mug"):
        generate(repository, "x", tmp_path / "a.png", Order("mos-mug"))
    with pytest.raises(EngineError, match="target: must be one of"):
        generate(repository, "x", tmp_path / "a.png", Order("moss-mug", "abacus"))
