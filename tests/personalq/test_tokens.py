"""Prompts become the ids that transformers' CLIPTokenizer gives, and what does not fit is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from personalq.bundle import Text
from personalq.errors import BundleError, MissingExtraError, PromptError
from personalq.prompts import literal, read_prompt
from personalq.tokens import Tokenizer

FILE = Path(__file__).parents[1] / "data" / "tiny_tokenizer.json"
BOS, EOS = 581, 582
SKS, DOG, MOSS, MOSS_1 = 575, 539, 583, 584
TEXT = Text(bos_id=BOS, eos_id=EOS, pad_id=EOS, expansions={"<moss-mug>": "<moss-mug> <moss-mug>_1"})

PROMPTS = [
    "",
    " ",
    "a photo of sks dog",
    "A Photo of SKS   dog, on the\tbeach!\n",
    "the dog's mug isn't red; 3 cats & 12 dogs",
    "caf\u00e9 na\u00efve \u0130stanbul \u5c71 \U0001f436 e\u0301",
    "zzzunknownwordzzz",
    "<moss-mug> in the snow",
    "a <moss-mug>, a <moss-mug>_1 and a<moss-mug>b",
    "<|endoftext|> a dog <|startoftext|>",
    "a photo of the dog in the snow " * 15,
    "unknownword " * 30,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FILE, TEXT)


def test_a_prompt_is_begin_words_end_and_padding(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode("a photo of sks dog")
    assert encoded.ids.shape == (77,) and encoded.ids.dtype == np.int64
    assert encoded.ids[[0, 4, 5, 6, 76]].tolist() == [BOS, SKS, DOG, EOS, EOS]
    assert (encoded.n_words, encoded.cut, len(encoded.tokens)) == (5, "", 5)


def test_padding_uses_the_id_the_bundle_names() -> None:
    ids = Tokenizer(FILE, TEXT.model_copy(update={"pad_id": 0})).encode("a dog").ids
    assert ids[3] == EOS and not ids[4:].any()


def test_seventy_five_words_fit_and_the_rest_is_told(tokenizer: Tokenizer) -> None:
    fits = tokenizer.encode("dog " * 75)
    assert (fits.n_words, fits.cut) == (75, "")
    long = tokenizer.encode("dog " * 75 + "on the beach")
    assert (long.n_words, long.cut, len(long.tokens)) == (75, "on the beach", 78)
    assert long.ids[76] == EOS


def test_a_multi_vector_trigger_is_written_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_ids("<moss-mug>") == (MOSS, MOSS_1)
    assert tokenizer.token_ids("a <moss-mug> mug")[1:3] == (MOSS, MOSS_1)


@pytest.mark.parametrize(
    ("prompt", "expanded"),
    [
        ("<moss-mug> x", "<moss-mug> <moss-mug>_1 x"),
        ("<moss-mug> <moss-mug>_1 x", "<moss-mug> <moss-mug>_1 x"),
        ("<moss-mug>_1 x", "<moss-mug>_1 x"),
        ("<Moss-Mug> x", "<moss-mug> <moss-mug>_1 x"),
    ],
    ids=["alone", "written out already", "only a later part", "other case"],
)
def test_expansion_happens_once(tokenizer: Tokenizer, prompt: str, expanded: str) -> None:
    assert tokenizer.expand(prompt) == expanded


def test_a_prompt_without_marks_has_the_ids_that_it_always_had(tokenizer: Tokenizer) -> None:
    for prompt in PROMPTS:
        encoded, chunks = tokenizer.encode(prompt), tokenizer.chunks(read_prompt(prompt), 1)
        assert (chunks.ids == encoded.ids[None]).all() and (chunks.weights == 1).all(), prompt
        assert (chunks.cut, chunks.tokens) == (encoded.cut, encoded.tokens), prompt
        assert (tokenizer.chunks(literal(prompt), 8).ids[0] == encoded.ids).all() or encoded.cut


def test_weights_stand_at_their_tokens_and_marks_are_no_tokens(tokenizer: Tokenizer) -> None:
    chunks = tokenizer.chunks(read_prompt("a (<moss-mug>:1.5) and [sks] <lora:x:1> dog"), 8)
    plain = tokenizer.encode("a <moss-mug> and sks dog")
    assert (chunks.ids == plain.ids[None]).all()
    n = plain.n_words
    assert chunks.weights.dtype == np.float32 and chunks.weights[0, 1:4].tolist() == [1.0, 1.5, 1.5]
    assert chunks.weights[0, n - 1] == np.float32(1 / 1.1) and (chunks.weights[0, n:] == 1).all()


def test_break_ends_a_chunk_where_there_may_be_two(tokenizer: Tokenizer) -> None:
    two = tokenizer.chunks(read_prompt("a dog BREAK on the beach"), 8)
    assert [row.tolist() for row in two.ids] == [tokenizer.encode(t).ids.tolist() for t in ("a dog", "on the beach")]
    one = tokenizer.chunks(read_prompt("a dog BREAK on the beach"), 1)
    assert (one.ids == tokenizer.encode("a dog on the beach").ids[None]).all()


def test_a_long_prompt_is_laid_over_chunks_and_its_trigger_is_not_torn(tokenizer: Tokenizer) -> None:
    prompt = read_prompt("dog " * 74 + "<moss-mug> on the beach")
    chunks = tokenizer.chunks(prompt, 8, [(MOSS, MOSS_1)])
    assert chunks.ids.shape == chunks.weights.shape == (2, 77)
    assert chunks.ids[0].tolist() == [BOS, *[DOG] * 74, EOS, EOS]
    assert (chunks.ids[1] == tokenizer.encode("<moss-mug> on the beach").ids).all()
    assert tokenizer.chunks(prompt, 8).ids[0, 75] == MOSS


def test_what_has_no_room_is_told_with_its_words(tokenizer: Tokenizer) -> None:
    chunks = tokenizer.chunks(read_prompt("dog " * 150 + "(on the:1.2) beach BREAK snow"), 2)
    assert (len(chunks.ids), chunks.cut, chunks.n_cut) == (2, "on the beach   snow", 4)
    torn = tokenizer.chunks(read_prompt("dog " * 74 + "zzzz sks"), 1)
    assert (torn.cut, torn.n_cut, torn.lost) == ("zzz sks", 2, "zzzz")


@pytest.mark.parametrize(
    ("text", "room", "word"),
    [
        ("a red dog", 2, "dog"),
        ("a red zzdog on", 3, "zzdog"),
        ("a " + "z" * 200, 101, "z" * 40),
        ("a " + "z" * 200, 3, "z" * 40),
        ("dog", 0, "dog"),
    ],
    ids=["whole", "inside", "far inside without spaces", "inside without spaces", "first"],
)
def test_the_first_lost_word_is_named_whole(text: str, room: int, word: str) -> None:
    short = Tokenizer(FILE, TEXT.model_copy(update={"length": room + 2}))
    assert short.chunks(read_prompt(text), 1).lost == word


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError) as error:
        tokenizer.encode("a \ud800 dog")
    assert str(error.value) == "prompt: must be Unicode text, got a lone surrogate at character 2; remove it"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as error:
        Tokenizer(tmp_path / "tokenizer.json", TEXT)
    expected = f"{tmp_path}/tokenizer.json: must be a tokenizer.json, got no file; export the checkpoint again"
    assert str(error.value) == expected


def test_a_broken_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json: must be a tokenizer\.json, got .*; export the checkpoint"):
        Tokenizer(tmp_path / "tokenizer.json", TEXT)


def test_a_missing_tokenizers_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"tokenizers is not installed; run: pip install 'personalq\[cpu\]'"):
        Tokenizer(FILE, TEXT)


def test_truncation_and_padding_stored_in_the_file_do_not_matter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = json.loads(FILE.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    strategy = {"Fixed": 77}
    content["padding"] = {"strategy": strategy, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    prompt = "a photo of the dog in the snow on the beach"
    assert (Tokenizer(tmp_path / "tokenizer.json", TEXT).encode(prompt).ids == tokenizer.encode(prompt).ids).all()


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copy(FILE, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    ours = Tokenizer(FILE, TEXT.model_copy(update={"expansions": {}}))
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt).ids.tolist() == expected, prompt


GALLERY_BASES = sorted((Path(__file__).parents[2] / "gallery" / "repository" / "bases").glob("*/tokenizer"))


@pytest.mark.parametrize("folder", GALLERY_BASES, ids=lambda folder: folder.parent.name)
def test_ids_of_a_gallery_base_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(folder))
    text = Text(bos_id=theirs.bos_token_id, eos_id=theirs.eos_token_id, pad_id=theirs.pad_token_id)
    ours = Tokenizer(folder / "tokenizer.json", text)
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt).ids.tolist() == expected, prompt


def test_expansion_is_that_of_diffusers(tokenizer: Tokenizer) -> None:
    """Expected texts: maybe_convert_prompt of diffusers 0.42.1 (importing it takes longer than all tests here)."""
    whole = "<moss-mug> <moss-mug>_1"
    assert tokenizer.expand("a photo of <moss-mug> in the snow") == f"a photo of {whole} in the snow"
    assert tokenizer.expand("two <moss-mug> and a<moss-mug>") == f"two {whole} and a{whole}"
    assert tokenizer.expand("no trigger") == "no trigger"


LEARNED = ["<moss>", "<moss>_1", "<Rex-Dog>", "s1z2", "ünïcode"]
WITH_LEARNED = [
    "a photo of <moss> <moss>_1 in the snow",
    "<moss>",
    "a <MOSS>dog, <moss>_1<moss>_2 and<rex-dog>",
    "s1z2s1z2 S1Z2x as1z2",
    "a ÜNÏCODE dog  \t with ünïcode",
    "nothing learned here, (brackets) and 'quotes' don't matter",
    "",
]


@pytest.mark.parametrize("prompt", WITH_LEARNED)
def test_learned_tokens_are_found_as_tokenizers_finds_added_ones(prompt: str, tokenizer: Tokenizer) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(FILE))
    first = theirs.get_vocab_size(with_added_tokens=True)
    theirs.add_tokens(LEARNED)
    ours = Tokenizer(
        FILE, TEXT.model_copy(update={"expansions": {}}), {one: first + i for i, one in enumerate(LEARNED)}
    )
    assert [theirs.token_to_id(one) for one in LEARNED] == [first + i for i in range(len(LEARNED))]
    assert list(ours.token_ids(prompt)) == theirs.encode(prompt, add_special_tokens=False).ids


def test_a_tokenizer_with_learned_tokens_leaves_the_others_alone(tokenizer: Tokenizer) -> None:
    before = tokenizer.token_ids("a <moss> dog")
    Tokenizer(FILE, TEXT, {"<moss>": 60000}).encode("a <moss> dog")
    assert tokenizer.token_ids("a <moss> dog") == before
