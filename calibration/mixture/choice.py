"""Which checkpoints a base is calibrated over: those that can be attached to it, 16 that differ where there are more."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from personalq.cards.card import Card
from personalq.errors import PersonalQError, SpecError
from personalq.repository import Repository
from personalq.repository.results import Whole

from ..model.pipeline import opened
from .different import different

MOST = 16
MERGED = "dreambooth"  # a full fine-tune becomes an engine of its own
KIND_WEIGHT, NOUN_WEIGHT, WORD_WEIGHT = (
    2.0,
    3.0,
    1.0,
)  # how much kind, class noun and every other word count as a difference


@dataclass(frozen=True)
class Choice:
    """over: checkpoints in the order they are run. left_out: id -> why."""

    over: tuple[Whole, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def named(repository: Repository, base: Whole, ids: Sequence[str]) -> Choice:
    """The checkpoints of these ids, as many as there are. Raises RepositoryError or SpecError for one that cannot be used."""
    over = []
    for id_ in dict.fromkeys(ids):
        whole = Whole(repository.card(id_), repository.base_dir(repository.card(id_)), repository.checkpoint_dir(id_))
        if whole.base_dir != base.base_dir:
            raise SpecError(
                f"over: {id_!r} must be a checkpoint of base {base.card.id!r}, got one of {whole.card.base!r}; leave it out"
            )
        opened(whole)
        over.append(whole)
    return Choice(tuple(over))


def chosen(repository: Repository, base: Whole) -> Choice:
    """Every checkpoint of the base that can be attached, MOST of them at most; what is left out says why."""
    usable: dict[str, Whole] = {}
    left_out: dict[str, str] = {}
    for card in repository.cards():
        if card.base != base.card.id or not repository.has_weights(card.id):
            continue
        whole = Whole(card, base.base_dir, repository.checkpoint_dir(card.id))
        if card.kind == MERGED:
            left_out[card.id] = "a full fine-tune is merged, not attached; name it in --over to take it in"
            continue
        try:
            opened(whole)
        except PersonalQError as error:
            left_out[card.id] = str(error)
        else:
            usable[card.id] = whole
    kept = thinned([whole.card for whole in usable.values()], MOST)
    rest = f"{MOST} of {len(usable)} are enough, those that differ most; name it in --over to take it in"
    left_out |= {id_: rest for id_ in usable if id_ not in kept}
    return Choice(tuple(usable[id_] for id_ in kept), left_out)


def thinned(cards: Sequence[Card], most: int) -> list[str]:
    """Ids of `most` cards that differ, sorted."""
    return sorted(different({card.id: _words(card) for card in sorted(cards, key=lambda card: card.id)}, most))


def _words(card: Card) -> dict[str, float]:
    """What the card says of its subject, and how much each counts."""
    others = {word.lower() for text in (*card.trigger, *card.tags) for word in text.split()}
    return {
        **{f"word {word}": WORD_WEIGHT for word in others},
        f"kind {card.kind}": KIND_WEIGHT,
        f"noun {card.class_noun.lower()}": NOUN_WEIGHT,
    }
