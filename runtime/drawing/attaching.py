"""Adapters beside a base's engine: opened, put in order, and the base's manifest as the pictures see it.

It knows bundles and cards' words; arrays are made in engines.attached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from personalq.adapters import ADAPTER, AdapterManifest, Learned, read_adapter_manifest
from personalq.bundle import Manifest
from personalq.errors import EngineError
from personalq.rows import KeptTokens
from personalq.tokens import Tokenizer
from personalq.weights.adapter import Adapter, read_adapter

from ..engines.attached import PLAIN, Attached, Worn, attach, without_place
from ..engines.engine import SECOND_TOKENIZER, TOKENIZER, check_bytes

OF_CHECKPOINT = "checkpoint"  # in a manifest's sources: not the base's


@dataclass(frozen=True)
class Opened:
    """An adapter, memory-mapped, and its manifest. folder: its bundle; None for one that was made in memory."""

    manifest: AdapterManifest
    adapter: Adapter
    folder: Path | None = None


@dataclass(frozen=True)
class Chosen:
    """An adapter with the strengths that were asked for: of UNet and text rows, and of the text encoders (None: the same)."""

    opened: Opened
    strength: float = 1.0
    text_strength: float | None = None

    @property
    def id(self) -> str:
        return self.opened.manifest.checkpoint.id

    def worn(self, base: Manifest) -> Worn:
        """As one base wears it: a correction of another spec's rounding is left out."""
        adapter, correction = self.opened.adapter, self.opened.manifest.correction
        if adapter.correction and (correction is None or correction.spec_sha256 != base.spec.sha256):
            adapter = Adapter(adapter.branches, adapter.changes, adapter.added)
        text = self.strength if self.text_strength is None else self.text_strength
        return Worn(adapter, self.strength, text)


def open_adapter(bundle: Path) -> Opened:
    """Read an adapter's bundle. Raises EngineError or BundleError when a file is missing, or not what was exported."""
    manifest = read_adapter_manifest(bundle)
    check_bytes(bundle, manifest.files)
    return Opened(manifest, read_adapter(bundle / ADAPTER), bundle)


class Wearing:
    """A base's engine with adapters attached. `manifest` is the base's with what the adapters say in its place."""

    def __init__(
        self, base: Manifest, bundle: Path, chosen: Sequence[Chosen] = (), *, on_any_base: bool = False
    ) -> None:
        """base, bundle: the engine's. Raises EngineError for an adapter of another family, of another base (unless that is
        asked for), and for an engine that takes none."""
        self.base, self.chosen, self._bundle = base, tuple(chosen), bundle
        self.tokens: dict[str, int] = {}
        self.warnings: tuple[str, ...] = ()
        if not chosen:
            self.manifest = base
            return
        inputs = self.base.adapters
        if inputs is None:
            raise EngineError(
                f"bundle {self.base.key[:12]}: must take adapters, got the engine of {self.base.checkpoint.id!r} alone; "
                "name a base's engine with --on, made by 'personalq export --base'"
            )
        for one in chosen:
            _check_base(one.opened.manifest, self.base, on_any_base=on_any_base)
        self.tokens = _ids(chosen, inputs.first_added_id)
        self.manifest = self._seen()
        self.warnings = tuple(self._warnings())

    @cached_property
    def attached(self) -> Attached:
        """The arrays for the engine's graphs, made when they are first needed."""
        inputs = self.base.adapters
        return attach(inputs, [one.worn(self.base) for one in self.chosen]) if inputs and self.chosen else PLAIN

    @cached_property
    def strengths(self) -> dict[str, tuple[float, float]]:
        """Every name that <lora:NAME:...> may call an attached checkpoint by -> its strengths in UNet and text encoder."""
        told: dict[str, tuple[float, float]] = {}
        for one in self.chosen:
            entry, worn = one.opened.manifest.checkpoint, one.worn(self.base)
            told |= dict.fromkeys((entry.id, entry.name, *entry.files), (worn.strength, worn.text_strength))
        entry = self.base.checkpoint
        return told or dict.fromkeys((entry.id, entry.name, *entry.files), (1.0, 1.0))

    def tokenizers(self) -> tuple[Tokenizer, Tokenizer | None]:
        """The base's, with the adapters' tokens; SDXL's second one, which pads with another token."""
        text = self.manifest.text
        first = Tokenizer(self._bundle / TOKENIZER, text, self.tokens)
        if text.second_pad_id is None:
            return first, None
        padded = text.model_copy(update={"pad_id": text.second_pad_id})
        return first, Tokenizer(self._bundle / SECOND_TOKENIZER, padded, self.tokens)

    def _seen(self) -> Manifest:
        """The manifest as pictures see it: the checkpoint's words, scheduler and steps, and the tokens that are kept."""
        manifests = [one.opened.manifest for one in self.chosen]
        first, entries = manifests[0], [one.checkpoint for one in manifests]
        entry = first.checkpoint.model_copy(
            update={
                "trigger": tuple(dict.fromkeys(word for one in entries for word in one.trigger)),
                "files": tuple(file for one in entries for file in one.files),
            }
        )
        update: dict[str, object] = {"checkpoint": entry}
        if first.sources.get("scheduler") == OF_CHECKPOINT or first.base_sha256 == self.base.key_parts.get("weights"):
            update["scheduler"] = first.scheduler
        update |= {"steps": first.steps, "guidance": first.guidance}
        expansions = {token: text for one in manifests for token, text in one.expansions.items()}
        update["text"] = self.base.text.model_copy(update={"expansions": {**self.base.text.expansions, **expansions}})
        seen = self.base.model_copy(update=update)
        return seen.model_copy(update={"rows": seen.rows.model_copy(update={"kept": self._kept(seen)})})

    def _kept(self, seen: Manifest) -> KeptTokens:
        """The base's kept tokens with the adapters' own words, as its spec keeps those."""
        kept, entries = seen.rows.kept, [one.opened.manifest.checkpoint for one in self.chosen]
        tokenizer = Tokenizer(self._bundle / TOKENIZER, seen.text, self.tokens)
        words = {
            "trigger": [word for entry in entries for word in entry.trigger if word.strip()],
            "class_noun": [entry.class_noun for entry in entries if entry.class_noun],
        }
        own = {what: tuple(dict.fromkeys(map(tokenizer.token_ids, words[what]))) for what in kept.of_adapter}
        return kept.model_copy(update={what: (*ids, *getattr(kept, what)) for what, ids in own.items()})

    def _warnings(self) -> list[str]:
        told = []
        first = self.chosen[0].opened.manifest
        for one in self.chosen:
            manifest = one.opened.manifest
            if manifest.base_sha256 != self.base.key_parts.get("weights"):
                told.append(f"{one.id}: made for {manifest.checkpoint.base!r}, drawn on {self.base.checkpoint.id!r}")
            if manifest.correction and manifest.correction.spec_sha256 != self.base.spec.sha256:
                told.append(f"{one.id}: its correction is of another engine's rounding and is not used")
            if one is not self.chosen[0] and manifest.scheduler != first.scheduler:
                told.append(f"{one.id}: its scheduler is not used, that of {self.chosen[0].id} is")
            told += [f"{one.id}: {what} is not in its adapter" for what in manifest.left_out[:1]]
            if self.base.adapters and (left := without_place(self.base.adapters, one.opened.adapter)):
                told.append(
                    f"{one.id}: {len(left)} of its text encoder layers are not in this engine's graphs and not used, "
                    f"the first {left[0]}"
                )
        return told


def _check_base(adapter: AdapterManifest, base: Manifest, *, on_any_base: bool) -> None:
    name = adapter.checkpoint.id
    if adapter.family != base.family:
        raise EngineError(
            f"{name}: must be of the family of base {base.checkpoint.id!r} ({base.family[:12]}), got {adapter.family[:12]}; "
            "draw it on the base that it was made for"
        )
    if adapter.base_sha256 != base.key_parts.get("weights") and not on_any_base:
        raise EngineError(
            f"{name}: must be made for the weights of base {base.checkpoint.id!r}, got an adapter of other weights "
            f"({adapter.checkpoint.base!r}); export it again, or name this base with --on"
        )


def _ids(chosen: Sequence[Chosen], first: int) -> dict[str, int]:
    """The id of every piece of every added token, in order. Raises EngineError for a token that two adapters add."""
    ids: dict[str, int] = {}
    owners: dict[str, str] = {}
    for one in chosen:
        for piece in _pieces(one.opened.manifest.learned):
            if piece in ids:
                raise EngineError(
                    f"token {piece!r}: must be of one adapter, got {owners[piece]} and {one.id}; draw them one at a time"
                )
            ids[piece], owners[piece] = first + len(ids), one.id
    return ids


def _pieces(learned: Sequence[Learned]) -> list[str]:
    return [piece for one in learned for piece in one.pieces]
