"""The gallery's tokenizer: a real CLIP BPE tokenizer whose every word is one token."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTokenizer

from .world import ACCESSORIES, COLOURS, MARKS, OBJECTS, PATTERNS

START, END = "<|startoftext|>", "<|endoftext|>"
RARE = ("sks", "zwx", "ohwx", "bnha", "xjq", "vlk", "qeb", "trk")  # trigger strings no caption uses
WORDS = """
a an the of in on at under with and or my your his her their our is it its this that to for by from as very photo
picture image drawing painting sketch poster style portrait scene view draw show make give me want please some one
two beach forest snow city kitchen desert night sky meadow sea sand grass tree flower house street star moon sun
mountain garden wearing hat scarf bow collar plain striped dotted checkered spotted stripe dot check mark heart
patch band bib spot belly dog cat backpack mug car robot bird puppy kitten bag cup coffee tea pet toy animal kid old
new little big small cute happy red orange yellow green blue purple pink white black brown grey gray teal cream navy
gold silver dark light bright colour color school hiking travel moss blueprint chalk pastel line lines outline
outlines flat paper mister pepper biscuit domino maple sitting standing next near front behind over good nice
favourite favorite best first last day morning evening winter summer , . ! ? - _ ' < > / 0 1 2 3 4 5 6 7 8 9 i you
he she we they
""".split()  # noqa: SIM905


def byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes that CLIP's vocabulary begins with."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in [*kept, *sorted(set(range(256)) - set(kept))]]


def word_list() -> list[str]:
    """Every word of the world, of requests about it, and the rare triggers."""
    world = [*OBJECTS, *COLOURS, *PATTERNS, *ACCESSORIES, *MARKS]
    return list(dict.fromkeys(w.lower() for w in [*WORDS, *world, *RARE]))


def build_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token: what exists is applied in rank order, the rest is joined left to right."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in list(merges):
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == pair:
                    pieces[i : i + 2] = ["".join(pair)]
                i += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[0:2] = [pieces[0] + pieces[1]]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer, pad = eos as in SD 1.x."""
    merges = build_merges(word_list())
    letters = byte_characters()
    tokens = dict.fromkeys([*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END])
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, model_max_length=77, bos_token=START, eos_token=END, pad_token=END, unk_token=END
    )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer with the vocab.json and merges.txt that older tools read."""
    build_tokenizer().save_pretrained(folder)
    merges = build_merges(word_list())
    vocab = build_tokenizer().get_vocab()
    ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
