"""Catalogues as people have them: every layout of JSON, and odd rows that cost nobody else anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import cli
from personalq.cards.catalogues import Listed, read_cards
from personalq.errors import CardError
from tests.personalq.cards.test_catalogues import CIVITAI

ONE = {**CIVITAI, "modelVersions": [{"id": 5, "name": "v1", "baseModel": "SD 1.5", "trainedWords": ["kanbe owl"]}]}


def own(card_id: str, **fields: Any) -> str:
    return json.dumps({"id": card_id, "kind": "lora", "trigger": ["sks"], **fields})


def model(number: int) -> str:
    return json.dumps({**ONE, "id": number})


def read(tmp_path: Path, text: str | bytes) -> tuple[list[Listed], list[str]]:
    """The cards, and the reasons of what was left out, without the folder."""
    file = tmp_path / "list.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    found = list(read_cards(file))
    cards = [one for one in found if not isinstance(one, CardError)]
    return cards, [str(one).replace(f"{tmp_path}/", "") for one in found if isinstance(one, CardError)]


def ids(tmp_path: Path, text: str | bytes) -> list[str]:
    cards, refused = read(tmp_path, text)
    assert refused == []
    return [one.card.id for one in cards]


LAYOUTS = {
    "one model": model(1),
    "one model over several lines": json.dumps(json.loads(model(1)), indent=2),
    "an array": f"[{model(1)}, {model(2)}]",
    "an answer of Civitai": json.dumps({"items": [json.loads(model(1)), json.loads(model(2))], "metadata": {}}),
    "a model a line": f"{model(1)}\n{model(2)}\n",
    "a page a line": f'{{"items": [{model(1)}]}}\n{{"items": [{model(2)}]}}',
    "a list a line": f"[{model(1)}]\n[{model(2)}]",
    "Windows lines, blank ones and a mark": f"\ufeff{model(1)}\r\n\r\n  \r\n{model(2)}\r\n",
    "UTF-16": f"{model(1)}\n{model(2)}".encode("utf-16"),
    "objects over several lines, one after another": "\n".join(
        json.dumps(json.loads(model(n)), indent=1) for n in (1, 2)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_civitai_models_are_read_in_every_layout(tmp_path: Path, layout: str) -> None:
    found = ids(tmp_path, LAYOUTS[layout])
    assert found == ["civitai-1-5", "civitai-2-5"][: 1 if layout.startswith("one") else 2]


def test_own_cards_and_civitai_models_may_share_a_file(tmp_path: Path) -> None:
    assert ids(tmp_path, f"{own('a')}\n{model(1)}\n{own('b')}") == ["a", "civitai-1-5", "b"]
    assert ids(tmp_path, json.dumps(json.loads(own("a")), indent=2)) == ["a"]


ODD = [
    ("{bad}", "must be JSON, got text that does not parse (Expecting property name"),
    (own("x")[:25], "must be JSON, got text that does not parse"),
    ("5", "must be a JSON object with an id and a kind, got int; fix the file"),
    ("null", "must be a JSON object with an id and a kind, got NoneType; fix the file"),
    ("[]", "must hold a JSON object, got an empty list; fix the file"),
    ("[" * 100_000, "must be JSON, got text that does not parse (maximum recursion depth"),
    ('{"id": NaN, "kind": "lora"}', "id must be text, got float; fix the card"),
    ('{"id": ["a"], "kind": "lora"}', "id must be text, got list; fix the card"),
    ('{"id": true, "kind": "lora"}', "id must be text, got bool; fix the card"),
    ('{"id": "a/../b", "kind": "lora"}', "id 'a/../b': must be a plain name"),
    (own("x", kind="gan"), "kind must be one of dreambooth, lora, textual_inversion, custom_diffusion, got 'gan'"),
    (own("x", description="x" * 5_000_000), "must be at most 4 MB of JSON, got 4.8 MB; shorten it"),
    ('{"id": 7, "modelVersions": []}', "must have a version, got none in modelVersions; fix the file"),
    ('{"id": 7, "modelVersions": [3]}', "version 1 must be a JSON object, got int; fix the file"),
    ('{"modelVersions": [{"id": 3}]}', "must have the ids of its model and its version, got none and 3; fix the file"),
    ('{"trigger_word": "x"}', "must have a repo or a title, got neither; fix the file"),
]


@pytest.mark.parametrize(("line", "reason"), ODD, ids=[reason[:40] for _, reason in ODD])
def test_an_odd_line_is_refused_by_its_number_and_the_others_are_taken(tmp_path: Path, line: str, reason: str) -> None:
    cards, refused = read(tmp_path, f"{own('a')}\n{line}\n{own('b')}\n")
    assert [one.card.id for one in cards] == ["a", "b"]
    assert len(refused) == 1 and refused[0].startswith(f"list.json:2: {reason}") and "\n" not in refused[0]


def test_an_odd_item_of_a_list_is_refused_by_its_place(tmp_path: Path) -> None:
    cards, refused = read(tmp_path, f'[{own("a")}, 5, [[["x"]]], {own("b")}]')
    assert [one.card.id for one in cards] == ["a", "b"]
    assert refused == [
        "list.json:2: must be a JSON object, got int; fix the file",
        "list.json:3: must be a JSON object, got list; fix the file",
    ]
    _, refused = read(tmp_path, f'{own("a")}\n{{"items": [{model(1)}, "x"]}}')
    assert refused == ["list.json:2, item 2: must be a JSON object, got str; fix the file"]


@pytest.mark.parametrize("opening", ["[", '{"items": ['], ids=["array", "items"])
def test_a_list_that_was_cut_off_gives_what_is_whole_and_says_where_it_ends(tmp_path: Path, opening: str) -> None:
    cards, refused = read(tmp_path, f"{opening}{model(1)}, {model(2)}, {model(3)[:60]}")
    assert [one.card.id for one in cards] == ["civitai-1-5", "civitai-2-5"]
    assert len(refused) == 1 and refused[0].startswith("list.json:3: must be JSON, got an item that does not parse")
    assert refused[0].endswith("; what follows was not read; fix the file")
    cards, refused = read(tmp_path, f"{opening}{model(1)}, {model(2)},")
    assert len(cards) == 2
    assert refused == [
        "list.json: must end as JSON ends after item 2, got the end of the file: it was cut off; fetch it again"
    ]


def test_text_after_a_list_is_not_passed_over(tmp_path: Path) -> None:
    cards, refused = read(tmp_path, f"[{model(1)}] and more")
    assert len(cards) == 1
    assert refused == [
        "list.json: must end as JSON ends after item 1, got text that does not parse ('] and more'); fetch it again"
    ]


def test_a_broken_item_on_a_line_of_its_own_costs_no_other(tmp_path: Path) -> None:
    cards, refused = read(tmp_path, f"[\n  {model(1)},\n  {{bad}},\n  {model(3)}\n]\n")
    assert [one.card.id for one in cards] == ["civitai-1-5", "civitai-3-5"]
    assert len(refused) == 1 and refused[0].startswith("list.json:2: must be JSON, got an item that does not parse")


def test_a_file_that_is_no_json_at_all_is_one_refusal(tmp_path: Path) -> None:
    cards, refused = read(tmp_path, "hello\nworld\n" * 100)
    assert cards == [] and len(refused) == 1
    assert refused[0].startswith("list.json: must be JSON, or one JSON object a line, got text that does not parse")


def test_numbers_count_as_text_and_what_is_no_text_is_said(tmp_path: Path) -> None:
    line = '{"id": 5, "kind": "lora", "name": 7, "trigger": [1990, true, ["x"]], "description": {"a": 1}, "tags": NaN}'
    (one,), _ = read(tmp_path, line)
    assert (one.card.id, one.card.name, one.card.trigger) == ("5", "7", ("1990",))
    assert one.warnings == (
        "trigger must be text, got bool, list: left out",
        "description must be text, got dict: left out",
        "tags must be text, got float: left out",
    )


def test_a_list_beyond_the_limit_is_cut_and_said(tmp_path: Path) -> None:
    (one,), _ = read(tmp_path, own("a", tags=[f"t{i}" for i in range(70)]))
    assert len(one.card.tags) == 64 and one.warnings == ("tags cut to 64 of 70 entries",)


def test_an_enormous_field_of_a_civitai_model_is_cut(tmp_path: Path) -> None:
    (one,), _ = read(tmp_path, json.dumps({**ONE, "description": "<p>owl " * 1_000_000}))
    assert one.card.id == "civitai-77-5" and one.card.description.startswith("owl owl")


def test_the_last_of_two_rows_with_one_id_holds_and_both_places_are_named(tmp_path: Path) -> None:
    (first, _, last), _ = read(tmp_path, f"{own('a')}\n{own('b')}\n{own('a', name='second')}")
    file = tmp_path / "list.json"
    assert first.warnings == ()
    assert last.warnings == (f"id 'a' is listed twice: {file}:3 replaces {file}:1",)


def test_adult_models_stay_out_of_a_file_of_lines_too(tmp_path: Path) -> None:
    adult = json.dumps({**ONE, "nsfw": True})
    cards, refused = read(tmp_path, f"{model(1)}\n{adult}")
    assert len(cards) == 1
    assert refused == ["list.json:2: left out, it is adult content (nsfw); take it in with --adult"]


def test_adding_a_catalogue_with_odd_rows_takes_the_others_and_exits_with_1(tmp_path: Path) -> None:
    file = tmp_path / "models.jsonl"
    file.write_text(f"{model(1)}\n{model(2)[:70]}\n{own('c')}\n")
    ran = CliRunner().invoke(cli, ["--repo", str(tmp_path / "repo"), "add", "--cards", str(file), "--json"])
    data = json.loads(ran.stdout)
    assert ran.exit_code == 1
    assert [one["id"] for one in data["added"]] == ["civitai-1-5", "c"]
    assert [one["source"] for one in data["refused"]] == [f"{file}:2"]
