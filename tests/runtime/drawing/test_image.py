"""PNG files and comparisons."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from personalq.errors import EngineError, MissingExtraError
from runtime.drawing.image import png_bytes, side_by_side, write_png

RED = np.full((4, 6, 3), (255, 0, 0), dtype=np.uint8)
BLUE = np.full((4, 2, 3), (0, 0, 255), dtype=np.uint8)


def test_a_png_is_read_back_equal(tmp_path: Path) -> None:
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = write_png(tmp_path / "new" / "folder" / "image.png", image)
    assert (np.asarray(Image.open(path)) == image).all()
    assert (np.asarray(Image.open(io.BytesIO(png_bytes(image)))) == image).all()


def test_pictures_stand_in_a_row_on_white() -> None:
    canvas = side_by_side([RED, BLUE])
    assert canvas.shape == (12, 20, 3)
    assert canvas[4, 4].tolist() == [255, 0, 0] and canvas[4, 14].tolist() == [0, 0, 255]
    assert canvas[0, 0].tolist() == canvas[4, 10].tolist() == [255, 255, 255]


def test_pictures_are_enlarged_and_labelled() -> None:
    canvas = side_by_side([RED, BLUE], ["W8A8", "FP32"], scale=8)
    assert canvas.shape == (4 * 8 + 8 + 14, 8 * 8 + 12, 3)
    assert (canvas[4 * 8 + 4 :] < 128).any(), "the labels are dark text under the pictures"


def test_latents_are_no_picture() -> None:
    with pytest.raises(EngineError) as error:
        png_bytes(np.zeros((4, 8, 8), np.float32))  # type: ignore[arg-type]
    assert str(error.value) == "image: must be (H, W, 3) uint8, got (4, 8, 8) float32; decode it first"


def test_pictures_of_different_height_are_refused() -> None:
    with pytest.raises(EngineError) as error:
        side_by_side([RED, RED[:2]])
    expected = "images: must be one or more of the same height, got heights [4, 2]; resize them"
    assert str(error.value) == expected


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"file/image\.png: folder must be writable, got .*; choose another place"):
        write_png(tmp_path / "file" / "image.png", RED)


def test_missing_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for call in (lambda: png_bytes(RED), lambda: side_by_side([RED], ["a"])):
        with pytest.raises(MissingExtraError, match=r"pillow is not installed; run: pip install 'personalq\[cpu\]'"):
            call()
