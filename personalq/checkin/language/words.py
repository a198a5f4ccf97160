"""Words: how text becomes terms, the same way for cards and for requests. Knows spelling, not meaning."""

from __future__ import annotations

import functools
import re
import unicodedata
from itertools import pairwise

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W_]+")
_OWNER = re.compile(r"['\u2019]s\b")
_NUMBERS = {
    "first": "1", "second": "2", "third": "3", "fourth": "4", "fifth": "5",
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
}  # fmt: skip
STOP = frozenset(
    re.findall(
        r"\w+",
        """a an the of to for and or but is are was be been it its this that these those there my your our his her their
        me us you he she they we i in on at by with from into onto as like just some any please one ones thing do does
        so very really want wants need would could can not no if then than""",
    )
)


def fold(text: str) -> str:
    """Lower-case, drop accents and apostrophe-s: the form in which literal strings are compared."""
    if text.isascii():
        return _OWNER.sub("", text.lower()) if "'" in text else text.lower()
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _OWNER.sub("", unicodedata.normalize("NFC", plain).casefold())


def words(text: str) -> list[str]:
    """Split into folded words: camel case, underscores, hyphens and letter-digit borders are borders."""
    spaced = fold(_CAMEL.sub(" ", text)).replace("'", "").replace("\u2019", "")
    return _WORD.findall(spaced)


def terms(text: str) -> list[str]:
    """Return the terms of a text in order: words without stop words, numbers as digits, stems."""
    found: list[str] = []
    for word in words(text):
        if word not in STOP:
            found.extend(split_term(word))
    return found


@functools.lru_cache(maxsize=16384)
def split_term(word: str) -> tuple[str, ...]:
    """Return the terms of one word; 'cat2' gives ('cat2', 'cat', '2'), 'v2' gives ('version', '2')."""
    if word in _NUMBERS:
        return (_NUMBERS[word],)
    if match := re.fullmatch(r"v(\d+)", word):
        return ("version", match.group(1))
    match = re.fullmatch(r"([^\W\d]{2,})(\d{1,3})", word)
    return (word, stem(match.group(1)), match.group(2)) if match else (stem(word),)


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Cut plural, -ing and -ed, and write British spellings the American way."""
    word = {"grey": "gray"}.get(word, word)
    if len(word) > 5:
        word = re.sub(r"our(?=(s|ed|ing|ful)?$)", "or", word)
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 4 and re.search(r"(?:sh|ch|x|z|ss)es$", word):
        word = word[:-2]
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    match = re.fullmatch(r"(.*[aeiouy].*?)(?:ing|ed)", word)
    if match and len(match.group(1)) >= 3:
        root = match.group(1)
        return root[:-1] if len(root) > 3 and root[-1] == root[-2] and root[-1] not in "lsz" else root
    return word


def joined_pairs(text: str) -> list[str]:
    """Return neighbouring words written as one ('funko pop' -> 'funkopop'), stemmed."""
    found = [w for w in words(text) if w not in STOP]
    return [stem(a + b) for a, b in pairwise(found)]


def edit_distance(a: str, b: str, limit: int) -> int:
    """Return the edit distance with swaps of neighbours, or ``limit + 1`` when it is more."""
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i] + [0] * len(b)
        for j, y in enumerate(b, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], older[j - 2] + 1)
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


def grams(word: str) -> list[str]:
    """Return the character pairs of a word with its borders; two typos leave most of them alone."""
    padded = f"#{word}#"
    return [padded[i : i + 2] for i in range(len(padded) - 1)]
