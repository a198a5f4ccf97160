"""Cards that were written to win are listed, and win nothing they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.hostile import hostile_cards
from personalq.checkin import Checkin
from personalq.repository import Repository

DATA = Path(__file__).parents[2] / "data"


def open_checkin(folder: Path, hostile: list[dict[str, Any]]) -> Checkin:
    """Check-in over a part of the real catalogue, and some more cards."""
    repository = Repository.open(folder / "r", create=True)
    lines = (DATA / "catalog_real.jsonl").read_text().splitlines()[:120]
    (folder / "cards.jsonl").write_text("\n".join([*lines, *map(json.dumps, hostile)]))
    assert len(repository.add_cards(folder / "cards.jsonl").added) == 120 + len(hostile)
    return Checkin(repository)


def test_hostile_cards_change_no_decision_and_are_never_offered(tmp_path: Path) -> None:
    """A part of what `python -m bench.hostile` compares: there it is all requests over all cards."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before, after = open_checkin(tmp_path / "a", []), open_checkin(tmp_path / "b", hostile_cards())
    for text in (DATA / "requests_dev.jsonl").read_text().splitlines()[::10]:
        request = json.loads(text)["request"]
        was, is_ = before.ask(request), after.ask(request)
        assert (was.decision, was.checkpoint, was.options) == (is_.decision, is_.checkpoint, is_.options), request
        assert not any("winner" in option for option in is_.options), request
