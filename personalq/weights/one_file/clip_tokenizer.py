"""CLIP's tokenizer as every Stable Diffusion has it, from the vocabulary that we ship: for bases that come as one file.

`clip/bpe_simple_vocab_16e6.txt.gz` is OpenAI's byte-pair vocabulary, as open_clip publishes it (MIT, clip/LICENSE).
Byte-level BPE with `</w>` at the end of words (Sennrich et al. 2016; Radford et al. 2021, section 2.4).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

VOCABULARY = Path(__file__).parent / "clip" / "bpe_simple_vocab_16e6.txt.gz"
N_MERGES = 48894  # 2 x 256 letters, these and two marks are CLIP's 49408 tokens
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
N_TOKENS = 49408
_SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def write_tokenizer(folder: Path, pad: str) -> None:
    """Write a tokenizer folder as transformers 4 and 5 read it. pad: the token that fills a prompt up."""
    folder.mkdir(parents=True)
    vocab, merges = vocabulary()
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    files = {
        "vocab.json": vocab,
        "tokenizer.json": tokenizer_json(vocab, merges),
        "tokenizer_config.json": config,
        "special_tokens_map.json": {
            name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in the order of their ranks)."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")[1 : N_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def tokenizer_json(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """CLIP's tokenizer as the tokenizers library reads it: clean and lower the text, split it into words, BPE, marks."""
    marks = [
        {
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in (BEGIN, END)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": marks,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocab[END]],
            "cls": [BEGIN, vocab[BEGIN]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def _byte_letters() -> list[str]:
    """A printable letter for each byte, printable bytes first: the order that CLIP's ids follow."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
