"""pytest plugin: `pytest --personalq-bundle PATH` makes one test of every check of `personalq verify`.

The gate runs as a command of its own while tests are collected, so that a crash of an engine, or pytest's warning filters,
touch neither side. Installed with PersonalQ; does nothing without the option.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

COMMAND = (sys.executable, "-c", "from cli import main; main()")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("personalq", "PersonalQ: gate exported bundles")
    group.addoption(
        "--personalq-bundle",
        action="append",
        default=[],
        metavar="BUNDLE|ID",
        help="gate this bundle, or the best bundle of this checkpoint of PERSONALQ_REPO; may be given more than once",
    )
    group.addoption("--personalq-baseline", metavar="FILE", help="compare with this file's entries")
    group.addoption("--personalq-level", metavar="LEVEL", help="the last level to run (default: images)")


def pytest_collection(session: pytest.Session) -> None:
    """The checks are tests of the session, beside whatever pytest collects from files."""
    session.config.pluginmanager.register(_Collected(session), "personalq-gate-checks")


class _Collected:
    def __init__(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for bundle in config.getoption("--personalq-bundle"):
            items.extend(_items(self.session, config, str(bundle)))


def _items(session: pytest.Session, config: pytest.Config, bundle: str) -> Iterator[pytest.Item]:
    asked = {"--baseline": config.getoption("--personalq-baseline"), "--level": config.getoption("--personalq-level")}
    options = [part for name, value in asked.items() if value for part in (name, str(value))]
    parent = Bundle.from_parent(session, name=f"personalq::{bundle}")
    for check in run_verify(bundle, options)["checks"]:
        yield CheckItem.from_parent(parent, name=f"{check['level']}: {check['name']}", check=check)


def run_verify(bundle: str, options: Sequence[str]) -> dict[str, Any]:
    """What `personalq verify --json` says. Raises UsageError with its one line when it could not be asked."""
    done = subprocess.run([*COMMAND, "verify", bundle, *options, "--json"], capture_output=True, text=True, check=False)
    try:
        content: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise pytest.UsageError(done.stderr.strip() or f"personalq verify {bundle}: said nothing") from None
    return content


class Bundle(pytest.Collector):
    """The node that the checks of one bundle hang under."""

    def collect(self) -> list[pytest.Item]:
        return []


class CheckItem(pytest.Item):
    """One check; its failure says value, limit and reason, without a traceback."""

    def __init__(self, *, check: dict[str, Any], **rest: Any) -> None:
        super().__init__(**rest)
        self.check = check

    def runtest(self) -> None:
        if not self.check["passed"]:
            raise CheckFailed(_message(self.check))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, CheckFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, self.name


class CheckFailed(Exception):
    """A check of the gate that did not pass."""


def _message(check: dict[str, Any]) -> str:
    text = f"{check['name']}: {check['value']:.6g}, limit {check['limit']:.6g}"
    text += f", interval {check['interval']}" if check.get("interval") else ""
    return text + (f"\n{check['reason']}" if check.get("reason") else "")
