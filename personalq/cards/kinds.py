"""What kind a checkpoint is, and the words that people write for it. One table for cards, catalogues and sidecars."""

from __future__ import annotations

import re
from typing import Literal, get_args

Kind = Literal["dreambooth", "lora", "textual_inversion", "custom_diffusion"]
KINDS: tuple[str, ...] = get_args(Kind)
MAX_WORD = 60

# Every word a kind goes by, as `_plain` leaves it.
_WORDS = {
    "dreambooth": "dreambooth db checkpoint checkpointmerge merge full fullmodel fullcheckpoint finetune finetuned"
    " finetuning finetunedmodel fullfinetune fullfinetuned fullfinetuning",
    "lora": "lora loras locon loha lokr dora dylora lycoris lyco lierla c3lier dreamboothlora loradreambooth pivotal"
    " pivotaltuning pivotaltuninglora",
    "textual_inversion": "textualinversion textualinversions ti embedding embeddings textembedding negativeembedding",
    "custom_diffusion": "customdiffusion custom",
}
KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_NOT_HERE = (
    "hypernetwork hypernet aestheticgradient controlnet controlnets t2iadapter ipadapter vae upscaler motionmodule"
    " detection poses wildcards workflow workflows"
)
UNSUPPORTED = frozenset(_NOT_HERE.split())
CIVITAI = frozenset({"checkpoint", "textualinversion", "lora", "locon", "dora"})  # what Civitai itself writes


def known_kind(text: str) -> str:
    """The kind that a word such as 'LoCon', 'full-finetune' or 'TI' stands for, or ''."""
    return KIND_OF.get(_plain(text), "")


def civitai_kind(text: str) -> str:
    """The kind of a Civitai type; a word that is none of theirs stays as it is, so that the card says how it is read."""
    return known_kind(text) if _plain(text) in CIVITAI else text.strip()


def is_unsupported(text: str) -> bool:
    """Tell whether a word names something that is no checkpoint here: a hypernetwork, a ControlNet, a VAE, ..."""
    return _plain(text) in UNSUPPORTED


def kind_note(said: object, kind: str) -> str:
    """What to say about a card's kind beside the one that holds (for weights: what they are); '' when it is the same word."""
    word = said.strip() if isinstance(said, str) else str(said)
    if word.lower() == kind:
        return ""
    if known_kind(word) == kind:
        return f"kind {word[:MAX_WORD]!r} was read as {kind}"
    known = ", which is not supported" if is_unsupported(word) else ", a kind that is not known here"
    known = "" if known_kind(word) else known
    return f"the card says {word[:MAX_WORD]!r}{known}; the weights are {kind}, and they decide"


def kind_problem(word: str) -> str:
    """Why a card of such a kind is refused: what a kind must be, and what it is."""
    if is_unsupported(word):
        return f"kind {word[:MAX_WORD]!r} is not supported; must be one of {', '.join(KINDS)}; leave the card out"
    got = repr(word[:MAX_WORD]) if word else "none"
    return f"kind must be one of {', '.join(KINDS)}, got {got}; fix the card"


def _plain(text: str) -> str:
    """Letters and digits alone, in lower case: 'Fine-tuned' and 'fine_tuned' are one word."""
    return re.sub(r"[^a-z0-9]+", "", text[: 4 * MAX_WORD].lower())
