"""Trace the families that PersonalQ ships, exporters/graphs/families/: the architectures that nobody should have to wait for.

    python tools/trace_families.py                    trace each of them again: after the tracing recipe changed
    python tools/trace_families.py --check [KEY]...   write nothing; exit 1 when a graph is not what is traced now
    python tools/trace_families.py --add BASE         ship the family of one more base, a diffusers folder: configs are enough

One takes 1 to 6 minutes. Bytes are compared only with those that the same versions of torch and its exporter wrote.
"""

import argparse
import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout

from exporters.graphs.family import NOTE, SHIPPED, TRACERS, family_name, write_family
from personalq.architecture import family_key, read_configs

Configs = dict[str, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="*", metavar="KEY", help="begins of keys; none: all")
    parser.add_argument("--add", type=Path, metavar="BASE")
    options = parser.parse_args()
    if options.add is not None:
        ship(read_configs(options.add))
        return 0
    notes = [json.loads(file.read_text()) for file in sorted(SHIPPED.glob(f"*/{NOTE}"))]
    if options.check is None:
        for note in notes:
            ship(note["configs"])
        return 0
    wanted = [note for note in notes if not options.check or note["key"].startswith(tuple(options.check))]
    return int(not wanted or any([differs(note) for note in wanted]))  # every one is told


def ship(configs: Configs) -> None:
    """Trace a family and put it in the place of the one that is there, of whichever recipe."""
    key = family_key(configs)
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), key, configs, lambda text, _: print(f"{key}: {text}", flush=True))
        for old in SHIPPED.glob(f"{key}-v*"):
            shutil.rmtree(old)
        shutil.copytree(folder, SHIPPED / family_name(key))


def differs(note: dict[str, Any]) -> bool:
    """Whether a shipped family is another than the one traced now."""
    key, made_with = note["key"], note["versions"]
    here = {name: version(name) for name in TRACERS}
    if here != made_with:
        print(f"{key}: traced with {made_with}, here are {here}: not compared")
        return False
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), key, note["configs"])
        shipped = SHIPPED / family_name(key)
        names = sorted({file.name for place in (Path(folder), shipped) for file in place.glob("*")})
        odd = [name for name in names if read(shipped / name) != read(Path(folder) / name)]
    print(f"{key}: {'differs in ' + ', '.join(odd) if odd else 'equal'}", flush=True)
    return bool(odd)


def read(file: Path) -> bytes:
    """The bytes of a file, none when it is not there."""
    return file.read_bytes() if file.is_file() else b""


if __name__ == "__main__":
    sys.exit(main())
