"""What several cards have in common and should not, or only with a word about it: a trigger, or an id in one catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .card import Card


def owners_of(cards: Iterable[Card]) -> dict[str, list[str]]:
    """Return the ids that use each trigger, lower-cased."""
    found: dict[str, list[str]] = {}
    for card in cards:
        for trigger in dict.fromkeys(t.lower() for t in card.trigger):
            found.setdefault(trigger, []).append(card.id)
    return found


def shared_triggers(card: Card, owners: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Return a warning when other checkpoints have the same trigger: it is unique only inside one checkpoint."""
    others = [i for t in card.trigger for i in owners.get(t.lower(), ()) if i != card.id]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    text = f"trigger shared with {', '.join(others[:3])}{more}: Check-in will tell them apart by their cards"
    return (text,) if others else ()


def repeated_id(card_id: str, where: str, seen: dict[str, str]) -> tuple[str, ...]:
    """Return a warning when a catalogue gave this id before; the last one holds. ``seen``: id -> where, kept up to date."""
    before, seen[card_id] = seen.get(card_id), where
    return (f"id {card_id!r} is listed twice: {where} replaces {before}",) if before else ()
