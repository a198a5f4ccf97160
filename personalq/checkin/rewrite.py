"""Write the prompt: the canonical trigger (and class noun) where the concept was mentioned, once."""

from __future__ import annotations

import re
from collections.abc import Set

from ..cards.card import Card, is_style
from ..prompts import is_marked, read_prompt
from .language.intent import Intent, parse_request, split_medium, style_parts
from .language.words import STOP, fold, stem, terms, words

_WORD = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*")
_SAME = re.compile(
    r"\b(?:the\s+)?same\s+(?:one|\w+)(?:\s+but)?\b|^(?:change\s+(?:it|him|her|them)\s+to|it|him|her|them)\b",
    re.IGNORECASE,
)
_ASIDE = re.compile(r"\s*\band\s+(?:put|place|make|show|draw)\s+(?:him|her|it|them)\b", re.IGNORECASE)
_DANGLING = re.compile(
    r"\b(?:(?:turned|made|built|drawn|painted|knitted|carved)\s+)?(?:in|into|with|using|as|from|(?:out\s+)?of)\s+"
    r"(?:an?\s+|the\s+)?(?:style|look)?\s*(?=$|[,.;])",
    re.IGNORECASE,
)
_EDGE = re.compile(r"^[\s,;:.-]+|[\s,;:-]+$")


def concept_phrase(card: Card, group: str) -> str:
    """Return how captions name the concept: 'sks dog', '<cat-toy>'; example prompts decide, then the kind."""
    noun = card.class_noun
    if not noun or is_style(card):
        return group
    after = [fold(p).split(fold(group), 1)[1].lstrip() for p in card.example_prompts if fold(group) in fold(p)]
    says_noun = any(text.startswith(fold(noun)) for text in after)
    if after and not says_noun:
        return group
    says_itself = _has(fold(group), fold(noun)) or card.kind == "textual_inversion"
    return f"{group} {noun}" if says_noun or not says_itself else group


def rewrite(intent: Intent, card: Card, explained: Set[str]) -> str:
    """Return the prompt for ``card``. ``explained`` are the request's words (folded) that the card accounts for.

    A card without trigger keeps the request as it was written.
    """
    if not card.trigger:
        return intent.text
    group = next((g for g in card.trigger if _has(fold(intent.text), fold(g))), card.trigger[0])
    medium, prompt = split_medium(intent.prompt)
    if _has(fold(prompt), fold(group)):
        return _framed(medium, _kept_trigger(prompt, card, group), card)
    if is_style(card):
        return _styled(medium, prompt, card, group, explained)
    return _framed(medium, _placed(prompt, intent.head, concept_phrase(card, group), explained), card)


def prompt_for(request: str, card: Card) -> str:
    """Return the prompt for a card that is already chosen: the words it shares with the request are its own."""
    if is_marked(request):
        return with_trigger(request, card)
    texts = (card.name, card.class_noun, card.description, *card.tags)
    return rewrite(parse_request(request), card, {word for text in texts for word in terms(text)})


def plain_request(request: str) -> str:
    """Return a request without weights, tags and BREAKs, which say nothing of what is wanted."""
    return read_prompt(request).text if is_marked(request) else request


def with_trigger(prompt: str, card: Card) -> str:
    """Return a prompt with marks as it was written; the concept comes first where the prompt does not name it.

    Who writes weights writes a prompt, not a request: to put words into it would move what is weighed.
    """
    said = fold(read_prompt(prompt, card.trigger).text)
    if not card.trigger or any(_has(said, fold(group)) for group in card.trigger):
        return prompt
    group = card.trigger[0]
    named = _ending(card, group).lstrip(", ") if is_style(card) else f"a photo of {concept_phrase(card, group)}"
    return f"{named}, {prompt}"


def _has(text: str, phrase: str) -> bool:
    return bool(phrase) and re.search(rf"(?<![^\W_]){re.escape(phrase)}(?![^\W_])", text) is not None


def _kept_trigger(prompt: str, card: Card, group: str) -> str:
    """Spell the trigger canonically, once, and give it its class noun when the prompt has none."""
    pattern = re.compile(rf"(?<![^\W_]){re.escape(group)}(?![^\W_])(?:\s+{re.escape(group)}(?![^\W_]))*", re.IGNORECASE)
    text = pattern.sub(lambda _: group, prompt, count=1)
    phrase = concept_phrase(card, group)
    if phrase != group and not set(map(stem, words(card.class_noun))) <= set(map(stem, words(text))):
        text = text.replace(group, phrase, 1)
    return re.sub(rf"^(?:my|our|the)\s+(?={re.escape(group)})", "", text, flags=re.IGNORECASE)


def _framed(medium: str, prompt: str, card: Card) -> str:
    """Open a subject's prompt as its training captions do."""
    text = _EDGE.sub("", " ".join(prompt.split()))
    opening = medium or ("" if is_style(card) else "a photo of")
    return f"{opening} {text}".strip()


def _styled(medium: str, prompt: str, card: Card, group: str, explained: Set[str]) -> str:
    """Take the style's mention out of the prompt and name it at the end."""
    rest = _without_style(prompt, explained | set(words(card.name)))
    content, ending = _EDGE.sub("", " ".join(rest.split())), _ending(card, group)
    opening = "" if not medium or medium == "a photo of" else medium
    if not content:
        return f"a picture{ending}"
    return f"{opening} {content}{ending}".strip()


def _ending(card: Card, group: str) -> str:
    """Return how captions name the style, after what is in the picture."""
    if fold(group).startswith(("in the style", "image in the style")):
        return f", {group}"
    if any(_has(fold(p), f"in {fold(group)}") for p in card.example_prompts) or "style" in words(group):
        return f" in {group}"
    return f" in the style of {group}"


def _without_style(prompt: str, known: Set[str]) -> str:
    parts = style_parts(prompt)
    if parts is not None:
        concept, rest = parts
        said = [w for w in words(concept) if w not in STOP]
        if said and sum(w in known for w in said) * 2 >= len(said):
            return re.sub(r"^\s*of\s+", "", rest)
    spans = [m for m in _WORD.finditer(prompt) if _is_known(m.group(), known)]
    text = prompt
    for match in reversed(spans):
        text = text[: match.start()] + text[match.end() :]
    text = _DANGLING.sub("", text)
    text = re.sub(r"^\s*(?:an?\s+|the\s+)?(?:style\s+|look\s+|art\s+)*of\s+", "", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def _is_known(word: str, known: Set[str]) -> bool:
    parts = words(word)
    return bool(parts) and all(part in known for part in parts)


def _placed(prompt: str, head: str, phrase: str, explained: Set[str]) -> str:
    """Put ``phrase`` where the concept is mentioned; words the card does not account for stay before it."""
    text = _ASIDE.sub("", prompt)
    if same := _SAME.search(text):
        return f"{text[: same.start()]}{phrase}{text[same.end() :]}"
    at = max(text.find(head), 0)
    tokens = [m for m in _WORD.finditer(text, at)]
    end_of_head = at + len(head) if head and text.find(head) >= 0 else len(text)
    inside = [m for m in tokens if m.start() < end_of_head and _is_known(m.group(), explained)]
    mention = inside or _first_run(tokens, explained)
    if not mention:
        return f"{phrase}, {text}"
    start = _np_start(tokens, mention[0])
    last = mention[-1]
    tail = "'s" if re.search(r"['\u2019]s$", last.group()) else ""
    between = [m.group() for m in tokens if start <= m.start() < last.start()]
    kept = [w for w in between if not _is_known(w, explained) and not set(words(w)) <= STOP]
    after = _without_clause(text[last.end() :], explained)
    return f"{text[:start]}{' '.join([*kept, phrase])}{tail}{after}"


def _first_run(tokens: list[re.Match[str]], explained: Set[str]) -> list[re.Match[str]]:
    run: list[re.Match[str]] = []
    for token in tokens:
        if _is_known(token.group(), explained):
            run.append(token)
        elif run:
            break
    return run


def _np_start(tokens: list[re.Match[str]], first: re.Match[str]) -> int:
    """Return where the phrase around ``first`` begins: its adjectives and its article or possessive belong to it."""
    start = first.start()
    for token in reversed([t for t in tokens if t.start() < first.start()]):
        is_small = set(words(token.group())) <= STOP
        if is_small and fold(token.group()) not in _ARTICLES:
            break
        start = token.start()
        if is_small:
            break
    return start


_ARTICLES = frozenset(
    ["a", "an", "the", "my", "our", "your", "his", "her", "their", "this", "that", "these", "those", "some"]
)


def _without_clause(after: str, explained: Set[str]) -> str:
    """Drop a description right after the concept ('with a red collar') when the card accounts for most of it."""
    match = re.match(
        r"\s*,?\s*(?:with|that has|who has|having|wearing)\s+([^,.;]+?)(?=\s+(?:on|in|at|near|under|by|\w+ing)\b|[,.;]|$)",
        after,
        re.I,
    )
    if match is None:
        return after
    said = [w for w in words(match.group(1)) if w not in STOP]
    known = sum(w in explained for w in said)
    return after[match.end() :] if said and known * 2 > len(said) else after
