"""Draw docs/images/rooms.svg, the rooms and the path of a checkpoint through them, from folders, docstrings and imports.

python tools/draw_rooms.py      when tests/test_architecture_docs.py says that the picture is stale
"""

import ast
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
ABOVE, PEERS, BELOW = "fleet", ("calibration", "exporters", "runtime"), "personalq"
LEFT, COLUMN, STRIDE, WIDTH = 20, 366, 387, 1140
FILES = {  # on disk, between the rooms: left side, width, what is in it
    "Published files": (20, 126, "folder, one file,|LoRA, embedding"),
    "Checkpoint": (204, 112, "weights, card|checkpoints/ID/"),
    "Spec": (334, 126, "and FP32 goldens|specs/ID/"),
    "Bundle": (700, 146, "graphs, weights|bundles/KEY/"),
    "Picture": (1040, 120, "a file, or|over HTTP"),
}
STYLE = """text{font:12px Helvetica,Arial,'Liberation Sans',sans-serif;fill:#24292f} .room{font-size:17px;font-weight:bold}
.sub{font-size:13px;font-weight:bold;fill:#0a4a8f} .small{font-size:11px;fill:#59636e} .step{font-weight:bold;fill:#a8420a}
.box{fill:#f1f5fa;stroke:#9fb3c8} .leaf{fill:#fff;stroke:#d0dae5} .file{fill:#fff4df;stroke:#d9a441} path{fill:none}
.way{stroke:#cf5f14;stroke-width:2.4} .import{stroke:#8a97a6;stroke-width:1.3;stroke-dasharray:5 3}"""
HEAD = """<marker id="{0}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{1}" markerHeight="{1}" orient="auto"
markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" style="fill:{2}"/></marker>"""


def sub_rooms(room: str) -> list[str]:
    """The packages directly inside a room, as paths."""
    return sorted(file.parent.relative_to(ROOT).as_posix() for file in (ROOT / room).glob("*/__init__.py"))


def imported(room: str) -> set[str]:
    """Every package that a room's modules import, as a path; imports inside functions count."""
    found = set()
    for file in (ROOT / room).rglob("*.py"):
        here = file.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = here[: len(here) - node.level + 1] if node.level else ()
                names = [".".join([*package, *filter(None, [node.module]), alias.name]) for alias in node.names]
            paths = [ROOT.joinpath(*name.split(".")) for name in names if (ROOT / name.split(".")[0]).is_dir()]
            packages = (next(one for one in (path, *path.parents) if one.is_dir()) for path in paths)
            found |= {package.relative_to(ROOT).as_posix() for package in packages}
    return found


def imports(room: str, other: str) -> str:
    """The sub-rooms of `other` that a room imports, in words; '' for none."""
    names = {path.split("/")[1] for path in imported(room) if path.startswith(f"{other}/")} - {room.partition("/")[2]}
    return f"imports {', '.join(sorted(names))}" if names else ""


def text(x: float, y: float, lines: list[str], kind: str = "", anchor: str = "start") -> str:
    start = f'<text class="{kind}" text-anchor="{anchor}" x="{x:g}" y='
    return "\n".join(f'{start}"{y + 15 * i:g}">{escape(line, quote=False)}</text>' for i, line in enumerate(lines))


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" class="{kind}"/>'


def arrow(kind: str, path: str) -> str:
    return f'<path d="{path}" class="{kind}" marker-end="url(#{kind})"/>'


def drawn(x: float, y: float, width: float, path: str, columns: int = 0, low: float = 0) -> tuple[str, float]:
    """A room's box at (x, y), its sub-rooms in columns (0: itself a sub-room), and where it ends: at `low` at least."""
    kind, style, indent = ("room", "box", 12) if columns else ("sub", "leaf", 10)
    docstring = ast.get_docstring(ast.parse((ROOT / path / "__init__.py").read_text())) or ""
    words = textwrap.wrap(docstring.split("\n")[0].split(". ")[0].rstrip("."), int(width / 6.8))
    parts = [text(x + indent, y + 22, [f"{path.rpartition('/')[2]}/"], kind), text(x + indent, y + 40, words)]
    ends, side = [y + 25 + 15 * len(words)] * max(columns, 1), (width - 12) / max(columns, 1) - 12
    for i, one in enumerate(sub_rooms(path) if columns else []):
        left, top = x + 12 + i % columns * (side + 12), ends[i % columns] + 10
        made, ends[i % columns] = drawn(left, top, side, one)
        parts.append(made)
    modules = ", ".join(file.name for file in sorted((ROOT / path).glob("[!_]*.py")))
    inner = ", ".join(f"{one.rpartition('/')[2]}/" for one in sub_rooms(path))
    notes = [modules] if columns else [inner and f"holds {inner}", imports(path, path.partition("/")[0])]
    lines = [line for note in notes for line in textwrap.wrap(note, int(width / 6.2))]
    notes_at = max(ends) + (22 if columns else 15)
    end = max(notes_at + 15 * len(lines) - 3, low)
    return "\n".join([box(x, y, width, end - y, style), *parts, text(x + indent, notes_at, lines, "small")]), end


def picture() -> str:
    """The whole drawing as SVG."""
    (parts, top), above = drawn(LEFT, 20, WIDTH, ABOVE, 1), imported(ABOVE)
    low = max(drawn(LEFT, top + 34, COLUMN, name, 1)[1] for name in PEERS)
    disk, floor = low + 58, low + 210
    below, end = drawn(LEFT, floor, WIDTH, BELOW, 4)
    for i, name in enumerate(PEERS):
        x, across = LEFT + i * STRIDE, (174, 600, 1020)[i]
        parts += drawn(x, top + 34, COLUMN, name, 1, low)[0] + arrow("import", f"M{across} {low}V{floor - 1}")
        parts += text(across + 8, floor - 24, textwrap.wrap(imports(name, BELOW), 24), "small")
        parts += arrow("import", f"M{x + 183} {top}V{top + 33}") * any(path.startswith(name) for path in above)
    for name, (x, width, lines) in FILES.items():
        parts += box(x, disk, width, 68, "file") + text(x + width / 2, disk + 21, [name], "sub", "middle")
        parts += text(x + width / 2, disk + 40, lines.split("|"), "", "middle")
    ways = [  # an arrow and its label
        (f"M146 {disk + 34}H202", 154, disk + 27, "1 add"),
        (f"M250 {disk}V{low + 2}", 257, low + 32, "2 calibrate"),
        (f"M430 {disk}V{low + 2}", 437, low + 32, "3 export"),
        (f"M260 {disk + 68}V{disk + 88}H560V{low + 2}", 440, disk + 104, "its weights"),
        (f"M815 {disk}V{low + 2}", 822, low + 32, "4 verify, draw"),
        (f"M930 {floor}V{low + 2}", 937, disk + 20, "a request:|Check-in's|choice"),
    ]
    parts += "".join(arrow("way", f"M{x} {low}V{disk - 2}") for x in (372, 750, 1100))  # a room writes
    parts += "\n".join(arrow("way", path) + text(x, y, words.split("|"), "step") for path, x, y, words in ways)
    parts += below + arrow("import", f"M{LEFT + WIDTH} 48h18V{floor + 28}h-17")
    heads = HEAD.format("way", 12, "#cf5f14") + HEAD.format("import", 9, "#8a97a6")
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1190 {end + 20:g}"><style>{STYLE}</style>{heads}'
    return f'{start}\n<rect width="100%" height="100%" fill="#fff"/>\n{parts}\n</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(picture())
