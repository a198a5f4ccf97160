r"""What the marks in a prompt mean: emphasis, chunks, adapters. It knows text, not tokens, encoders or files.

The marks are AUTOMATIC1111's: `(word)`, `((word))`, `(word:1.3)`, `[word]`, `\(`, `BREAK`, `<lora:name:0.8>`. A prompt
without any is one piece of text, unchanged.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from .errors import PromptError

STRONGER, WEAKER = 1.1, 1 / 1.1
LARGEST_WEIGHT = 10.0  # 24 round brackets; beyond it pictures are noise, and float32 soon overflows

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_TAG = r"<(?P<kind>lora|lyco|hypernet):(?P<body>[^<>]*)(?P<end>>?)"
_MARK = rf"{_TAG}|\\(?P<escaped>[()\[\]\\])|:\s*(?P<weight>{_NUMBER})\s*\)|(?P<bracket>[()\[\]])|(?P<chunk>\bBREAK\b)"
_MARKS = re.compile(_MARK, re.IGNORECASE)
# 'break' is a word, 'BREAK' a mark, and the tags have no case: only this one needs a second look.
_WRITTEN = re.compile(rf"{_TAG}|\\[()\[\]]|:\s*{_NUMBER}\s*\)|(?-i:\bBREAK\b)", re.IGNORECASE)
_SCHEDULE = re.compile(rf":\s*{_NUMBER}\s*$|\|")
_AND = re.compile(r"\bAND\b")


@dataclass(frozen=True)
class Piece:
    """Text whose tokens have one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """`<lora:name:0.8>`: a checkpoint and its strengths. written: the mark itself, for messages."""

    name: str
    unet: float
    text_encoder: float
    written: str


@dataclass(frozen=True)
class Prompt:
    """A prompt, read. sections: what stands between BREAKs. warnings: marks that are read as something else than elsewhere.

    faults: why it cannot be drawn. Reading never fails, so that whoever does not draw (Check-in) need not care.
    is_literal: one chunk of text whose brackets are brackets, and what is too long is cut: as diffusers reads it.
    """

    sections: tuple[tuple[Piece, ...], ...]
    adapters: tuple[Adapter, ...] = ()
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    is_literal: bool = False

    @property
    def text(self) -> str:
        """The words alone."""
        return " ".join("".join(piece.text for piece in section) for section in self.sections)


def literal(text: str) -> Prompt:
    """A prompt without marks, whatever it looks like: what diffusers' pipelines take it for."""
    return Prompt(((Piece(text),),), is_literal=True)


def is_marked(text: str) -> bool:
    """Whether somebody wrote a prompt with marks. Brackets alone say nothing: people put asides in them."""
    return _WRITTEN.search(text) is not None


def read_prompt(text: str, whole: Sequence[str] = ()) -> Prompt:
    """Read a prompt's marks. whole: words that are never marks, in any case, such as a trigger 'miku (vocaloid)'."""
    reader = _Reader(text)
    for match in _matches(text, whole):
        reader.take(match)
    return reader.done()


def refuse_faults(prompt: Prompt, strengths: Mapping[str, tuple[float, float]], *, is_attached: bool = False) -> None:
    """Raise PromptError for the first fault, and for an adapter that is not what draws, as strong as it is.

    strengths: what draws, by every name it has, its ids first -> (of the UNet, of the text encoder). is_attached: it is
    adapters beside a base's engine; else it is merged into its own.
    """
    for fault in prompt.faults:
        raise PromptError(f"prompt: {fault}")
    known, drawing = {name.casefold(): value for name, value in strengths.items()}, next(iter(strengths), "")
    for name, asked in named_adapters(prompt).items():
        if name not in known:
            how = "attach it with --adapter NAME:STRENGTH" if is_attached else "draw with that checkpoint"
            raise PromptError(f"prompt: {asked.written} must name what draws, {drawing!r}; remove it, or {how}")
        for said, is_so in zip((asked.unet, asked.text_encoder), known[name], strict=True):
            if said != is_so:
                why = "attached at that strength" if is_attached else "merged into its bundle at full strength"
                raise PromptError(
                    f"prompt: {asked.written} must have strength {is_so:g} in all, got {said:g}; {drawing!r} is {why}: "
                    f"write {is_so:g}, or remove it"
                )


def named_adapters(prompt: Prompt) -> dict[str, Adapter]:
    """What a prompt names, by casefolded name, strengths of the same name added up."""
    found: dict[str, Adapter] = {}
    for one in prompt.adapters:
        before = found.get(one.name.casefold())
        sums = (
            (one.unet + before.unet, one.text_encoder + before.text_encoder) if before else (one.unet, one.text_encoder)
        )
        found[one.name.casefold()] = Adapter(one.name, *sums, one.written)
    return found


def _matches(text: str, whole: Sequence[str]) -> Iterator[re.Match[str]]:
    """Every mark, and every one of the words that would be taken for marks."""
    odd = sorted((re.escape(word) for word in whole if _MARKS.search(word)), key=len, reverse=True)
    pattern = re.compile(f"(?P<whole>{'|'.join(odd)})|{_MARK}", re.IGNORECASE) if odd else _MARKS
    return pattern.finditer(text)


class _Reader:
    """The items of a prompt as they are met: texts, brackets that may stay brackets, ends of chunks (None)."""

    def __init__(self, source: str) -> None:
        self.source, self.at = source, 0
        self.texts: list[str | None] = []
        self.weights: list[float] = []
        self.open: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # (item, place in the source)
        self.adapters: list[Adapter] = []
        self.warnings: list[str] = []
        self.faults: list[str] = []

    def take(self, match: re.Match[str]) -> None:
        """The text before a mark, then the mark."""
        self.add(self.source[self.at : match.start()])
        self.at = match.end()
        found = match.groupdict()
        if found["kind"]:
            self.add_adapter(match)
        elif found["escaped"]:
            self.add(found["escaped"])
        elif found["weight"] and self.open["("]:
            self.close("(", match, float(found["weight"]))
        elif found["bracket"]:
            self.add_bracket(found["bracket"], match)
        elif found["chunk"] == "BREAK":
            self.add(None)
        else:
            if found["weight"]:
                self.closes_nothing(match)
            self.add(match.group())

    def add(self, text: str | None) -> None:
        if text != "":
            self.texts.append(text)
            self.weights.append(1.0)

    def add_bracket(self, bracket: str, match: re.Match[str]) -> None:
        if bracket in self.open:
            self.open[bracket].append((len(self.texts), match.start()))
            self.add(bracket)
            return
        opening, weight = {")": ("(", STRONGER), "]": ("[", WEAKER)}[bracket]
        if self.open[opening]:
            self.close(opening, match, weight)
        else:
            self.closes_nothing(match)
            self.add(bracket)

    def closes_nothing(self, match: re.Match[str]) -> None:
        self.warn(f"{match.group()[-1]!r} at character {match.end() - 1} closes nothing: it is read as a bracket")

    def close(self, opening: str, match: re.Match[str], weight: float) -> None:
        """Weigh everything since the bracket, which is no text then."""
        item, place = self.open[opening].pop()
        self.texts[item] = ""
        for i in range(item, len(self.weights)):
            self.weights[i] *= weight
        inside = self.source[place + 1 : match.start()]
        if opening == "[" and _SCHEDULE.search(inside):
            self.warn(
                f"[{_line(inside)}]: words cannot change between steps: all of it is read as words, divided by 1.1"
            )

    def add_adapter(self, match: re.Match[str]) -> None:
        """An adapter, or the fault in it; its place becomes a space, so that it joins no words."""
        self.add(" ")
        try:
            self.adapters.append(_adapter(match))
        except PromptError as error:
            self.faults.append(str(error))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def done(self) -> Prompt:
        self.add(self.source[self.at :])
        for opening, places in self.open.items():
            for _, place in places:
                self.warn(f"{opening!r} at character {place} is never closed: it is read as a bracket")
        if max(map(abs, self.weights), default=1.0) > LARGEST_WEIGHT:
            worst = max(self.weights, key=abs)
            self.faults.append(
                f"weights must be within -{LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}, got {worst:.4g}; 0.5 to 1.5 is usual"
            )
        prompt = Prompt(tuple(self.sections()), tuple(self.adapters), faults=tuple(self.faults))
        if _AND.search(prompt.text):
            self.warn("AND: prompts cannot be composed: it is read as the word 'and'")
        return replace(prompt, warnings=tuple(dict.fromkeys(self.warnings)))

    def sections(self) -> Iterator[tuple[Piece, ...]]:
        """What stands between BREAKs, neighbours of one weight joined; where there is nothing, there is no section."""
        items = list(zip(self.texts, self.weights, strict=True))
        n_found = 0
        for is_chunk, group in groupby(items, lambda item: item[0] is None):
            if is_chunk:
                continue
            runs = groupby(((text, weight) for text, weight in group if text), lambda item: item[1])
            section = tuple(Piece("".join(text for text, _ in run), weight) for weight, run in runs)
            if any(piece.text.strip() for piece in section):
                n_found += 1
                yield section
        if not n_found:
            yield (Piece("" if self.adapters else "".join(text or "" for text, _ in items)),)


def _adapter(match: re.Match[str]) -> Adapter:
    """`<lora:name>`, `<lora:name:both>`, `<lora:name:text encoder:UNet>` or `te=`, `unet=`: A1111's order. Raises PromptError."""
    written = _line(match.group())
    if not match["end"]:
        raise PromptError(f"{written!r} must end with '>', got none; close or remove it")
    name, *arguments = (_line(part) for part in match["body"].split(":"))
    if match["kind"].lower() == "hypernet":
        raise PromptError(f"{written} asks for a hypernetwork, which PersonalQ does not have; remove it")
    if not name:
        raise PromptError(f"{written} must name a checkpoint, got no name; write <lora:NAME:1>")
    given = dict(zip(("te", "unet"), (one for one in arguments if "=" not in one), strict=False))
    given |= dict(one.split("=", 1) for one in arguments if "=" in one)
    if len(given) != len(arguments) or not given.keys() <= {"te", "unet"}:
        raise PromptError(f"{written} must be <lora:NAME:STRENGTH> or <lora:NAME:te=A:unet=B>, got more; shorten it")
    numbers = {part: _strength(value, written) for part, value in given.items()}
    text_encoder = numbers.get("te", 1.0)
    return Adapter(name, numbers.get("unet", text_encoder), text_encoder, written)


def _line(text: str) -> str:
    """A piece of a prompt as a message shows it."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}\u2026"


def _strength(text: str, written: str) -> float:
    if not re.fullmatch(_NUMBER, text) or abs(float(text)) > LARGEST_WEIGHT:
        raise PromptError(f"{written} must have strengths within -10 and 10, got {text!r:.40}; 0 to 1 is usual")
    return float(text)
