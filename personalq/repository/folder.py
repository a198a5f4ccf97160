"""A folder of checkpoints: cards, weights, bundles (layout: docs/check-in.md). Knows files, not what is in the weights.

Everything is published by rename, so a reader never meets half a checkpoint and a killed writer leaves only ``.tmp-*``.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from ..cards.added_tokens import split_words, with_tokens
from ..cards.card import Card, dump_card, folder_name, id_from_folder
from ..cards.catalogues import read_cards
from ..cards.collisions import owners_of, shared_triggers
from ..cards.importers import Source, check_pipeline, list_files, plain_id, read_source
from ..cards.sources import checkpoints_in
from ..errors import CardError, PersonalQError, RepositoryError
from ..weights.checkpoint import check_fit
from ..weights.deltas.kinds import added_tokens
from ..weights.header import read_header
from ..weights.models import read_vocabulary
from . import audit
from .atomic import atomic_directory, named_failure, remove, temporary_beside, write_atomic
from .bundles import Exports, base_engines, exports_by_id, read_bundles
from .intake import copy_files, place_files
from .listing import card_at, listed_cards
from .new_base import write_base
from .results import Added, AddedBase, AddResult, Entry, Refused, Report, Whole, silent
from .settings import read_settings
from .sharing import forget_dangling

SHIPPED = Path(__file__).resolve().parents[2] / "gallery" / "repository"
CARDS = "cards.jsonl"
RECORD = "added.json"


class Repository:
    """A repository folder. Methods raise RepositoryError or CardError with one line."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._cards: tuple[object, dict[str, Card]] | None = None
        self._digest: tuple[object, str] | None = None

    @classmethod
    def open(cls, path: Path | str | None = None, *, create: bool = False) -> Repository:
        """Open ``path``, else $PERSONALQ_REPO, else the shipped gallery; ``create`` makes a missing folder."""
        chosen = Path(path or os.environ.get("PERSONALQ_REPO") or SHIPPED)
        if create and not chosen.exists():
            with named_failure(chosen):
                (chosen / "checkpoints").mkdir(parents=True)
        if not chosen.is_dir():
            raise RepositoryError(
                f"{chosen}: must be a repository folder, got nothing there; make one with 'personalq --repo {chosen} add SOURCE'"
            )
        return cls(chosen.resolve())

    # what is in it

    def cards(self) -> list[Card]:
        """Return every readable card, sorted by id; broken ones are left to ``check``."""
        stamp = audit.stamp(self.root / "checkpoints", CARDS)
        if self._cards is None or self._cards[0] != stamp:
            cards = {card.id: card for card in self._listed_cards()}
            cards |= {card.id: card for _, card in self._folder_cards()}
            self._cards = (stamp, dict(sorted(cards.items())))
        return list(self._cards[1].values())

    def each_card(self) -> Iterator[Card]:
        """Yield the cards of ``cards`` one by one without keeping them: for catalogues that memory does not hold."""
        listing = self.root / "checkpoints" / CARDS
        listed = {card.id: offset for offset, card in listed_cards(listing)}
        in_folders = {card.id: folder for folder, card in self._folder_cards()}
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(listing.open("rb")) if listed else None
            for card_id in sorted(listed.keys() | in_folders):
                if file is None or card_id in in_folders:
                    card = audit.folder_card(in_folders[card_id])
                    yield from [card] if isinstance(card, Card) else []
                else:
                    yield from card_at(file, listed[card_id])

    def card(self, card_id: str) -> Card:
        """Return one card; an unknown id is an error that names the nearest ones."""
        self.cards()
        assert self._cards is not None
        known = self._cards[1]
        if card_id not in known:
            near = difflib.get_close_matches(card_id, known, n=3, cutoff=0.5)
            hint = f"nearest: {', '.join(near)}" if near else f"{len(known)} known, list them with 'personalq ls'"
            raise RepositoryError(
                f"checkpoint {card_id[:80]!r}: must be an id in {self.root}, got an unknown one; {hint}"
            )
        return known[card_id]

    def checkpoint_dir(self, card_id: str) -> Path:
        """Return the folder of a checkpoint with weights; raises for an unknown id or a card without weights."""
        card = self.card(card_id)
        if not self.has_weights(card.id):
            raise RepositoryError(
                f"checkpoint {card.id!r}: must have weights, got a card only; add its folder with 'personalq add'"
            )
        return self._folder(card.id)

    def has_weights(self, card_id: str) -> bool:
        """Tell whether a checkpoint has safetensors weights here."""
        folder = self._folder(card_id)
        return folder.is_dir() and next(folder.rglob("*.safetensors"), None) is not None

    def base_dir(self, card: Card) -> Path:
        """Return the diffusers folder a checkpoint builds on: its named base, or itself when it is complete."""
        if card.base and (folder := self._base_folder(card.base)).is_dir():
            return folder
        own = self._folder(card.id)
        if (own / "model_index.json").is_file() and (own / "vae").is_dir():
            return own
        here = ", ".join(self.bases()) or "none"
        wanted = repr(card.base) if card.base else "no base on its card"
        raise RepositoryError(
            f"checkpoint {card.id!r}: base must be one in this repository ({here}), got {wanted}; "
            "add it with 'personalq add --base'"
        )

    def whole(self, id_: str) -> Whole:
        """A checkpoint over its base, or a base as it is: what can be calibrated and exported.

        A checkpoint comes before a base of the same id. Raises RepositoryError for an unknown id, and for a card without weights.
        """
        if id_ in self.bases() and not self.has_weights(id_):
            return Whole(Card(id=id_, name=id_, kind="dreambooth", base=id_), self._base_folder(id_))
        card, own = self.card(id_), self.checkpoint_dir(id_)
        return Whole(card, self.base_dir(card), own)

    def bases(self) -> list[str]:
        """Return the ids of the base pipelines here."""
        return sorted(id_from_folder(p.name) for p in audit.folders(self.root / "bases"))

    def bundles(self, card_id: str) -> list[Path]:
        """Return the bundle folders made from a checkpoint, attached or merged, newest last."""
        return [one.folder for one in self.exports(card_id).bundles]

    def exports(self, card_id: str) -> Exports:
        """Return what a checkpoint was exported to."""
        return exports_by_id(self.root).get(card_id, Exports())

    def base_engines(self, base_sha256: str) -> list[Path]:
        """Return the bundles that adapters of a base's weights are attached to, best last."""
        return base_engines(read_bundles(self.root), base_sha256)

    def entries(self) -> list[Entry]:
        """Return one ``ls`` line per card."""
        exports = exports_by_id(self.root)
        with_folder = {id_from_folder(p.name) for p in audit.folders(self.root / "checkpoints")}
        return [
            Entry(c, c.id in with_folder and self.has_weights(c.id), exports.get(c.id, Exports())) for c in self.cards()
        ]

    def digest(self) -> str:
        """Return the sha256 over the bytes of all cards: the index is stale when it changes.

        The files are read again only when their sizes or times changed.
        """
        place = self.root / "checkpoints"
        stamp = audit.stamp(place, CARDS)
        if self._digest is not None and self._digest[0] == stamp:
            return self._digest[1]
        digest = hashlib.sha256()
        for file in audit.card_files(place, CARDS):
            digest.update(f"{file.relative_to(place)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                while part := opened.read(1 << 20):
                    digest.update(part)
        self._digest = (stamp, digest.hexdigest())
        return self._digest[1]

    # changing it

    def add(
        self, source: Path, *, base: str = "", card_id: str = "", replace: bool = False, adult: bool = False
    ) -> AddResult:
        """Take in one checkpoint folder or file; a source that cannot be taken is in ``refused`` with one line."""
        try:
            read = read_source(source, base=base, card_id=card_id, adult=adult)
            read, notes = self._fitted(read)
            warnings = read.warnings + notes + shared_triggers(read.card, owners_of(self.cards()))
            self._publish(read, replace=replace)
        except (PersonalQError, OSError) as error:
            return AddResult(refused=(Refused(str(source), _one_line(error)),))
        return AddResult(added=(_added(read.card, warnings),))

    def add_all(self, source: Path, report: Report = silent, **options: Any) -> AddResult:
        """Take in every checkpoint that a file or folder holds, see ``add``; report(text, fraction) as it goes on."""
        result = AddResult()
        try:
            # a folder that the repository itself lies in: what is in there already is not taken in again
            parts = [
                part for part in checkpoints_in(source) if part == source or self.root not in part.resolve().parents
            ]
        except OSError as error:
            return AddResult(refused=(Refused(str(source), _one_line(error)),))
        if options.get("card_id") and len(parts) > 1:
            reason = f"{source}: must be one checkpoint to take an id, got {len(parts)}; add them without --id"
            return AddResult(refused=(Refused(str(source), reason),))
        for number, part in enumerate(parts):
            report(f"adding {part.name}", number / len(parts))
            result += self.add(part, **options)
        return result

    def add_base(self, source: Path, *, base_id: str = "") -> AddedBase:
        """Take in a base pipeline, a diffusers folder or one file, as bases/<id>. Raises RepositoryError."""
        files, warnings = list_files(source)
        if source.is_file():
            name = base_id or plain_id(source)
            with atomic_directory(self._base_folder(name)) as folder:
                return AddedBase(name, write_base(source, folder))
        name = base_id or source.resolve().name
        if not (source / "model_index.json").is_file():
            raise RepositoryError(
                f"{source}: must be a diffusers pipeline folder, got no model_index.json; a delta is added without add_base"
            )
        check_pipeline(source, [name for name, file in files if name.endswith(".safetensors") and read_header(file)])
        read_settings(source)
        with atomic_directory(self._base_folder(name)) as folder:
            copy_files(files, folder)
        return AddedBase(name, tuple(warnings))

    def add_cards(self, file: Path, *, adult: bool = False) -> AddResult:
        """Take in a file of cards without weights, all in one atomic rewrite; bad entries are refused one by one.

        Formats: our JSONL and those of ``catalogues``. Adult content and real persons stay out unless ``adult``.
        """
        cards: dict[str, tuple[Card, tuple[str, ...]]] = {}
        refused = []
        for one in read_cards(file, adult=adult):
            try:
                if isinstance(one, CardError):
                    raise one
                self._refuse_weighted(one.card.id, one.where)
                cards[one.card.id] = (one.card, one.warnings)
            except PersonalQError as error:
                refused.append(Refused(str(error).split(": ")[0], _one_line(error)))
        kept = {card.id: card for card in self._listed_cards()} | {card.id: card for card, _ in cards.values()}
        if cards:
            self._write_list(kept.values())
        owners = owners_of(self.cards()) if cards else {}
        return AddResult(
            tuple(_added(card, notes + shared_triggers(card, owners)) for card, notes in cards.values()), tuple(refused)
        )

    def remove(self, card_id: str) -> None:
        """Remove a checkpoint: its bundles, its weights and its card. What other bundles share with it stays theirs."""
        card = self.card(card_id)
        for bundle in self.bundles(card.id):
            _take_away(bundle)
        forget_dangling(self.root)
        listed = [c for c in self._listed_cards() if c.id != card.id]
        folder = self._folder(card.id)
        if folder.is_dir():
            _take_away(folder)
        if (self.root / "checkpoints" / CARDS).is_file():
            self._write_list(listed)

    def check(self, *, fix: bool = False) -> list[audit.Problem]:
        """Return what is wrong here; ``fix`` removes orphans (half-written temporaries) and nothing else."""
        return audit.check(self.root, fix=fix)

    # inside

    def _folder(self, card_id: str) -> Path:
        return self.root / "checkpoints" / folder_name(card_id)

    def _base_folder(self, base: str) -> Path:
        return self.root / "bases" / folder_name(base)

    def _listed_cards(self) -> list[Card]:
        return [card for _, card in listed_cards(self.root / "checkpoints" / CARDS)]

    def _folder_cards(self) -> Iterator[tuple[Path, Card]]:
        for folder in audit.folders(self.root / "checkpoints"):
            card = audit.folder_card(folder)
            if isinstance(card, Card):
                yield folder, card

    def _write_list(self, cards: Iterable[Card]) -> None:
        lines = (card.model_dump_json(exclude_defaults=True) for card in sorted(cards, key=lambda c: c.id))
        write_atomic(self.root / "checkpoints" / CARDS, "".join(f"{line}\n" for line in lines).encode())

    def _refuse_weighted(self, card_id: str, where: str) -> None:
        if self._folder(card_id).is_dir():
            raise RepositoryError(
                f"{where}: id {card_id!r} must be free, got a checkpoint with weights; remove it first with 'personalq rm'"
            )

    def _fitted(self, read: Source) -> tuple[Source, tuple[str, ...]]:
        """The source with the triggers that its files add, and warnings; refused when its base cannot take it."""
        beside = [file for name, file in read.files if name.endswith(".safetensors") and "/" not in name]
        base = self._base_folder(read.card.base) if read.card.base else None
        notes: tuple[str, ...] = ()
        vocabulary: frozenset[str] = frozenset()
        added: Sequence[str] = added_tokens({name: header.shapes for name, header in read.headers.items()})
        if base is not None and base.is_dir():
            read_settings(base, read.path)
            added = [token for token, _ in check_fit(base, read.path, beside, read.card.kind).added_tokens]
            vocabulary = read_vocabulary(read.path) or read_vocabulary(base)
            notes = split_words(read.card, added, vocabulary)
        elif read.card.base:
            notes = (f"base {read.card.base!r} is not in this repository: listed, not exportable until it is added",)
        elif not any(name.startswith("vae/") for name, _ in read.files):
            notes = ("no base on the card: name it with --base before it is exported",)
        card, said = with_tokens(read.card, added, vocabulary)
        return replace_fields(read, card=card), (*notes, *said)

    def _publish(self, read: Source, *, replace: bool) -> None:
        folder = self._folder(read.card.id)
        if folder.exists() and not replace:
            raise RepositoryError(
                f"checkpoint {read.card.id!r}: must be new, got an id that is here; "
                f"remove it first with 'personalq rm {read.card.id}'"
            )
        with atomic_directory(folder, replace=replace) as place:
            base = self._base_folder(read.card.base) if read.card.base else None
            record = place_files(read, base, place)
            (place / "card.json").write_bytes(dump_card(read.card))
            (place / RECORD).write_text(json.dumps({"schema_version": 1, "files": record}, indent=1, sort_keys=True))
        listed = self._listed_cards()
        if any(card.id == read.card.id for card in listed):
            self._write_list([card for card in listed if card.id != read.card.id])


def _take_away(folder: Path) -> None:
    """Remove a published folder: renamed out of the way first, so that no reader meets half of it."""
    gone = temporary_beside(folder)
    with named_failure(folder):
        os.rename(folder, gone)
        remove(gone)


def _added(card: Card, warnings: tuple[str, ...]) -> Added:
    return Added(card.id, card.kind, card.base, card.trigger, card.class_noun, warnings)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
