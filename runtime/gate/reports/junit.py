"""JUnit XML, as CI servers read it: one test case per check, one suite per bundle."""

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from ..check import Check, Report

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(reports: Sequence[Report]) -> str:
    """The document, with its declaration."""
    root = ET.Element("testsuites", name="personalq gate")
    for report in reports:
        _add_suite(root, report)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _add_suite(root: ET.Element, report: Report) -> None:
    seconds = f"{sum(report.seconds.values()):.3f}"
    counts = {"tests": str(len(report.checks)), "failures": str(len(report.failed)), "errors": "0", "skipped": "0"}
    suite = ET.SubElement(root, "testsuite", {"name": _clean(report.subject), "time": seconds, **counts})
    ET.SubElement(ET.SubElement(suite, "properties"), "property", name="form", value=_clean(report.described))
    for check in report.checks:
        case = ET.SubElement(suite, "testcase", classname=f"personalq.gate.{check.level}", name=_clean(check.name))
        if not check.passed:
            ET.SubElement(case, "failure", message=_clean(_message(check)), type=check.level).text = _clean(
                _details(check)
            )


def _message(check: Check) -> str:
    return check.reason or f"{check.value:.6g}, limit {check.limit:.6g}"


def _details(check: Check) -> str:
    lines = [f"value {check.value!r}", f"limit {check.limit!r}"]
    lines += [f"interval {check.interval!r}"] if check.interval else []
    lines += [f"layer {check.layer}"] if check.layer else []
    return "\n".join(lines)


def _clean(text: str) -> str:
    """Characters that XML 1.0 cannot hold become '?'; ElementTree escapes the rest."""
    return _NOT_XML.sub("?", text)
