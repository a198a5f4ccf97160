"""Cards that were written to win are listed, and win nothing they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

from bench.hostile import hostile_cards
from personalq.checkin import Checkin
from personalq.repository import Repository

DATA = Path(__file__).parents[1] / "data"


def test_hostile_cards_are_never_selected_and_never_offered(tmp_path: Path) -> None:
    repository = Repository.open(tmp_path / "r", create=True)
    lines = (DATA / "catalog_real.jsonl").read_text().splitlines()[:120]
    (tmp_path / "cards.jsonl").write_text("\n".join([*lines, *map(json.dumps, hostile_cards())]))
    assert len(repository.add_cards(tmp_path / "cards.jsonl").added) == 140
    checkin = Checkin(repository)
    for text in (DATA / "requests_dev.jsonl").read_text().splitlines()[::10]:
        decision = checkin.ask(json.loads(text)["request"])
        assert not (decision.checkpoint or "").startswith("hostile"), text
        assert not any("winner" in option for option in decision.options), text
