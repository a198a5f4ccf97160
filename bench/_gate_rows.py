"""What `bench gate` says of one run of the gate, as a row of its JSON."""

from typing import Any

from runtime.gate.check import Report

Row = dict[str, Any]


def verdict(report: Report) -> Row:
    """Which levels caught it, the first one's time, and its first failed check."""
    levels = list(dict.fromkeys(check.level for check in report.failed))
    names = list(report.seconds)  # of the levels that ended; a bundle that does not open ends the first
    until = names[: names.index(levels[0]) + 1] if levels and levels[0] in names else names
    return {
        "caught": not report.passed,
        "levels": levels,
        "seconds": round(sum(report.seconds[name] for name in until), 2),
        "first": report.headline,
        "failed_checks": len(report.failed),
    }


def timed(report: Report) -> Row:
    to_c = sum(report.seconds.get(level, 0.0) for level in ("integrity", "obedience", "numerics"))
    return {"seconds_to_c": round(to_c, 2), "seconds": round(sum(report.seconds.values()), 2)}
