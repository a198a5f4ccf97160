"""Translate a request from another language word for word, because cards and encoder are English.

Knows words, no grammar beyond word order: adjectives go before their noun, and what Korean and Japanese mark as a place
or an object after the noun is put where English has it. Unknown words stay as they are: they may be names.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

from .lexicon import COMPOUNDING, Lexicon, languages
from .words import STOP, fold

_TOKEN = re.compile(
    r"<[^<>\s]{1,60}>|['\"\u2018\u201c\u300c][^'\"\u2019\u201d\u300d]{2,60}['\"\u2019\u201d\u300d](?!\w)|[^\W_]+|[^\w\s]"
)
_ENGLISH = STOP | {"with", "of", "photo", "picture", "style", "wearing", "under", "next", "while", "over", "near"}
_SCRIPTS = (
    ("ko", re.compile(r"[\uac00-\ud7a3]")),
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("uk", re.compile(r"[\u0456\u0457\u0454\u0491]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
)
_PREPOSITIONS = frozenset({"in", "on", "under", "next to", "at", "for"})
# Particles follow their noun: what they make of it. 'the' marks the subject, 'what' the object.
_PARTICLES = {
    "ko": {
        "에서": "in", "으로": "in", "에": "in", "로": "in", "을": "what", "를": "what", "이": "the", "가": "the",
        "은": "the", "는": "the", "의": "of", "과": "and", "와": "and", "도": "the", "처럼": "as",
    },
    "ja": {"を": "what", "が": "the", "は": "the", "に": "in", "で": "in", "の": "of", "と": "and", "も": "the"},
}  # fmt: skip
_TIDY = tuple(
    (re.compile(pattern), right)
    for pattern, right in (
        (r"\s+([,.:;!?)])", r"\1"),
        (r"([(])\s+", r"\1"),
        (r"\s['\u2019]\s", " "),
        (r"(\w) - (\w)", r"\1 \2"),
        (r"\b(?:in |the )*(?:the )?style (?:of )?(?=[A-Z])", "in the style of "),
        (r"(?<=\w) a photo of$", ""),
        (r"\bwith (?=in\b|on\b|$)", ""),
        (r"^(?:draw|please) (?=[a-z])|\bdraw a drawing of\b|\bthe (?=my\b|our\b)", ""),
        (r"\bin the (?=beach\b)", "on the "),
    )
)
_ENDING = re.compile(r"[다요줘려진린한는은운된인져고며]$|^[ぁ-ん]+$|^.$")


def gloss(text: str, is_known: Callable[[str], bool]) -> str:
    """Return ``text`` in English, or as it is when it is English or of a language without a table.

    ``is_known`` tells whether a folded word is an English word or one that a card uses.
    """
    code = language(text, is_known)
    if not code:
        return text
    lexicon = languages()[code]
    if code in _PARTICLES:
        return _by_particles(text, lexicon, _PARTICLES[code], spaced=code == "ko")
    if code == "zh":
        return _joined([word for piece in _pieces(text) for word in _munch(piece, lexicon)])
    return _joined(_adjectives_first(_linear(text, lexicon, compounds=code in COMPOUNDING), lexicon))


def language(text: str, is_known: Callable[[str], bool]) -> str:
    """Return the language code of a request, or '' for English and everything there is no table for."""
    for code, pattern in _SCRIPTS:
        if pattern.search(text):
            return code
    said = list(dict.fromkeys(re.findall(r"[^\W_]+", fold(text))))
    n_english = sum(word in _ENGLISH for word in said)
    if n_english * 2 > len(said):
        return ""
    scores, roles = {}, [_roles(word) for word in said]
    for place, code in enumerate(languages()):
        frame = sum(role[place] == "frame" for role in roles)
        if frame <= n_english and (frame or n_english):
            continue  # English has the grammar
        things = [word for word, role in zip(said, roles, strict=True) if role[place] == "thing"]
        plain = [w for w, role in zip(said, roles, strict=True) if role[place] == "plain" and w not in _ENGLISH]
        against = n_english + 0.5 * sum(is_known(word) for word in plain)
        things_new = sum(not is_known(word) for word in things)
        if frame or things_new >= 2:
            scores[code] = frame + len(things) - against
    best = max(scores, key=lambda code: (scores[code], code), default="")
    return best if best and scores[best] > 0.5 else ""


@functools.lru_cache(maxsize=8192)
def _roles(word: str) -> tuple[str, ...]:
    """Return what a folded word is in each language: of its 'frame', a 'thing' that English calls otherwise, or 'plain'."""
    return tuple(
        "frame" if word in lexicon.function_words else "thing" if (lexicon.meaning(word) or word) != word else "plain"
        for lexicon in languages().values()
    )


@dataclass
class _Chunk:
    """Words up to a particle, and what the particle makes of them."""

    words: list[str] = field(default_factory=list)
    role: str = ""


def _linear(text: str, lexicon: Lexicon, *, compounds: bool) -> list[str]:
    """Translate from left to right, longest phrase first."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFC", text))
    keys = [fold(token) for token in tokens]
    found: list[str] = []
    place = 0
    while place < len(tokens):
        for size in range(min(lexicon.longest, len(tokens) - place), 0, -1):
            meaning = lexicon.meaning(" ".join(keys[place : place + size]))
            if meaning is not None:
                found.append(meaning)
                break
        else:
            size = 1
            found += _compound(keys[place], lexicon) if compounds and len(keys[place]) > 7 else []
            found += [tokens[place]] if not compounds or len(found) == 0 or not _compound(keys[place], lexicon) else []
        place += size
    return found


def _compound(word: str, lexicon: Lexicon) -> list[str]:
    """Take a compound apart at its head: 'skibrille' -> ['ski', 'glasses']; nothing when its head is unknown."""
    for cut in range(3, len(word) - 3):
        head = lexicon.meanings.get(word[cut:])
        if head is not None and word[cut:] not in lexicon.function_words:
            first = word[:cut]
            return [lexicon.meaning(first) or lexicon.meaning(first.rstrip("sn")) or first, head]
    return []


def _adjectives_first(found: list[str], lexicon: Lexicon) -> list[str]:
    """Put looks before the noun they follow: ['dog', 'brown', 'small'] -> ['small', 'brown', 'dog']."""
    done: list[str] = []
    for word in found:
        place = len(done)
        while word in lexicon.looks and place and (done[place - 1][0].isalnum() and not _is_frame(done[place - 1])):
            place -= 1
        done.insert(place, word)
    return done


def _is_frame(word: str) -> bool:
    return (
        word in _ENGLISH
        or word in _PREPOSITIONS
        or word in ("a", "the", "my", "our", "with", "of", "draw", "a photo of")
    )


def _pieces(text: str) -> list[str]:
    """Split at spaces and where the script changes from or to Latin."""
    return re.findall(r"<[^<>\s]{1,60}>|[A-Za-z0-9][\w .'&-]*[\w.]|[A-Za-z0-9]|[^\sA-Za-z0-9]+", text)


def _munch(piece: str, lexicon: Lexicon) -> list[str]:
    """Translate text without spaces, longest word first; what is unknown stays, lone signs are dropped."""
    if piece.isascii():
        return [piece]
    found, rest, place = [], "", 0
    while place < len(piece):
        for size in range(min(8, len(piece) - place), 0, -1):
            if (meaning := lexicon.meanings.get(piece[place : place + size])) is not None:
                found += [*([rest] if len(rest) > 1 else []), meaning]
                rest, place = "", place + size
                break
        else:
            rest, place = rest + piece[place], place + 1
    return [*found, *([rest] if len(rest) > 1 else [])]


def _by_particles(text: str, lexicon: Lexicon, particles: dict[str, str], *, spaced: bool) -> str:
    """Translate a language that marks roles after the noun; the subject or object first, then 'with', then places."""
    chunks = [_Chunk()]
    for words, role in (_korean if spaced else _japanese)(unicodedata.normalize("NFC", text), lexicon, particles):
        chunks[-1].words += words
        if role:
            chunks[-1].role = role
            chunks.append(_Chunk())
    return _ordered([chunk for chunk in chunks if chunk.words or chunk.role])


def _korean(text: str, lexicon: Lexicon, particles: dict[str, str]) -> list[tuple[list[str], str]]:
    found: list[tuple[list[str], str]] = []
    words = _pieces(text)
    place = 0
    while place < len(words):
        pair = f"{words[place]} {words[place + 1]}" if place + 1 < len(words) else ""
        step = 2 if pair and _eojeol(pair, lexicon, particles) else 1
        word = pair if step == 2 else words[place]
        known = _eojeol(word, lexicon, particles)
        if known is not None:
            found.append(known)
        elif word.isascii():
            found.append(([word], ""))
        else:
            found.append(_unknown(word, lexicon, particles))
        place += step
    return found


def _unknown(word: str, lexicon: Lexicon, particles: dict[str, str]) -> tuple[list[str], str]:
    role = next((role for p, role in particles.items() if word.endswith(p) and len(word) > len(p) + 1), "")
    body = word[: -len(next(p for p in particles if word.endswith(p)))] if role else word
    parts = [part for part in _munch(body, lexicon) if part.isascii() or part == body]
    return [part for part in parts if part.isascii() or not _ENDING.search(part)], role


def _eojeol(word: str, lexicon: Lexicon, particles: dict[str, str]) -> tuple[list[str], str] | None:
    """Return the meaning and role of one word with its particle, or None."""
    key = fold(word)
    if key in lexicon.meanings:
        meaning = lexicon.meanings[key]
        return ([], meaning) if meaning in _PREPOSITIONS else ([meaning], "")
    for particle, role in particles.items():
        body = key.removesuffix(unicodedata.normalize("NFC", particle))
        if body != key and body in lexicon.meanings:
            return [lexicon.meanings[body]], role
    return None


def _japanese(text: str, lexicon: Lexicon, particles: dict[str, str]) -> list[tuple[list[str], str]]:
    found: list[tuple[list[str], str]] = []
    for piece in _pieces(text):
        if piece.isascii():
            found.append(([piece], ""))
            continue
        place, rest = 0, ""
        while place < len(piece):
            size, meaning = _longest(piece, place, lexicon, particles)
            if not size:
                rest, place = rest + piece[place], place + 1
                continue
            if len(rest) > 1 and not _ENDING.search(rest):
                found.append(([rest], ""))
            rest = ""
            is_role = meaning in _PREPOSITIONS or (piece[place : place + size] in particles)
            found.append(([], meaning) if is_role else ([meaning], ""))
            place += size
        if len(rest) > 1 and not _ENDING.search(rest):
            found.append(([rest], ""))
    return found


def _longest(piece: str, place: int, lexicon: Lexicon, particles: dict[str, str]) -> tuple[int, str]:
    for size in range(min(8, len(piece) - place), 0, -1):
        part = piece[place : place + size]
        if (meaning := lexicon.meanings.get(fold(part), particles.get(part))) is not None:
            return size, meaning
    return 0, ""


def _ordered(chunks: list[_Chunk]) -> str:
    """Order chunks as English does: concept, 'with' what else it has, places."""
    merged: list[_Chunk] = []
    for chunk in chunks:
        if not chunk.words and merged:
            merged[-1].role = chunk.role
        elif chunk.words[:1] == ["wearing"] and merged:
            merged[-1].role, chunk.words[:] = "wearing", chunk.words[1:]
            merged += [chunk] if chunk.words else []
        else:
            merged.append(chunk)
    places = [c for c in merged if c.role in _PREPOSITIONS or (c.role == "of" and c is not merged[-1])]
    others = [c for c in merged if c not in places]
    wanted = [c for c in others if c.role == "what"] or [c for c in others if c.role == "the"] or others[-1:]
    concept = wanted[0] if wanted else None
    rest = [c for c in others if c is not concept]
    parts = [*(concept.words if concept else [])]
    for chunk in rest:
        parts += ["with" if concept else "", *[w for w in chunk.words if w not in ("draw", "please")]]
    for chunk in places:
        parts += ["in" if chunk.role == "of" else chunk.role, *chunk.words]
    return _joined(parts)


def _joined(parts: list[str]) -> str:
    """Join words into a sentence: spaces before signs go, and 'in style X' is written 'in the style of X'."""
    text = " ".join(part.strip() for part in parts if part.strip())
    for pattern, right in _TIDY:
        text = pattern.sub(right, text)
    return text.strip() or "picture"
