"""The package's own door: light to import, and the few public verbs are there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import personalq


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import personalq, sys; print([m for m in ('numpy', 'pydantic', 'onnxruntime', 'torch') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_public_verbs_are_found_and_others_are_not() -> None:
    assert callable(personalq.open) and callable(personalq.ask)
    assert personalq.PersonalQError.__name__ == "PersonalQError"
    with pytest.raises(AttributeError, match="module 'personalq' has no attribute 'nothing'"):
        personalq.nothing  # noqa: B018
