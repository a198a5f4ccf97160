"""docs/architecture.md and its drawing follow the code; every path and module that the docs name exists."""

import re
from pathlib import Path

import pytest

from tools.draw_rooms import ABOVE, BELOW, PEERS, PICTURE, picture

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
ROOMS = (BELOW, *PEERS, ABOVE)
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "gallery" / "README.md"])
FOLDERS = (*ROOMS, "gallery", "bench", "tests", "tools", "docs")
OURS = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")} | {"cli.py"}
WRITTEN = ("gallery/repository/specs/", "gallery/repository/bundles/")  # by the commands that README.md shows
LOGGERS = ("personalq.runtime",)


def test_the_drawing_is_what_the_script_draws_now() -> None:
    assert PICTURE.read_text() == picture(), "run: python tools/draw_rooms.py"
    assert f"images/{PICTURE.name}" in PAGE.read_text()


def test_every_room_and_sub_room_is_named() -> None:
    text = PAGE.read_text()
    packages = {
        file.parent.relative_to(ROOT).as_posix() for room in ROOMS for file in (ROOT / room).rglob("__init__.py")
    }
    assert [name for name in sorted(packages) if f"`{name}`" not in text and f"`{name}/`" not in text] == []


def test_where_to_change_things_names_files_and_tests() -> None:
    rows = [line.split("|")[1:4] for line in PAGE.read_text().split("## Where do I change X")[1].splitlines()[4:]]
    assert len(rows) == 10
    assert all(re.search(r"`[\w/]+\.py`", cell) for row in rows for cell in row[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_and_module_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})/[\w/.*-]*\w/?", text)
    dotted = re.findall(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})(?:\.\w+)+", text)
    missing = [path for path in paths if not path.startswith(WRITTEN) and not exists(path)]
    missing += [name for name in re.findall(r"(?<![\w/.*-])\w+\.py\b", text) if name not in OURS]
    missing += [name for name in dotted if name not in LOGGERS and not is_module(name)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        titles = [line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#")] if anchor else []
        assert not anchor or anchor in {slug(title) for title in titles}, target


def exists(path: str) -> bool:
    """A file or folder of ours; a `*` stands for at least one."""
    return bool([*ROOT.glob(path)]) if "*" in path else (ROOT / path).exists()


def is_module(name: str) -> bool:
    """A module, a name in one, or a file of ours whose name looks dotted (gallery.md, personalq.json)."""
    if name.rpartition(".")[2] in ("md", "json", "yml"):
        return True
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:n])
        file = next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)
        if file is not None:
            return n == len(parts) or re.search(rf"\b{parts[n]}\b", file.read_text()) is not None
    return False


def slug(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
