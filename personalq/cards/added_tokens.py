"""A card's triggers beside what its files add to the tokenizer: a token the files do not add can never be drawn with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import RepositoryError
from .card import Card

_ADDED = re.compile(r"<[^<>\s]+>")  # how trainers spell tokens that they add
_END = "</w>"  # CLIP's mark of a word's end


def with_tokens(card: Card, added: Sequence[str], vocabulary: frozenset[str]) -> tuple[Card, tuple[str, ...]]:
    """The card with the tokens that its files add as triggers, and a warning when it said otherwise.

    vocabulary: the entries of the tokenizer, empty when the base is not here. Raises RepositoryError for a trigger that is
    spelled as an added token when no file adds one and the tokenizer does not know it.
    """
    unknown = [token for trigger in card.trigger for token in _ADDED.findall(trigger) if token not in vocabulary]
    if unknown and vocabulary and not added:
        raise RepositoryError(
            f"checkpoint {card.id!r}: trigger {unknown[0]!r} must be a token that its files add, got none that they add; "
            "add it with the embedding's file, or correct the card's trigger"
        )
    if not added or any(token in trigger for trigger in card.trigger for token in added):
        return card, ()
    is_pivotal = card.kind == "lora" and all(map(_ADDED.fullmatch, added))
    if card.kind == "lora" and not is_pivotal:  # embeddings beside words that the LoRA was trained on
        return card.model_copy(update={"trigger": (*added, *card.trigger)}), ()
    tokens = ("".join(added),) if is_pivotal else tuple(added)
    if not card.trigger:
        return card.model_copy(update={"trigger": tokens}), ()
    said, found = ", ".join(map(repr, card.trigger)), ", ".join(map(repr, added))
    warning = f"trigger: the card says {said}, its files add {found}: what they add is the trigger"
    return card.model_copy(update={"trigger": tokens}), (warning,)


def split_words(card: Card, added: Sequence[str], vocabulary: frozenset[str]) -> tuple[str, ...]:
    """Warn of a trigger of one word that the base's tokenizer splits. vocabulary: the tokenizer's entries, none if unknown."""
    split = [
        trigger
        for trigger in card.trigger
        if vocabulary and trigger.isalnum() and trigger not in added and f"{trigger.lower()}{_END}" not in vocabulary
    ]
    return tuple(
        f"trigger {trigger!r} is several tokens to the base's tokenizer: all of them are kept" for trigger in split
    )
