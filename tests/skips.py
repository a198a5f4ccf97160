"""What a series of pytest runs left out: each appends to $PERSONALQ_SKIPS, and `python tests/skips.py FILE` sums up.

A test that one run skips and another runs was not left out. Standard library only: it must work where nothing is installed.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def record(reports: Mapping[str, Sequence[Any]], file: Path) -> None:
    """Append [node id, reason] of what was skipped, and [node id, null] of every test that ran.

    reports: by outcome, as pytest's terminal reporter has them; with pytest-xdist, those of all workers.
    """
    lines = [[one.nodeid, str(one.longrepr[2]).removeprefix("Skipped: ")] for one in reports.get("skipped", ())]
    for outcome in ("passed", "failed", "xfailed", "xpassed"):
        lines += [[one.nodeid, None] for one in reports.get(outcome, ()) if getattr(one, "when", "") == "call"]
    with file.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def summary(lines: Iterable[str]) -> list[str]:
    """Lines for people: how many tests of which file were never run, and why; one test is named in full."""
    skipped: dict[str, str] = {}
    ran = set()
    for nodeid, reason in map(json.loads, lines):
        if reason is None:
            ran.add(nodeid)
        else:
            skipped[nodeid] = reason
    groups = defaultdict(list)
    for nodeid, reason in sorted(skipped.items()):
        if nodeid not in ran:
            groups[nodeid.partition("::")[0], reason].append(nodeid)
    if not groups:
        return ["nothing was skipped" if ran else "no test run came to its end"]
    told = [f"  {len(ids)} x {file if len(ids) > 1 else ids[0]}: {reason}" for (file, reason), ids in groups.items()]
    return [f"skipped: {sum(map(len, groups.values()))}", *told]


if __name__ == "__main__":
    print(*summary(Path(sys.argv[1]).read_text().splitlines()), sep="\n")
