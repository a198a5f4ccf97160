"""The requests that Check-in is fitted and measured on, and the evidence that Check-in gathers for them.

Catalogues: the real one (tests/data, 400 public checkpoints), the shipped gallery, and ``atelier`` (44 made-up cards of
other classes). Requests: the dev set (measured on, by folds) and bench/requests/*.tsv, hand-written for the fit: a
request, a tab, and the ids of every card that it may mean; none means that nothing fits, several that one must ask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personalq.cards.card import Card, parse_card
from personalq.checkin.encoder.minilm import Encoder, shared_encoder
from personalq.checkin.indexing.build import build_index
from personalq.checkin.indexing.index import Index
from personalq.checkin.language.intent import parse_request
from personalq.checkin.language.words import terms
from personalq.checkin.ranking.features import Evidence, gather

DATA, REQUESTS, GALLERY = Path("tests/data"), Path("bench/requests"), Path("gallery/repository/checkpoints")
PER_SUB = 12


class CachingEncoder(Encoder):
    """The shipped encoder, remembering what it has seen: sub-catalogues repeat their texts."""

    def __init__(self) -> None:
        self.inner, self.seen = shared_encoder(), dict[str, NDArray[np.float32]]()

    def is_word(self, word: str) -> bool:
        return self.inner.is_word(word)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = [t for t in dict.fromkeys(texts) if t not in self.seen]
        self.seen |= dict(zip(new, self.inner.encode(new), strict=True)) if new else {}
        return np.stack([self.seen[t] for t in texts]) if texts else np.zeros((0, 384), np.float32)

    encode_remembering = encode


@dataclass(frozen=True)
class Request:
    """What was said, every card that it may mean, and which dev request it is (-1: written or made for the fit)."""

    text: str
    gold: frozenset[str]
    dev: int = -1


@dataclass(frozen=True)
class Example:
    """One request over one catalogue: its evidence, which candidates are right, and what should be decided."""

    request: Request
    evidence: Evidence
    ids: list[str]
    right: NDArray[np.float64]
    wanted: str
    is_whole: bool


def read_data() -> tuple[list[Card], list[dict[str, Any]]]:
    """Read the real catalogue and the dev requests."""
    cards = [parse_card(line, where="catalog")[0] for line in (DATA / "catalog_real.jsonl").read_text().splitlines()]
    requests = [json.loads(line) for line in (DATA / "requests_dev.jsonl").read_text().splitlines()]
    return cards, requests


def catalogues() -> dict[str, tuple[list[Card], list[Request]]]:
    """Return every catalogue with the requests for it."""
    cards, dev = read_data()
    gallery = [parse_card(path.read_text(), where=str(path))[0] for path in sorted(GALLERY.glob("*/card.json"))]
    keys = ("id", "name", "kind", "base_model", "trigger", "class_noun", "description", "tags")
    rows = [dict(zip(keys, line.split("\t"), strict=True)) for line in _lines("atelier.cards")]
    atelier = [
        parse_card(
            json.dumps({**row, "tags": row["tags"].split(","), "trigger": [t for t in [row["trigger"]] if t]}),
            where="atelier",
        )[0]
        for row in rows
    ]
    asked = [Request(r["request"], frozenset(r["gold"]), i) for i, r in enumerate(dev)]
    return {
        "real": (cards, [*asked, *_requests("real", cards)]),
        "gallery": (gallery, _requests("gallery", gallery)),
        "atelier": (atelier, _requests("atelier", atelier)),
    }


def _lines(name: str) -> list[str]:
    return (REQUESTS / f"{name}.tsv").read_text(encoding="utf-8").splitlines()


def _requests(name: str, cards: list[Card]) -> list[Request]:
    found = []
    for line in _lines(name):
        text, gold = line.split("\t")
        ids = frozenset(filter(None, gold.split(",")))
        if ids - {card.id for card in cards}:
            raise ValueError(f"{name}.tsv: {text!r} names {sorted(ids - {c.id for c in cards})}, not in the catalogue")
        found.append(Request(text, ids))
    return found


def make_examples(n_subs: int, n_made: int, *, seed: int = 0, encoder: Encoder | None = None) -> list[Example]:
    """Gather evidence for every request over its whole catalogue and over random parts of it.

    A request whose right cards were all left out of a part is one that nothing fits; one of whose several right cards
    only one was kept is no longer open. So the fit sees many refusals, and catalogues of 8 to 400 cards.
    """
    encoder, rng = encoder or CachingEncoder(), np.random.default_rng(seed)
    found: list[Example] = []
    shares = {"real": 0.7, "gallery": 0.1, "atelier": 0.2}
    for name, (cards, requests) in catalogues().items():
        index = build_index(cards, encoder, digest="")
        found += [example(r, cards, index, encoder, is_whole=True) for r in requests]
        made = _made_requests(cards, requests, int(n_made * shares[name]), rng)
        for _ in range(max(int(n_subs * shares[name]), 1)):
            some = [requests[i] for i in rng.choice(len(requests), min(PER_SUB, len(requests)), replace=False)]
            some += [made[i] for i in rng.choice(len(made), min(4, len(made)), replace=False)]
            part = _part(cards, some, rng)
            index = build_index(part, encoder, digest="")
            found += [example(r, part, index, encoder, is_whole=False) for r in some]
    return found


def _part(cards: list[Card], requests: list[Request], rng: np.random.Generator) -> list[Card]:
    """Draw a part of a catalogue that keeps none, one, or a few of each request's right cards."""
    size = min(int(rng.choice([12, 25, 60, 150, 300])), int(0.8 * len(cards)))
    keep = {cards[i].id for i in rng.choice(len(cards), size, replace=False)}
    for request in requests:
        right = sorted(request.gold)
        if not right:
            continue
        draw = rng.random()
        n = 0 if draw < 0.25 else 1 if draw < 0.55 else int(rng.integers(1, min(len(right), 6) + 1))
        keep = (keep - set(right)) | set(rng.choice(right, n, replace=False).tolist())
    return [card for card in cards if card.id in keep]


def _made_requests(cards: list[Card], requests: list[Request], n: int, rng: np.random.Generator) -> list[Request]:
    """Make requests from cards: 'my <noun> <scene>', 'the <tag> <noun> <scene>'; their words say who is right."""
    scenes = [s for r in requests if r.text.isascii() and (s := parse_request(r.text).scene)]
    facets = [frozenset(terms(f"{c.name} {c.class_noun} {' '.join(c.tags)}")) for c in cards]
    found = []
    for _ in range(n):
        text, needed = _made_request(cards[int(rng.integers(len(cards)))], str(rng.choice(scenes)), rng)
        found.append(Request(text, frozenset(c.id for c, facet in zip(cards, facets, strict=True) if needed <= facet)))
    return found


def _made_request(card: Card, scene: str, rng: np.random.Generator) -> tuple[str, frozenset[str]]:
    noun = card.class_noun if card.class_noun not in ("", "style") else card.name.replace("_", " ")
    if card.class_noun == "style":
        return str(rng.choice([f"{scene} in {noun} style", f"{noun} style, {scene}"])), frozenset(terms(noun))
    tags = [tag for tag in card.tags if not set(terms(tag)) & set(terms(noun)) and len(tag) < 20]
    tag = str(rng.choice(tags)) if tags and rng.random() < 0.5 else ""
    start = str(rng.choice(["my", "the", "a photo of my", "a", "put the", "draw my"]))
    return f"{start} {tag} {noun} {scene}".replace("  ", " "), frozenset(terms(f"{tag} {noun}"))


def example(request: Request, cards: list[Card], index: Index, encoder: Encoder, *, is_whole: bool) -> Example:
    """Gather the evidence for one request over one catalogue."""
    evidence = gather(request.text, cards, index, encoder)
    ids = [cards[p].id for p in evidence.places]
    gold = request.gold & {card.id for card in cards}
    wanted = "abstain" if not gold else "clarify" if len(gold) > 1 else "select"
    return Example(request, evidence, ids, np.array([i in gold for i in ids], float), wanted, is_whole)
