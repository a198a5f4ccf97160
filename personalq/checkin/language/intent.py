"""What a request asks for: the concept, what describes it, and what is only around it. Rules over function words.

The zones are hints for the scorer, not decisions: terms outside the head still count, only less.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

MAX_REQUEST = 2000
_COMMAND = re.compile(
    r"^(?:\s*(?:please|hey|hi|hello|now|ok|okay|can you|could you|would you|i want|i need|i'd like|i would like|let's|"
    r"give me|show me|get me|make me|draw me|paint me|make|draw|generate|create|paint|render|produce|imagine|use|put|"
    r"to (?:see|have|make|draw)|see|have|do|turn|write)\b[\s,:]*)+",
    re.IGNORECASE,
)
_PICTURE = re.compile(
    r"^(?:an?|the|some|one|another|new|nice|good|pretty|cool|high.quality|\s)*\b"
    r"(?:photo(?:graph)?|picture|image|pic|shot|render(?:ing)?|drawing|painting|illustration|portrait)s?\s+(?:of|with|showing)\b\s*",
    re.IGNORECASE,
)
_PHOTO = frozenset({"photo", "photograph", "picture", "image", "pic", "shot"})
_MEDIUM_LEAD = re.compile(
    r"^(?:an?|the|some|my)?\s*(?P<word>photo(?:graph)?|picture|image|pic|shot|render(?:ing)?|drawing|painting|illustration|"
    r"portrait|sketch)s?\s+of\s+",
    re.IGNORECASE,
)
_HISTORY = re.compile(r"^\s*earlier:\s*(?P<before>.+?)\.?\s+now:\s*(?P<now>.+)$", re.IGNORECASE | re.DOTALL)
_STYLES = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"(?P<rest>.*?)\b(?:in|with|using)\s+(?:the|an?)?\s*(?:style|look|manner|aesthetic)\s+of\s+(?P<concept>.+)",
        r"(?P<rest>.*?)\b(?:look(?:s|ing)?|drawn|painted|made|done)\s+(?:just\s+)?like\s+(?P<concept>.+)",
        r"(?P<rest>.+?)\b(?:in|with|using|as)\s+(?:the|an?|my|our)?\s*"
        r"(?P<concept>(?:(?!\b(?:in|on|at|with|as)\b)[^,.:;]){2,50}?)[\s-]+(?:style|look|manner|aesthetic)\b(?P<more>.*)",
        r"(?P<concept>[^,.:;]{2,50}?)[\s-]+(?:style|version|look)\b(?:\s+of)?(?P<rest>.*)",
        r"(?P<concept>[^:]{2,80}):\s(?P<rest>.+)",
    )
)
_MEDIUM = re.compile(
    r"(?P<concept>(?!my\b|our\b)[^,.:;]{2,50}?)(?<!made)(?<!full)\s+of\s+(?P<rest>.+)", re.IGNORECASE | re.DOTALL
)
_PARTITIVE = re.compile(
    r"^(?:an?|the|some|my|one|two|\s)*(?:\w+\s+){0,2}?(?:bunch|bowl|plate|platter|dish|cup|mug|glass|pile|pair|group|bit|piece|slice|"
    r"page|bag|box|jar|lot|kind|sort|couple|handful|set|row|stack|crowd|herd|flock|statue|figure)s?\s+of\s+",
    re.IGNORECASE,
)
_LIKE = re.compile(
    r"^(?:(?P<rest>.{3,}?),?\s+)?(?:as\s+(?:those|these)|(?:just\s+)?like\s+(?:in\s+)?(?:those|the|my|an?|they)|the\s+way)\s+"
    r"(?P<concept>.+)",
    re.IGNORECASE | re.DOTALL,
)
# 'Turn the farm into wool', 'a skull made of dots': what it becomes is wanted, unless the thing is a known one.
_BECOMES = (
    re.compile(
        r"^(?:turn|transform|convert|change|morph|remake|make)\s+(?P<rest>(?!my\b|our\b).{3,60}?)\s+into\s+(?P<concept>.+)",
        re.IGNORECASE | re.DOTALL,
    ),
    re.compile(
        r"^(?!(?:my|our|the|that|this|those|these)\b)(?P<rest>.{3,60}?)\s+"
        r"(?:(?:turned|transformed|converted)\s+into|(?:built|made|carved|sculpted|molded|woven|knitted|sewn)\s+"
        r"(?:from|of|out of|in|with)|(?=(?:painted|drawn|sketched|printed|engraved|etched|written)\s+(?:on|in|with|by)\b))"
        r"\s*(?P<concept>.+)",
        re.IGNORECASE | re.DOTALL,
    ),
)
_QUOTED = re.compile(
    r"(?<!\w)(?:(?:that\s+)?(?:saying|says?|reads?|reading|with|the (?:words?|text))\s+)?"
    r"(?:'[^']{2,60}'|\"[^\"]{2,60}\"|\u2018[^\u2019]{2,60}\u2019|\u201c[^\u201d]{2,60}\u201d)(?!\w)"
    r"|\b(?:(?:that|which)\s+)?(?:says|saying|reads)\s+[^,.;'\"]{1,60}",
    re.IGNORECASE,
)
_SCENE = re.compile(
    r",|\b(?:in|on|at|near|next to|beside|besides|behind|under|underneath|over|above|inside|outside|into|onto|through|"
    r"around|between|among|against|along|across|during|while|as|from|to|for|by|wearing|dressed|holding|riding|"
    r"(?!king|ring|thing|string|wing|painting|drawing|coloring|colouring|lounging|ringing|steaming|knitting|clothing)\w{3,}ing|asleep)\b",
    re.IGNORECASE,
)
_ATTRIBUTE = re.compile(r"\b(?:with|that|which|who|whose|having|shaped|made of|full of)\b", re.IGNORECASE)
_STYLE_CUE = re.compile(
    r"\b(?:style[ds]?|look|aesthetic|manner|version|stlye|art|drawing|sketch|painting|look(?:s|ing)? like)\b",
    re.IGNORECASE,
)
_PERSONAL = re.compile(r"\b(?:my|our|mine|mi|mein|meine|unser|mon|ma)\b", re.IGNORECASE)
_FAMILIES = (
    ("flux2", re.compile(r"\bflux[ .-]?2\b", re.IGNORECASE)),
    ("flux", re.compile(r"\bflux(?![ .-]?2\b)(?:[ .-]?1)?\b", re.IGNORECASE)),
    ("sdxl", re.compile(r"\b(?:sd[ -]?xl|stable[ -]diffusion[ -]xl|xl[ -]base|pony|illustrious)\b", re.IGNORECASE)),
    ("sd3", re.compile(r"\b(?:sd[ -]?3(?:\.5)?|stable[ -]diffusion[ -]3)\b", re.IGNORECASE)),
    ("sd2", re.compile(r"\b(?:sd[ -]?v?2(?:[.-][01])?|stable[ -]diffusion[ -]v?2)\b", re.IGNORECASE)),
    ("sd1", re.compile(r"\bsd(?:[ -]?v?1(?:[.-][45])?|15)|\bstable[ -]diffusion(?![ -]?(?:v?[23]|xl))", re.IGNORECASE)),
)  # fmt: skip
_NO_LORA = re.compile(r"\b(?:not|rather than|instead of|no)\s+(?:an?\s+)?lora\b", re.IGNORECASE)
_KINDS = (
    ("dreambooth", re.compile(r"\b(?:full|whole)\b[\w .]{0,20}\b(?:checkpoint|model)\b|\bdreambooth\b", re.IGNORECASE)),
    ("lora", re.compile(r"\bloras?\b", re.IGNORECASE)),
    ("textual_inversion", re.compile(r"\b(?:embedding|textual[ -]inversion)\b", re.IGNORECASE)),
    ("custom_diffusion", re.compile(r"\bcustom[ -]diffusion\b", re.IGNORECASE)),
)


@dataclass(frozen=True, slots=True)
class Intent:
    """A request taken apart. ``head`` names the concept, ``attribute`` describes it, ``scene`` is around it.

    ``described`` is the text without what is quoted: letters to be drawn say nothing about who draws them.
    """

    text: str
    described: str
    prompt: str
    head: str
    attribute: str
    scene: str
    has_style_cue: bool
    is_personal: bool
    families: frozenset[str]
    kinds: frozenset[str]


def parse_request(request: str) -> Intent:
    """Take a request apart. Never fails; text beyond 2000 characters is ignored."""
    text = " ".join(request[:MAX_REQUEST].split())
    if match := _HISTORY.match(text):
        before, now = match["before"].strip("'\" "), match["now"]
        described = text
        head, attribute, scene = _zones(before.replace("(done)", " ").strip("'\". "))
        prompt, scene = strip_order(now), f"{scene} {now}"
    else:
        prompt, described = strip_order(text), " ".join(_QUOTED.sub(" ", text).split()) or text
        head, attribute, scene = _zones(described)
        scene = " ".join([scene, *_QUOTED.findall(text)]).strip()
    return Intent(
        text=text,
        described=described,
        prompt=prompt,
        head=head,
        attribute=attribute,
        scene=scene,
        has_style_cue=_STYLE_CUE.search(text) is not None,
        is_personal=_PERSONAL.search(text) is not None,
        families=families_in(text),
        kinds=_kinds(text),
    )


def strip_order(text: str) -> str:
    """Remove what is said to the program: 'please draw me a picture of my dog' -> 'a picture of my dog'."""
    return _COMMAND.sub("", text.strip()).strip() or text.strip()


def strip_command(text: str) -> str:
    """Remove the order and the kind of picture: 'please draw me a picture of my dog' -> 'my dog'."""
    rest = _PICTURE.sub("", _COMMAND.sub("", text.strip()), count=1).strip()
    return rest or text.strip()


def split_medium(prompt: str) -> tuple[str, str]:
    """Split off what kind of picture is wanted: 'a painting of my cat' -> ('a painting of', 'my cat')."""
    match = _MEDIUM_LEAD.match(prompt)
    if match is None:
        return "", prompt
    word = match["word"].lower()
    lead = "a photo of" if word in _PHOTO else f"{'an' if word[0] in 'aeio' else 'a'} {word} of"
    return lead, prompt[match.end() :]


def style_parts(text: str) -> tuple[str, str] | None:
    """Return (style, rest) when a phrase such as 'X in the style of Y', 'Y style X' or 'Y: X' names a style."""
    for pattern in _STYLES:
        if match := pattern.match(text):
            return match["concept"].strip(), f"{match['rest']}{match.groupdict().get('more', '')}".strip()
    return None


@functools.lru_cache(maxsize=4096)
def families_in(text: str) -> frozenset[str]:
    """Return the model families a text names: sd1, sd2, sd3, sdxl, flux, flux2."""
    plain = text.replace("_", " ")
    return frozenset(name for name, pattern in _FAMILIES if pattern.search(plain))


def _kinds(text: str) -> frozenset[str]:
    if _NO_LORA.search(text):
        return frozenset({"dreambooth"})
    return frozenset([name for name, pattern in _KINDS if pattern.search(text)][:1])


def _zones(text: str) -> tuple[str, str, str]:
    """Split into (head, attribute, scene). What is done 'like those drawings' is wanted as much as the drawings are."""
    if match := _BECOMES[0].match(text) or _BECOMES[1].match(strip_command(text)):
        head, _, more = match["concept"].strip().partition(",")
        return head, "", f"{match['rest']} {more}".strip()
    text = strip_command(text)
    if _PARTITIVE.match(text):
        return _subject(text)
    for pattern in (*_STYLES, _MEDIUM):
        match = pattern.match(text)
        if match is None:
            continue
        concept, rest = match["concept"].strip(), f"{match['rest']}{match.groupdict().get('more', '')}".strip()
        if pattern is _MEDIUM and _PERSONAL.match(rest):
            concept, rest = f"{concept} {rest}", ""
        head, attribute, scene = _subject(strip_command(concept))
        return head, attribute, f"{scene} {rest}".strip()
    if match := _LIKE.match(text):
        head, attribute, scene = _subject(match["concept"].strip())
        return head, f"{attribute} {scene} {match['rest'] or ''}".strip(), ""
    return _subject(text)


def _subject(text: str) -> tuple[str, str, str]:
    start = len(text) - len(text.lstrip(" ,"))
    first_word = re.compile(r"\s*[^\s,]+").match(text, start)
    scene_at = _SCENE.search(text, first_word.end() if first_word else 0)
    kept, scene = (text[: scene_at.start()], text[scene_at.start() :]) if scene_at else (text, "")
    attribute_at = _ATTRIBUTE.search(kept, first_word.end() if first_word else 0)
    if attribute_at is None:
        return kept.strip(), "", scene.strip()
    return kept[: attribute_at.start()].strip(), kept[attribute_at.start() :].strip(), scene.strip()
