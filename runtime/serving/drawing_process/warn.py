"""What a person should know about a picture that was drawn: text of the request that it does not show. Knows pipelines."""

from ...drawing.pipeline import Picture, Pipeline

_LONG_WORD = 40  # characters; some languages put no spaces


def warnings_of(pipeline: Pipeline, picture: Picture) -> list[str]:
    """A line for each text that did not fit. The pipeline has their rows at hand: it has just drawn with them."""
    length = pipeline.manifest.text.length
    texts = {"prompt": picture.prompt, "negative_prompt": picture.negative_prompt}
    cuts = {name: (text, pipeline.rows(text).cut) for name, text in texts.items()}
    return [cut_warning(name, first_lost(text, cut), length) for name, (text, cut) in cuts.items() if cut]


def cut_warning(name: str, word: str, length: int) -> str:
    """The line that says where a text was cut. length: of the text encoder, its two marks included."""
    return f"{name}: only {length} tokens fit; cut from {word!r} on; shorten it"


def first_lost(text: str, cut: str) -> str:
    """The first word that was not used; whole, also when only its last tokens were cut off. cut: the end of `text`."""
    whole = text.rstrip()
    kept = whole.removesuffix(cut)
    is_inside = kept != whole and kept == kept.rstrip()
    begun = kept.split()[-1] if is_inside and kept else ""
    word = cut.split()[0]
    return (begun + word if len(begun) <= _LONG_WORD else word)[:_LONG_WORD]
