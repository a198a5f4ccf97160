"""A few of many that differ: always the one whose nearest chosen neighbour is farthest (Gonzalez 1985)."""

from collections.abc import Mapping

Words = Mapping[str, float]


def different(words: Mapping[str, Words], most: int, start: int = 0) -> list[str]:
    """`most` of the names at most, in the order they are chosen; of equals the first. words: of each name, with weights.

    start: the place of the name that is chosen first.
    """
    names = list(words)
    if len(names) <= most or most < 1:
        return names[: max(most, 0)]
    taken: list[str] = []
    distance = dict.fromkeys(names, 2.0)
    last = names[start % len(names)]
    while len(taken) < most:
        taken.append(last)
        del distance[last]
        distance = {name: min(d, difference(words[name], words[last])) for name, d in distance.items()}
        last = max(distance, key=lambda name: distance[name], default="")
    return taken


def difference(a: Words, b: Words) -> float:
    """1 minus the weighted share of words that both have (Jaccard 1901), 0..1."""
    both = sum(weight for word, weight in a.items() if word in b)
    return 1.0 - both / max(sum({**a, **b}.values()), 1e-12)
