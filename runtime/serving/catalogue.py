"""What the repository holds, for GET /v1/models and the page: cards, whether each can be drawn, example pictures."""

from pathlib import Path
from typing import Any

from personalq.cards.card import Card

from .api import ApiError, Json
from .images import Service, find_card

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_LARGEST_PICTURE = 8 << 20


def models(service: Service) -> list[Json]:
    """Every checkpoint that has a card, in OpenAI's shape with what the page needs under 'personalq'."""
    drawable = service.store.drawable()
    return [_row(service, card, drawable) for card in service.repository.cards()]


def model_row(service: Service, card_id: str) -> Json:
    """One checkpoint. Raises ApiError for an unknown id."""
    return _row(service, find_card(service.repository, card_id), service.store.drawable())


def sheet(service: Service, card_id: str) -> Path:
    """The first picture in the checkpoint's folder, by name. Raises ApiError when there is none."""
    found = _picture(service, find_card(service.repository, card_id))
    if found is None:
        raise ApiError(404, "no_picture", f"{card_id[:80]!r}: came without an example picture", param="model")
    return found


def _row(service: Service, card: Card, drawable: dict[str, bool]) -> Json:
    told: dict[str, Any] = card.model_dump(
        mode="json", include={"name", "kind", "base", "trigger", "class_noun", "description", "tags", "example_prompts"}
    )
    told |= {"is_drawable": card.id in drawable, "has_reference": drawable.get(card.id, False)}
    told["has_sheet"] = _picture(service, card) is not None
    return {"id": card.id, "object": "model", "created": 0, "owned_by": "personalq", "personalq": told}


def _picture(service: Service, card: Card) -> Path | None:
    """A file that really is inside the checkpoint's folder; links are not followed."""
    if not service.repository.has_weights(card.id):
        return None
    folder = service.repository.checkpoint_dir(card.id)
    for file in sorted(folder.iterdir()):
        is_picture = file.suffix.lower() in _PICTURES and file.is_file() and not file.is_symlink()
        if is_picture and file.stat().st_size <= _LARGEST_PICTURE:
            return file
    return None
