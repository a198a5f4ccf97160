"""A language model judges through a real endpoint in a process of its own; what it says is never believed unread."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from personalq.cards.card import Card
from personalq.checkin import ask, judge_at
from personalq.checkin.ranking.judge import MAX_CANDIDATES, LlmJudge, _judgement
from personalq.errors import CheckinError
from personalq.repository import Repository

CARDS = [
    Card(id="biscuit", name="Biscuit", kind="lora", trigger=("sks",), class_noun="dog", description="A brown dog."),
    Card(id="domino", name="Domino", kind="lora", trigger=("zwx",), class_noun="dog", description="A spotted dog."),
    Card(id="mug", name="Moss", kind="lora", trigger=("ohwx",), class_noun="mug", description="A green mug."),
]
REQUEST = "the spotted dog"


@contextlib.contextmanager
def endpoint(mode: str) -> Iterator[str]:
    script = Path(__file__).with_name("llm_server.py")
    with subprocess.Popen([sys.executable, str(script), mode], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


def calls(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("mode", "formats"),
    [
        ("good", ["json_schema"]),
        ("no_schema", ["json_schema", "json_object"]),
        ("no_format", ["json_schema", "json_object", None]),
        ("second_try", ["json_schema", "json_schema"]),
        ("thinks", ["json_schema"]),
    ],
)
def test_a_judgement_comes_back_whatever_format_the_server_knows(mode: str, formats: list[str | None]) -> None:
    with endpoint(mode) as url:
        found = judge_at(url, "m")(REQUEST, CARDS)
        sent = calls(url)
    assert found is not None
    assert (found.scores, found.verdict) == ({0: 0, 1: 3, 2: 0}, "one")
    assert [body.get("response_format", {}).get("type") for body in sent] == formats


def test_thoughts_and_small_talk_around_the_json_are_cut_away() -> None:
    text = '<think>{"scores": []}</think> Sure: {"scores": [{"id": "c2", "score": 3}], "verdict": "one"} Done.'
    assert _judgement(text, {"c1": 0, "c2": 1}).scores == {1: 3}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("garbage", "an answer that is not the JSON asked for (no JSON object); the local scorer decided"),
        ("injected", "an answer that is not the JSON asked for (no known candidate is scored)"),
        ("broken", "out of memory"),
    ],
)
def test_what_is_not_a_judgement_of_these_candidates_is_refused_and_the_reason_logged(
    mode: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with endpoint(mode) as url, caplog.at_level(logging.WARNING):
        assert judge_at(url, "m")(REQUEST, CARDS) is None
        assert len(calls(url)) == (1 if mode == "broken" else 2)
    assert reason in caplog.text


def test_a_slow_server_is_left_at_the_deadline() -> None:
    with endpoint("slow") as url:
        started = time.monotonic()
        assert LlmJudge(url, "m", seconds=0.5)(REQUEST, CARDS) is None
        assert time.monotonic() - started < 3


def test_no_server_at_all_means_the_local_scorer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert LlmJudge("http://127.0.0.1:9/v1", "m", seconds=2)(REQUEST, CARDS) is None
    assert "the local scorer decided" in caplog.text


def test_the_model_sees_labels_and_short_facts_never_ids_or_the_order_of_retrieval() -> None:
    long = [CARDS[0].model_copy(update={"id": f"secret-{i}", "description": "x" * 4000}) for i in range(40)]
    with endpoint("good") as url:
        judge_at(url, "m")(REQUEST, long)
        (sent,) = calls(url)
    data = json.loads(sent["messages"][1]["content"])
    assert [row["id"] for row in data["candidates"]] == [f"c{n}" for n in range(1, MAX_CANDIDATES + 1)]
    assert "secret" not in json.dumps(sent) and len(json.dumps(sent)) < 20_000
    assert sent["max_tokens"] == 1024 and sent["temperature"] == 0


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository.open(tmp_path / "r", create=True)
    (tmp_path / "cards.jsonl").write_text("\n".join(json.dumps(card.to_json()) for card in CARDS))
    made.add_cards(tmp_path / "cards.jsonl")
    return made


def test_a_judgement_enters_the_posterior_and_settles_what_the_local_scorer_would_ask(repository: Repository) -> None:
    assert ask(repository, "my dog on the spotted rug").decision == "clarify"
    with endpoint("good") as url:
        decision = ask(repository, "my dog on the spotted rug", judge=judge_at(url, "m"))
    assert (decision.decision, decision.checkpoint, decision.judged_by) == ("select", "domino", "llm")


def test_a_verdict_of_none_makes_check_in_doubt_what_it_would_have_selected(repository: Repository) -> None:
    local = ask(repository, "a brown goblet")
    with endpoint("none") as url:
        judged = ask(repository, "a brown goblet", judge=judge_at(url, "m"))
    assert judged.decision == "abstain"
    assert judged.candidates[0].probability < local.candidates[0].probability


@pytest.mark.parametrize("mode", ["garbage", "injected", "broken"])
def test_a_useless_model_changes_nothing(repository: Repository, mode: str) -> None:
    local = ask(repository, "Domino in the city")
    with endpoint(mode) as url:
        judged = ask(repository, "Domino in the city", judge=judge_at(url, "m"))
    assert (judged.checkpoint, judged.candidates, judged.judged_by) == (local.checkpoint, local.candidates, "local")


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [("ftp://x", "m", "must be an http"), ("http://x/v1", "", "must name the model")],
)
def test_a_wrong_endpoint_is_one_line(url: str, model: str, message: str) -> None:
    with pytest.raises(CheckinError, match=message):
        judge_at(url, model)
