r"""The marks of a prompt: what AUTOMATIC1111's documentation says they mean, and that nothing else means anything."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalq.errors import PromptError
from personalq.prompts import Adapter, Piece, Prompt, is_marked, literal, read_prompt, refuse_faults

W = 1.1


def pieces(text: str, *whole: str) -> list[tuple[str, float]]:
    """One section's (text, weight)."""
    (section,) = read_prompt(text, whole).sections
    return [(piece.text, round(piece.weight, 6)) for piece in section]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", [("a dog", 1)]),
        ("a (dog)", [("a ", 1), ("dog", 1.1)]),
        ("a ((dog))", [("a ", 1), ("dog", 1.21)]),
        ("a (dog:1.3) runs", [("a ", 1), ("dog", 1.3), (" runs", 1)]),
        ("a (dog :  1.3 )", [("a ", 1), ("dog ", 1.3)]),
        ("(a (dog:1.5) runs:0.5)", [("a ", 0.5), ("dog", 0.75), (" runs", 0.5)]),
        ("a [dog]", [("a ", 1), ("dog", 0.909091)]),
        ("[[dog]]", [("dog", 0.826446)]),
        ("([dog])", [("dog", 1)]),
        ("(dog:-.5)", [("dog", -0.5)]),
        ("(dog:1.)", [("dog", 1)]),
        (r"a \(dog\) \[x\]", [("a (dog) [x]", 1)]),
        (r"(\(dog\):1.2)", [("(dog)", 1.2)]),
        ("(dog:loud)", [("dog:loud", 1.1)]),
        ("(dog:1.2.3)", [("dog:1.2.3", 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("()dog[]", [("dog", 1)]),
        ("a: dog, 12:30", [("a: dog, 12:30", 1)]),
        (r"C:\dogs \ x", [(r"C:\dogs \ x", 1)]),
        ("", [("", 1)]),
        ("  ", [("  ", 1)]),
        ("()", [("", 1)]),
    ],
)  # fmt: skip
def test_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(text) == [(word, pytest.approx(weight)) for word, weight in expected]
    assert read_prompt(text).warnings == () and read_prompt(text).faults == ()


@pytest.mark.parametrize(
    ("text", "expected", "warning"),
    [
        ("a (dog", [("a (dog", 1)], "'(' at character 2 is never closed: it is read as a bracket"),
        ("a [dog", [("a [dog", 1)], "'[' at character 2 is never closed: it is read as a bracket"),
        ("a dog)", [("a dog)", 1)], "')' at character 5 closes nothing: it is read as a bracket"),
        ("a dog]", [("a dog]", 1)], "']' at character 5 closes nothing: it is read as a bracket"),
        ("a dog:1.3)", [("a dog:1.3)", 1)], "')' at character 9 closes nothing: it is read as a bracket"),
        ("((dog)", [("(", 1), ("dog", 1.1)], "'(' at character 0 is never closed: it is read as a bracket"),
        ("[cat:dog:0.5]", [("cat:dog:0.5", 0.909091)],
         "[cat:dog:0.5]: words cannot change between steps: all of it is read as words, divided by 1.1"),
        ("[cat|dog]", [("cat|dog", 0.909091)],
         "[cat|dog]: words cannot change between steps: all of it is read as words, divided by 1.1"),
        ("a dog AND a cat", [("a dog AND a cat", 1)], "AND: prompts cannot be composed: it is read as the word 'and'"),
    ],
)  # fmt: skip
def test_what_is_read_otherwise_than_elsewhere_is_told(
    text: str, expected: list[tuple[str, float]], warning: str
) -> None:
    assert pieces(text) == [(word, pytest.approx(weight)) for word, weight in expected]
    assert read_prompt(text).warnings == (warning,)


def test_break_begins_a_section_and_weights_go_on_through_it() -> None:
    prompt = read_prompt("a dog BREAK (on BREAK a beach:1.5) breaks")
    assert [[(p.text, p.weight) for p in section] for section in prompt.sections] == [
        [("a dog ", 1.0)], [(" ", 1.0), ("on ", 1.5)], [(" a beach", 1.5), (" breaks", 1.0)],
    ]  # fmt: skip
    assert prompt.warnings == ()


def test_sections_without_words_are_none() -> None:
    assert len(read_prompt("BREAK a dog BREAK BREAK ( ) BREAK").sections) == 1
    assert read_prompt("BREAK").sections == ((Piece(""),),)


def test_a_trigger_is_text_whatever_is_in_it() -> None:
    assert pieces("a (Miku (Vocaloid):1.2)", "miku (vocaloid)") == [("a ", 1), ("Miku (Vocaloid)", 1.2)]
    assert pieces("a miku (vocaloid)") == [("a miku ", 1), ("vocaloid", 1.1)]
    assert pieces("(<moss-mug>:1.2)", "<moss-mug>") == [("<moss-mug>", 1.2)]


def test_adapters_are_no_text() -> None:
    prompt = read_prompt("a dog<lora:Rex v2:0.8>cat <LoRA:max:0.5:1> <lora:tom> <lyco:a:unet=.3:te=0> <lora:b:unet=0>")
    assert prompt.text.split() == ["a", "dog", "cat"]
    assert prompt.adapters == (
        Adapter("Rex v2", unet=0.8, text_encoder=0.8, written="<lora:Rex v2:0.8>"),
        Adapter("max", unet=1.0, text_encoder=0.5, written="<LoRA:max:0.5:1>"),
        Adapter("tom", unet=1.0, text_encoder=1.0, written="<lora:tom>"),
        Adapter("a", unet=0.3, text_encoder=0.0, written="<lyco:a:unet=.3:te=0>"),
        Adapter("b", unet=0.0, text_encoder=1.0, written="<lora:b:unet=0>"),
    )
    assert prompt.warnings == prompt.faults == ()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<lora:rex:0.8", "'<lora:rex:0.8' must end with '>', got none; close or remove it"),
        ("<lora:>", "<lora:> must name a checkpoint, got no name; write <lora:NAME:1>"),
        ("<lora:rex:big>", "<lora:rex:big> must have strengths within -10 and 10, got 'big'; 0 to 1 is usual"),
        ("<lora:rex:1e9>", "<lora:rex:1e9> must have strengths within -10 and 10, got '1e9'; 0 to 1 is usual"),
        ("<lora:rex:99>", "<lora:rex:99> must have strengths within -10 and 10, got '99'; 0 to 1 is usual"),
        ("<lora:r\ne\tx:99>", "<lora:r e x:99> must have strengths within -10 and 10, got '99'; 0 to 1 is usual"),
        ("<lora:rex:1:1:8>",
         "<lora:rex:1:1:8> must be <lora:NAME:STRENGTH> or <lora:NAME:te=A:unet=B>, got more; shorten it"),
        ("<lora:rex:dyn=8>",
         "<lora:rex:dyn=8> must be <lora:NAME:STRENGTH> or <lora:NAME:te=A:unet=B>, got more; shorten it"),
        ("<hypernet:x:1>", "<hypernet:x:1> asks for a hypernetwork, which PersonalQ does not have; remove it"),
        ("(dog:11)", "weights must be within -10 and 10, got 11; 0.5 to 1.5 is usual"),
        ("(" * 40 + "dog" + ")" * 40, "weights must be within -10 and 10, got 45.26; 0.5 to 1.5 is usual"),
        ("(dog:" + "9" * 400 + ")", "weights must be within -10 and 10, got inf; 0.5 to 1.5 is usual"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_one_line_and_reading_does_not_fail(text: str, fault: str) -> None:
    prompt = read_prompt(text)
    assert prompt.faults == (fault,)
    with pytest.raises(PromptError) as error:
        refuse_faults(prompt, {"rex": (1, 1)})
    assert str(error.value) == f"prompt: {fault}"


@pytest.mark.parametrize("tag", ["<lora:REX>", "<lora:rex:1>", "<lora:Rex the dog:1.0>", "<lora:rex_v2:te=1:unet=1>"])
def test_the_checkpoint_that_draws_may_be_named_at_full_strength(tag: str) -> None:
    refuse_faults(read_prompt(f"a dog {tag}"), dict.fromkeys(("rex", "Rex the dog", "rex_v2"), (1, 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<lora:tom:1>", "prompt: <lora:tom:1> must name what draws, 'rex'; remove it, or draw with that checkpoint"),
        ("<lora:rex:0.8>", "prompt: <lora:rex:0.8> must have strength 1 in all, got 0.8; 'rex' is merged into its bundle at "
                           "full strength: write 1, or remove it"),
        ("<lora:rex:1:0.5>", "prompt: <lora:rex:1:0.5> must have strength 1 in all, got 0.5; 'rex' is merged into its bundle "
                             "at full strength: write 1, or remove it"),
        ("<lora:rex:1> <lora:Rex:1>", "prompt: <lora:Rex:1> must have strength 1 in all, got 2; 'rex' is merged into its "
                                      "bundle at full strength: write 1, or remove it"),
    ],
)  # fmt: skip
def test_other_adapters_and_strengths_are_refused(text: str, message: str) -> None:
    with pytest.raises(PromptError) as error:
        refuse_faults(read_prompt(text), {"rex": (1, 1), "Rex": (1, 1)})
    assert str(error.value) == message


def test_an_attached_adapter_may_be_named_at_the_strengths_it_is_attached_with() -> None:
    strengths = {"rex": (0.8, 0.5), "look": (1.0, 1.0)}
    refuse_faults(read_prompt("a dog <lora:Rex:te=0.5:unet=0.8> <lora:look:1>"), strengths, is_attached=True)
    with pytest.raises(
        PromptError, match=r"must have strength 0\.8 in all, got 0\.7; 'rex' is attached at that strength"
    ):
        refuse_faults(read_prompt("a dog <lora:rex:te=0.5:unet=0.7>"), strengths, is_attached=True)
    with pytest.raises(
        PromptError, match=r"<lora:tom:1> must name what draws, 'rex'; remove it, or attach it with --adapter"
    ):
        refuse_faults(read_prompt("<lora:tom:1>"), strengths, is_attached=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("my dog (the brown one) [at home]", False),
        ("break dance, 12:30", False),
        ("my (dog:1.2)", True),
        (r"miku \(vocaloid\)", True),
        ("a dog BREAK a cat", True),
        ("my dog <lora:rex:1>", True),
        ("<moss-mug>", False),
    ],
)
def test_asides_in_brackets_do_not_make_a_request_a_prompt(text: str, expected: bool) -> None:
    assert is_marked(text) is expected


def test_a_literal_prompt_has_no_marks() -> None:
    prompt = literal("a (dog:1.3) <lora:x:2> BREAK")
    assert prompt == Prompt(((Piece("a (dog:1.3) <lora:x:2> BREAK"),),), is_literal=True)


@given(st.text(alphabet=string.ascii_lowercase + string.digits + " ,.;!?'\"-_/<>:\n" + "\u00e9\u5c71", max_size=60))
def test_text_without_marks_stays_as_it_is(text: str) -> None:
    if not is_marked(text):
        assert read_prompt(text) == Prompt(((Piece(text),),))


@given(st.text(alphabet="ab()[]:.1\\|< >BREAK", max_size=40))
def test_no_text_breaks_the_reader_and_no_word_is_lost(text: str) -> None:
    prompt = read_prompt(text)
    assert prompt.text.count("a") == text.count("a") and prompt.text.count("b") == text.count("b")
    assert all(piece.text for section in prompt.sections for piece in section) or prompt.text == ""
