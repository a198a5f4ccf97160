"""Calibration prompts made from a card: the trigger in several scenes and positions, and prompts without it. Seeded."""

import hashlib
import json
import random

from personalq.cards.card import Card, is_style
from personalq.prompts import is_marked, read_prompt

SCENES = (
    "on the beach",
    "in the forest",
    "in the snow",
    "in the city",
    "on a table in the kitchen",
    "in the desert",
    "under a night sky",
    "in a green meadow",
)
SUBJECT_FRAMES = ("a photo of {subject} {scene}", "{scene}, {subject}", "a picture of {subject}", "{subject} {scene}")
STYLE_FRAMES = (
    "a dog {scene} in the style of {subject}",
    "{scene} in the style of {subject}",
    "{subject}, a house {scene}",
)
PLAIN = ("a red car {scene}", "a blue bird {scene}", "a house {scene}")


def subject_of(card: Card) -> str:
    """The words that name the concept: the canonical trigger, plus the class noun if the trigger does not contain it."""
    trigger = card.trigger[0] if card.trigger else ""
    noun = "" if is_style(card) or card.class_noun.lower() in trigger.lower().split() else card.class_noun
    return " ".join(part for part in (trigger, noun) if part) or card.name


def calibration_prompts(card: Card, count: int, seed: int = 0) -> list[str]:
    """`count` prompts, three in four with the trigger; the card's own examples come first."""
    generator = random.Random(f"{seed}/{card.id}")
    frames = STYLE_FRAMES if is_style(card) else SUBJECT_FRAMES
    subject = subject_of(card)
    prompts = [p for p in plain_examples(card) if p][: count // 4]
    for index in range(count - len(prompts)):
        frame = generator.choice(PLAIN if index % 4 == 3 else frames)
        prompts.append(frame.format(subject=subject, scene=generator.choice(SCENES)))
    return prompts


def plain_examples(card: Card) -> list[str]:
    """The card's own prompts as text encoders see them: without weights and adapters' tags."""
    return [
        read_prompt(text, card.trigger).text.strip() if is_marked(text) else text.strip()
        for text in card.example_prompts
    ]


def prompts_sha256(prompts: list[str]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
