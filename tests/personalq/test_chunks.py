"""A long prompt over chunks: borders at commas and words, nothing torn, and what has no room is known."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalq.chunks import LOOK_BACK, Token, glued, split

COMMA = 9


def tokens(ids: Sequence[int], torn: Sequence[int] = ()) -> list[Token]:
    """One token a word, but for those at `torn`, which continue the word before them."""
    return [Token(token, 1.0, i not in torn, i) for i, token in enumerate(ids)]


def lengths(sections: Sequence[list[Token]], most: int = 8, room: int = 75) -> tuple[list[int], int]:
    chunks, left = split(sections, room, most, COMMA)
    return [len(chunk) for chunk in chunks], len(left)


@pytest.mark.parametrize(
    ("ids", "torn", "expected"),
    [
        ([1] * 75, [], [75]),
        ([1] * 76, [], [75, 1]),
        ([1] * 160, [], [75, 75, 10]),
        ([1] * 100, [75], [74, 26]),
        ([1] * 100, [74, 75, 76], [73, 27]),
        ([1] * 70 + [COMMA] + [1] * 29, [], [71, 29]),
        ([1] * 74 + [COMMA] + [1] * 25, [], [75, 25]),
        ([1] * 55 + [COMMA] + [1] * 44, [], [56, 44]),
        ([1] * 54 + [COMMA] + [1] * 45, [], [75, 25]),
        ([1] * 160, range(1, 160), [75, 75, 10]),
        ([], [], [0]),
    ],
    ids=["fits", "one more", "three", "a word torn at the end", "a long word", "comma", "comma at the end",
         "the farthest comma", "a comma too far back", "one word without end", "nothing"],
)  # fmt: skip
def test_a_full_chunk_ends_after_a_late_comma_else_after_a_word(
    ids: list[int], torn: Sequence[int], expected: list[int]
) -> None:
    assert lengths([tokens(ids, torn)]) == (expected, 0)
    assert LOOK_BACK == 20


def test_every_section_begins_a_chunk() -> None:
    assert lengths([tokens([1] * 80), tokens([1] * 3)]) == ([75, 5, 3], 0)


def test_the_last_chunk_allowed_is_filled_and_the_rest_is_left() -> None:
    assert lengths([tokens([1] * 70 + [COMMA] + [1] * 9, [75])], most=1) == ([75], 5)
    assert lengths([tokens([1] * 80), tokens([1] * 3), tokens([1] * 4)], most=2) == ([75, 5], 7)
    assert lengths([tokens([1])] * 5, most=2) == ([1, 1], 3)


def test_a_trigger_of_several_tokens_is_not_torn() -> None:
    ids = [1] * 73 + [5, 6, 7] + [1] * 4
    assert lengths([glued(tokens(ids), [(5, 6, 7)])]) == ([73, 7], 0)
    assert lengths([glued(tokens(ids), [(5, 6), (6, 7)])]) == ([73, 7], 0)
    assert lengths([glued(tokens([*ids[:72], COMMA, *ids[73:]]), [(COMMA, 5)])]) == ([75, 5], 0)
    assert lengths([glued(tokens([5] * 80), [(5,), ()])]) == ([75, 5], 0)


@given(
    st.lists(st.lists(st.sampled_from([1, 2, COMMA]), max_size=30), max_size=4), st.integers(1, 6), st.integers(2, 9)
)
def test_chunks_and_rest_are_the_prompt(sections: list[list[int]], most: int, room: int) -> None:
    chunks, left = split([tokens(section) for section in sections], room, most, COMMA)
    found = [token.id for chunk in chunks for token in chunk] + [token.id for token in left]
    assert found == [token for section in sections for token in section]
    assert 1 <= len(chunks) <= most and max(map(len, chunks)) <= room
