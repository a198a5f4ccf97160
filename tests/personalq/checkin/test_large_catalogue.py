"""What only large catalogues meet: tables instead of dicts, cards on disk, vectors composed from tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import personalq.checkin.indexing.build as build
from personalq.cards.card import Card, parse_card
from personalq.checkin import Checkin, ask, index
from personalq.checkin.encoder.composed import compose, token_rows
from personalq.checkin.encoder.minilm import END, START, shared_encoder
from personalq.checkin.indexing.build import build_index, card_text
from personalq.checkin.indexing.index import Index, load_index, save_index
from personalq.checkin.indexing.mapped import map_safetensors, write_safetensors
from personalq.checkin.indexing.stored import StoredCards, store_cards
from personalq.checkin.indexing.strings import Strings
from personalq.checkin.ranking.best import greatest
from personalq.repository import Repository

CATALOG = Path(__file__).parents[2] / "data" / "catalog_real.jsonl"


def some_cards(n: int) -> list[Card]:
    return [parse_card(line, where="catalog")[0] for line in CATALOG.read_text().splitlines()[:n]]


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=30), st.text(max_size=4))
def test_a_table_of_texts_answers_as_a_dict_does(texts: set[str], other: str) -> None:
    listed = sorted(texts)
    table = Strings(Strings.of(listed).arrays("x."), "x.")
    assert list(table) == listed and len(table) == len(listed)
    assert [table.get(text) for text in listed] == list(range(len(listed)))
    assert (other in table) == (other in texts)


def test_texts_of_one_checksum_are_told_apart() -> None:
    table = Strings.of(["plumless", "buckeroo"])  # their CRC-32 is the same
    assert len(set(table.arrays("")["hashes"].tolist())) == 1
    assert table["plumless"] == 0 and table["buckeroo"] == 1


@given(st.lists(st.integers(-3, 3), max_size=60), st.integers(1, 8))
def test_the_greatest_are_those_of_a_stable_sort(scores: list[int], n: int) -> None:
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]
    assert greatest(np.array(scores, np.float32), n).tolist() == expected


def test_stored_cards_are_the_cards(tmp_path: Path) -> None:
    cards = some_cards(20)
    stored = store_cards(iter(cards), tmp_path)
    expected = [card.model_copy(update={"provenance": {}}) for card in cards]
    assert list(stored) == expected and stored[-1] == expected[-1] and stored[2:4] == expected[2:4]
    with pytest.raises(IndexError):
        stored[20]
    (tmp_path / "cards.jsonl").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"must be as long as cards.npy says, got 2 bytes"):
        StoredCards(tmp_path)


def test_arrays_are_written_as_the_library_reads_them(tmp_path: Path) -> None:
    arrays = {
        "bytes": np.arange(7, dtype=np.uint8),
        "none": np.zeros(0, np.int32),
        "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "half": np.arange(5, dtype=np.float16),
    }
    write_safetensors(arrays, tmp_path / "x")
    for read in (load_file(tmp_path / "x"), map_safetensors(tmp_path / "x")):
        assert set(read) == set(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


def test_no_cards_can_be_stored(tmp_path: Path) -> None:
    assert list(store_cards([], tmp_path)) == []


@pytest.fixture(scope="module")
def composed() -> Index:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "EXACT", 50)
        return build_index(some_cards(120), shared_encoder(), digest="")


def test_composed_vectors_are_near_the_encoders(composed: Index) -> None:
    own = shared_encoder().encode([card_text(card) for card in some_cards(120)])
    assert composed.composer is not None
    vectors = composed.vectors.astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    assert (vectors * own).sum(1).mean() > 0.85


def test_the_map_holds_for_texts_that_it_was_not_fitted_on() -> None:
    texts, encoder = [card_text(card) for card in some_cards(400)], shared_encoder()
    known, held_out = token_rows(texts[1::2], encoder), token_rows(texts[::10], encoder)
    composer = compose(known, encoder, out=np.zeros((len(known), 384), np.float16))
    found = np.zeros((len(held_out), 384), np.float16)
    composer.fill(found, np.arange(len(held_out)), held_out, encoder)
    cosine = found.astype(np.float32) @ encoder.encode(texts[::10]).T
    assert np.diag(cosine).mean() > 0.75
    assert (cosine.argmax(1) == np.arange(len(held_out))).mean() > 0.8  # which card it is stays plain


def test_a_large_index_keeps_its_map_and_its_vectors_when_cards_are_added(
    composed: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "EXACT", 50)
    save_index(composed, tmp_path)
    old = load_index(tmp_path, digest=None)
    assert old is not None and old.composer is not None

    class Watched(type(shared_encoder())):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows: list[Sequence[int]] = []

        def __getattr__(self, name: str) -> object:
            return getattr(shared_encoder(), name)

        def encode_rows(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
            self.rows += rows
            return shared_encoder().encode_rows(rows)

    added = Card.model_validate({"id": "new", "name": "Zeppelin", "kind": "lora", "class_noun": "style"})
    watched = Watched()
    new = build_index([*some_cards(119), added], watched, digest="", old=old)
    np.testing.assert_array_equal(new.vectors[:119], composed.vectors[:119])
    assert new.composer is not None
    np.testing.assert_array_equal(new.composer.weights, composed.composer.weights)  # type: ignore[union-attr]
    assert watched.rows and all(row[0] == START and row[2:] == [END] for row in watched.rows)  # tokens, no whole text
    assert abs(float(np.linalg.norm(new.vectors[119].astype(np.float32))) - 1) < 2e-3


def test_a_large_catalogue_is_asked_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "EXACT", 50)
    lines = CATALOG.read_text().splitlines()[:60]
    (tmp_path / "cards.jsonl").write_text("\n".join(lines))
    repository = Repository.open(tmp_path / "r", create=True)
    repository.add_cards(tmp_path / "cards.jsonl")
    index(repository)
    checkin = Checkin(repository)
    assert checkin.index.composer is not None and isinstance(checkin.cards, StoredCards)
    for card in checkin.cards[:60:20]:
        decision = ask(repository, f"{card.name} {card.class_noun} on the beach")
        assert card.id in [candidate.id for candidate in decision.candidates]


def test_cards_are_read_one_by_one_in_the_order_of_all(tmp_path: Path) -> None:
    repository = Repository.open(tmp_path / "r", create=True)
    assert list(repository.each_card()) == []
    cards = [{"id": i, "kind": "lora", "name": n} for i, n in (("b", "Bee"), ("a", "Ant"), ("c", "Cat"))]
    listing = repository.root / "checkpoints" / "cards.jsonl"
    listing.write_text("\n".join([*map(json.dumps, cards), "broken", json.dumps({**cards[0], "name": "Bumble"})]))
    folder = repository.root / "checkpoints" / "c"
    folder.mkdir()
    (folder / "card.json").write_text(json.dumps({**cards[2], "name": "From its folder"}))
    assert [card.name for card in repository.each_card()] == ["Ant", "Bumble", "From its folder"]
    assert list(repository.each_card()) == repository.cards()


def test_of_very_many_phrases_the_most_used_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_MAX_PHRASES", 3)
    texts = [("dog", "red"), ("dog", "red"), ("cat", "blue"), ("cat", "odd one"), ("dog", "rare")]
    cards = [
        Card.model_validate({"id": f"c{i}", "kind": "lora", "class_noun": noun, "tags": [tag]})
        for i, (noun, tag) in enumerate(texts)
    ]
    found = build_index(cards, shared_encoder(), digest="")
    assert list(found.phrases) == ["cat", "dog", "red"]
    assert found.card_class.tolist() == [1, 1, 0, 0, 1]
    assert found.tag_start.tolist() == [0, 1, 2, 2, 2, 2] and found.tag_phrases.tolist() == [2, 2]
