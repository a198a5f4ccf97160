"""A base's own prompts: they span what it draws. From its README, else many subjects, scenes and media in plain English."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from personalq.cards.card import MAX_LINE, Card, clean_text, is_style
from personalq.cards.readme import read_readme
from personalq.prompts import is_marked, read_prompt

from ..prompts import SCENES

README = "README.md"
BROAD = (
    # people
    "a portrait photo of an old man with a grey beard",
    "a young woman laughing in a busy street",
    "two children playing football in a park",
    "a chef in a white jacket cooking in a restaurant kitchen",
    "an astronaut walking on the moon",
    "a crowd of people at a concert at night",
    "an oil painting of a girl in a blue dress",
    "a black and white photo of a man reading a newspaper",
    # animals
    "a photo of a dog running on the beach",
    "a cat sleeping on a sofa, close-up",
    "a herd of elephants in the savanna at sunset",
    "an eagle flying over snowy mountains",
    "a macro photo of a bee on a yellow flower",
    "a watercolour painting of a fox in the forest",
    "a shoal of colourful fish on a coral reef",
    "a horse in a green field under a cloudy sky",
    # objects
    "a vintage camera on a wooden table",
    "a red leather backpack, product photo on a white background",
    "a glass vase with tulips by a window",
    "a stack of old books beside a burning candle",
    "a pair of running shoes on a concrete floor",
    "a mechanical wristwatch, macro photo",
    "an acoustic guitar leaning against a brick wall",
    "a wooden toy robot on a shelf, soft light",
    # vehicles
    "a red sports car on a mountain road",
    "a steam train crossing a stone bridge",
    "a sailing boat on a calm sea at dawn",
    "a bicycle leaning against a yellow wall",
    "a passenger plane above the clouds",
    "a rusty pickup truck in the desert",
    # buildings
    "a medieval castle on a hill",
    "a modern glass skyscraper seen from below",
    "a small wooden cabin in the snow",
    "a narrow street with old houses in the rain",
    "a lighthouse on a cliff during a storm",
    "the ruins of a temple in the jungle",
    # landscapes
    "a lake between mountains, wide-angle photo",
    "a field of lavender in the evening sun",
    "a waterfall in a dense green forest",
    "sand dunes under a starry night sky",
    "a winter landscape with a frozen river",
    "a city skyline at night reflected in water",
    # food
    "a bowl of ramen with an egg, top view",
    "a slice of chocolate cake on a plate",
    "a basket of fresh vegetables at a market",
    "a cup of coffee and a croissant on a table",
    "a pizza in front of a wood-fired oven",
    # interiors
    "a cosy living room with a fireplace",
    "a bright kitchen with white tiles",
    "a library with tall shelves and a ladder",
    "an empty hospital corridor",
    "a bathroom with a round mirror and green plants",
    # media and styles
    "a pencil sketch of a sleeping lion",
    "an anime illustration of a girl with a sword",
    "a pixel art picture of a spaceship",
    "a flat vector illustration of a city park",
    "a 3d render of a cute monster, studio lighting",
    "an impressionist painting of a harbour",
    "a comic book panel of a superhero jumping from a roof",
    "an abstract painting of blue and orange shapes",
    "a vintage travel poster of a beach",
    "a blueprint of a machine, white lines on blue paper",
    "a fantasy landscape with floating islands, digital art",
    "a night photo of a neon sign in a rainy alley",
)


def own_prompts(base_dir: Path, cards: Sequence[Card], count: int, seed: int = 0) -> list[str]:
    """`count` prompts: the README's; where they are too few, the checkpoints' class nouns in scenes and BROAD as well.

    cards: the base's checkpoints.
    """
    written = written_prompts(base_dir)
    if len(written) >= count:
        return spread(written, count, seed)
    nouns = spread(noun_prompts(cards), min(count // 4, count - len(written)), seed)
    return [*written, *nouns, *spread(BROAD, count - len(written) - len(nouns), seed)]


def base_golden_prompts(base_dir: Path) -> list[str]:
    """The empty prompt, then two of the base's own that differ."""
    written = written_prompts(base_dir)
    return ["", *spread(written if len(written) > 1 else [*written, *BROAD[:2]], 2, 0)]


def written_prompts(base_dir: Path) -> list[str]:
    """The example prompts of the base's README (`widget:`), as text encoders see them; [] without any."""
    file = base_dir / README
    if not file.is_file():
        return []
    found = read_readme(file.read_text(encoding="utf-8", errors="replace")).get("example_prompts")
    texts = [read_prompt(text).text if is_marked(text) else text for text in (found[0] if found else ())]
    return list(dict.fromkeys(line for text in texts if (line := clean_text(text, MAX_LINE))))


def noun_prompts(cards: Sequence[Card]) -> list[str]:
    """Each class noun of these cards in a scene of its own."""
    nouns = sorted({card.class_noun for card in cards if card.class_noun and not is_style(card)})
    return [f"a photo of {_article(noun)} {SCENES[i % len(SCENES)]}" for i, noun in enumerate(nouns)]


def spread(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the prompts at most, in their own order: one after the other whose words were seen least in those before it.

    seed: which of them comes first.
    """
    words = {prompt: set(re.findall(r"[a-z0-9]+", prompt.lower())) for prompt in prompts}
    left, taken, seen = list(words), set[str](), Counter[str]()
    following = left[seed % len(left)] if left else ""
    while left and len(taken) < count:
        taken.add(following)
        left.remove(following)
        seen.update(words[following])
        following = max(left, key=lambda prompt: sum(1 / (1 + seen[word]) ** 2 for word in words[prompt]), default="")
    return [prompt for prompt in words if prompt in taken]


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"
