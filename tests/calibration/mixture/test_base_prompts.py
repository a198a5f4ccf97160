"""A base's own prompts come from its README, and span many subjects where it says nothing."""

from pathlib import Path

from calibration.mixture.base_prompts import BROAD, base_golden_prompts, own_prompts, spread
from personalq.cards.card import Card


def cards(*nouns: str) -> list[Card]:
    return [Card(id=f"c{i}", kind="lora", base="tiny", class_noun=noun) for i, noun in enumerate(nouns)]


def readme(folder: Path, *prompts: str) -> Path:
    lines = "".join(f"- text: {prompt!r}\n" for prompt in prompts)
    (folder / "README.md").write_text(f"---\nwidget:\n{lines}---\n# A base\n")
    return folder


def test_the_broad_list_has_no_prompt_twice() -> None:
    assert len(set(BROAD)) == len(BROAD) >= 48


def test_a_readme_with_enough_prompts_is_all_there_is(tmp_path: Path) -> None:
    written = [f"a photo of a {thing}" for thing in ("dog", "cat", "mug", "house")]
    base = readme(tmp_path, *written)
    assert own_prompts(base, cards("robot"), 4) == written
    assert base_golden_prompts(base) == ["", written[0], written[1]]


def test_marks_in_a_readme_are_read_as_text_encoders_see_them(tmp_path: Path) -> None:
    assert own_prompts(readme(tmp_path, "(a dog:1.3) <lora:x:1>"), [], 1) == ["a dog"]


def test_a_readme_with_few_is_filled_up_with_class_nouns_and_the_broad_list(tmp_path: Path) -> None:
    found = own_prompts(readme(tmp_path, "a toy castle"), cards("robot", "style", "owl"), 8)
    assert found[0] == "a toy castle"
    assert [prompt.split(" of ")[1].split()[:2] for prompt in found[1:3]] == [["an", "owl"], ["a", "robot"]]
    assert len(set(found)) == 8
    assert set(found[3:]) <= set(BROAD)


def test_a_base_without_readme_has_prompts_too(tmp_path: Path) -> None:
    assert len(own_prompts(tmp_path, [], 16)) == 16
    assert base_golden_prompts(tmp_path) == ["", *BROAD[:2]]


def test_few_of_many_show_as_many_words_as_they_can() -> None:
    prompts = ["a dog", "a dog", "a cat", "a dog in the snow", "a blue dog"]
    # after 'a dog', 'in the snow' are three new words; then 'blue' is one and 'dog' 1/9, 'cat' is one
    assert spread(prompts, 3, 0) == ["a dog", "a dog in the snow", "a blue dog"]
    assert spread(prompts, 1, 1) == ["a cat"]
    assert spread([], 3, 0) == []
