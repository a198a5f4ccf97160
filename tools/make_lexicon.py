"""Make personalq/checkin/language/lexicon.tsv from Unicode CLDR's emoji names and keywords. Run by a builder, once per CLDR.

    npm pack cldr-annotations-full@48.2.0 && tar xzf cldr-annotations-full-48.2.0.tgz
    python tools/make_lexicon.py package/annotations personalq/checkin/language/lexicon.tsv

An emoji is a concept that people of every language have named: a foreign name means the English name that is used for
the same emoji, scored by Dice = 2 |A and B| / (|A| + |B|) over the emoji that carry them. Unicode-3.0 licence.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

LANGUAGES = ["es", "pt", "fr", "it", "de", "nl", "pl", "ru", "uk", "tr", "ar", "hi", "ja", "ko", "zh"]
_NOT_THINGS = re.compile(
    r"flag|person|\bm[ae]n\b|wom[ae]n|people|kiss|couple|family|\bhands?\b|finger|o.clock|-thirty|arrow|button|zodiac|"
    r"mark\b|symbol|heart|keycap|skin|hair|trigram|hexagram|mahjong|gesture|letter|script|bracket|triangle|diamond|"
    r"filled|hollow|place medal|square|large|small|fist|thumb|palm|currency|chart|banknote|number|input|"
    r"speaker|bubble|cat with|ing cat|weary cat"
)
_SMILEY = re.compile(r"face$|^face\b|\bface\b")
_ANIMAL_FACE = re.compile(r"(?:dog|cat|tiger|horse|mouse|cow|pig|rabbit|monkey|dragon) face")
_MIN_SCORE, _MIN_LANGUAGES = 0.66, 5  # what few languages share is an accident of their keywords


def main(source: Path, out: Path) -> None:
    """Write one line per English name: the name, then per language its foreign names joined by '|'."""
    english = _read(source / "en" / "annotations.json")
    things = {c for c, (name, _) in english.items() if _is_thing(c, name)}
    meanings = _by_word({c: english[c] for c in things})
    names = {name for name, _ in english.values()}
    table: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for language in LANGUAGES:
        foreign = _read(source / language / "annotations.json")
        for word, emoji in _by_word({c: v for c, v in foreign.items() if c in things}).items():
            best = _best(word, emoji, foreign, english, meanings, names)
            if best and best != word:
                table[best][language].append(word)
    lines = ["\t".join(["en", *LANGUAGES])]
    lines += [
        "\t".join([word, *("|".join(sorted(row[language])) for language in LANGUAGES)])
        for word, row in sorted(table.items())
        if len(row) >= _MIN_LANGUAGES
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, tuple[str, list[str]]]:
    (holder,) = [value for value in json.loads(path.read_text(encoding="utf-8")).values() if "annotations" in value]
    return {
        c: (v.get("tts", [""])[0].lower(), [w.lower() for w in v.get("default", [])])
        for c, v in holder["annotations"].items()
    }


def _is_thing(emoji: str, name: str) -> bool:
    if len(emoji) > 2 or ord(emoji[0]) < 0x2300 or not name or _NOT_THINGS.search(name):
        return False
    return _ANIMAL_FACE.match(name) is not None or not _SMILEY.search(name)


def _by_word(names: dict[str, tuple[str, list[str]]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for emoji, (name, keywords) in names.items():
        for word in {name, *keywords}:
            if word and len(word.split()) <= 3:
                found[word].add(emoji)
    return found


def _best(word, emoji, foreign, english, meanings, names) -> str:  # type: ignore[no-untyped-def]
    candidates = {w for c in emoji for w in (english[c][0], *english[c][1]) if len(w.split()) <= 3}
    is_name = {english[c][0] for c in emoji if foreign[c][0] == word}

    def score(w: str) -> tuple[float, bool, bool, int, str]:
        both = len(meanings[w] & emoji)
        dice = 2 * both / (len(meanings[w]) + len(emoji))
        return (dice + 0.25 * (w in is_name) - 0.05 * len(w.split()), w in is_name, w in names, -len(w), w)

    found = max(candidates, key=score, default="")
    is_sure = len(emoji) > 1 or found in is_name  # a keyword of one emoji may be anything about it
    return found if found and is_sure and score(found)[0] >= _MIN_SCORE else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
