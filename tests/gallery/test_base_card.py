"""The base's card holds the prompts that its code makes, and they name everything that the world knows."""

from gallery.base_card import PAGE, widget_prompts, with_widget
from gallery.subjects import OBJECTS
from gallery.world import ACCESSORIES, COLOURS, LOOK_NAMES, PATTERNS, PLACES


def test_the_card_is_what_the_code_writes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_widget(page, widget_prompts()) == page


def test_prompts_name_every_object_place_colour_pattern_accessory_and_look() -> None:
    text = " ".join(widget_prompts())
    wanted = [*OBJECTS, *COLOURS, *PLACES, *PATTERNS[1:], *ACCESSORIES[1:], *LOOK_NAMES]
    assert [word for word in wanted if word not in text] == []
    assert len(set(widget_prompts())) == 32
