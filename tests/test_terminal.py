"""At a terminal, `personalq ask` puts its question and takes the answer. A real terminal, a real process."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REQUEST = "a picture of my dog in the snow"


class Terminal:
    """A process whose stdin, stdout and stderr are one terminal."""

    def __init__(self, *arguments: str) -> None:
        self.screen, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", "from cli import main; main()", *arguments]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.text = ""

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """Return what was printed since the last call, up to and with ``pattern``; fail with it when it does not come."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.text)) is None:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.screen], [], [], left)[0], f"no {pattern!r} in {self.text!r}"
            try:
                self.text += os.read(self.screen, 65536).decode()
            except OSError:  # Linux says so when the other end closed
                raise AssertionError(f"ended without {pattern!r}: {self.text!r}") from None
        before, self.text = self.text[: match.end()], self.text[match.end() :]
        return before

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self.screen, f"{line}\n".encode())

    def close(self) -> None:
        """End the process, if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Two dogs that differ in colour, and nothing else."""
    cards = [
        {"id": "biscuit", "name": "Biscuit", "kind": "lora", "trigger": ["sks"], "class_noun": "dog",
         "description": "My chocolate-brown dog.", "tags": ["dog", "brown"]},
        {"id": "domino", "name": "Domino", "kind": "lora", "trigger": ["zwx"], "class_noun": "dog",
         "description": "White dog covered in black spots.", "tags": ["dog", "spotted"]},
    ]  # fmt: skip
    (tmp_path / "cards.jsonl").write_text("".join(json.dumps(card) + "\n" for card in cards))
    add = ["--repo", str(tmp_path / "r"), "add", "--cards", str(tmp_path / "cards.jsonl")]
    subprocess.run([sys.executable, "-c", "from cli import main; main()", *add], cwd=ROOT, check=True)
    return tmp_path / "r"


@pytest.fixture
def terminal(repo: Path) -> Iterator[Terminal]:
    opened = Terminal("--repo", str(repo), "ask", REQUEST)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("answer", "found"),
    [("2", "zwx dog"), ("the brown one", "sks dog"), ("neither", "abstain")],
    ids=["number", "words", "neither"],
)
def test_a_person_is_asked_and_the_answer_decides(terminal: Terminal, answer: str, found: str) -> None:
    asked = terminal.read_until("Your answer")
    assert "Which dog do you mean?" in asked
    assert "1. Biscuit" in asked and "2. Domino" in asked
    terminal.read_until(": ")
    terminal.type(answer)
    assert found in terminal.read_until(found)
    assert terminal.process.wait(timeout=60) == 0


def test_with_json_nobody_is_asked(repo: Path) -> None:
    terminal = Terminal("--repo", str(repo), "ask", REQUEST, "--json")
    try:
        assert '"question": "Which dog do you mean?"' in terminal.read_until(r"\}\r?\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
