"""What common words of other languages mean in English: two tables, read when the first such request comes.

``phrasebook.tsv`` (hand-written): function words, looks, kinds of picture, and what people have checkpoints of.
``lexicon.tsv`` (made by tools/make_lexicon.py from Unicode CLDR): the names of the things that have an emoji.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from .words import fold

FOLDER = Path(__file__).parent
COMPOUNDING = frozenset({"de", "nl"})
_INFLECTED = 5  # letters a word must have before its ending is ignored


@dataclass(frozen=True)
class Lexicon:
    """One language. ``meanings``: folded phrase -> English; ``stems``: the same by beginnings; ``looks``: adjectives."""

    meanings: dict[str, str]
    stems: dict[str, str]
    function_words: frozenset[str]
    looks: frozenset[str]
    longest: int

    def meaning(self, phrase: str) -> str | None:
        """Return the English of a folded phrase, its ending ignored when the word is long; None when unknown."""
        if (found := self.meanings.get(phrase)) is not None:
            return found
        if len(phrase) < _INFLECTED or " " in phrase:
            return None
        return next((self.stems[part] for part in (phrase[:-1], phrase[:-2], phrase) if part in self.stems), None)


@functools.cache
def languages() -> dict[str, Lexicon]:
    """Return every language there is a table for."""
    phrases, sections = _rows("phrasebook.tsv"), _sections()
    looks = frozenset(sections["what looks"])
    frame = frozenset(sections["function words"])
    names = _rows("lexicon.tsv")
    return {code: _lexicon(phrases.get(code, {}), names.get(code, {}), frame, looks) for code in phrases | names}


def _lexicon(phrases: dict[str, str], names: dict[str, str], frame: frozenset[str], looks: frozenset[str]) -> Lexicon:
    meanings = {**{word: english for word, english in names.items() if len(word) > 1 or not word.isascii()}, **phrases}
    stems: dict[str, str] = {}
    for table in (phrases, names):
        for word, english in table.items():
            if english not in frame and " " not in word:
                for part in (word, word[:-1], word[:-2]):
                    if len(part) >= _INFLECTED - 1:
                        stems.setdefault(part, english)
    function_words = frozenset(word for word, english in phrases.items() if english in frame)
    longest = max((len(word.split()) for word in meanings), default=1)
    return Lexicon(meanings, stems, function_words, looks, longest)


def _rows(name: str) -> dict[str, dict[str, str]]:
    """Return language -> folded foreign phrase -> English of one table; the first row that has a phrase wins."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    codes = lines[0].split("\t")[1:]
    found: dict[str, dict[str, str]] = {code: {} for code in codes}
    for line in lines[1:]:
        english, *cells = line.split("\t")
        if english != "#":
            for code, cell in zip(codes, cells, strict=False):
                for phrase in filter(None, cell.split("|")):
                    found[code].setdefault(" ".join(fold(phrase.replace("-", " ").replace("'", " ")).split()), english)
    return found


def _sections() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "phrasebook.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        english, first, *_ = line.split("\t")
        if english == "#":
            found[first.split(":")[0]] = rows = []
        else:
            rows.append(english)
    return found
