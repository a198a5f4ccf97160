"""Pickled weights to safetensors beside them. The pickle is read by `exporters.unpickle`, in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from personalq.errors import MissingExtraError, PersonalQError, RepositoryError
from personalq.repository.atomic import named_failure, remove, settle, temporary_beside
from personalq.weights.pickles import content_of, pickle_refusal, safe_name
from personalq.weights.unwrapping import TOKENS

_ENDINGS = ("", TOKENS)


@dataclass(frozen=True)
class Converted:
    """One file that was written. left_out: what else the pickle held, 'name (type)'."""

    source: str
    file: str
    tensors: int
    bytes: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class NotConverted:
    """One file that was not converted, and why."""

    source: str
    reason: str


def convert(
    sources: Sequence[Path],
    out: Path | None = None,
    *,
    replace: bool = False,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> tuple[list[Converted], list[NotConverted]]:
    """Write the weights of each pickle as safetensors, beside it or into the folder `out`; each file stands alone.

    An existing file is never written over without `replace`, and none that this call wrote. Raises MissingExtraError
    without torch.
    """
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "export")
    converted: list[Converted] = []
    refused: list[NotConverted] = []
    with Reader() as reader:
        for number, source in enumerate(sources):
            progress(f"reading {source.name}", number / len(sources))
            try:
                taken = {one.file for one in converted}
                converted += _convert(
                    reader, source, (out or source.parent) / safe_name(source), taken, replace=replace
                )
            except PersonalQError as error:
                refused.append(NotConverted(str(source), " ".join(str(error).split())))
    return converted, refused


def _convert(reader: Reader, source: Path, target: Path, taken: set[str], *, replace: bool) -> list[Converted]:
    if not source.is_file():
        raise RepositoryError(f"{source}: must be a file with pickled weights, got none; check the path")
    if content_of(source) not in ("pickle", "zip"):
        raise pickle_refusal(source)
    _check_free(target, source, taken, replace=replace)
    with named_failure(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = temporary_beside(target)
        folder.mkdir()
    try:
        answer = reader.ask(source, folder)
        if "refused" in answer:
            raise RepositoryError(f"{source}: {answer['refused']}")
        targets = {ending: target.with_stem(target.stem + ending) for ending in _ENDINGS if ending in answer["parts"]}
        for place in targets.values():
            _check_free(place, source, taken, replace=replace)
        for ending, place in targets.items():
            with named_failure(place):
                made = folder / f"part{ending}.safetensors"
                made.chmod(source.stat().st_mode & 0o666)  # safetensors makes it its writer's alone
                settle(made)
                os.replace(made, place)
    finally:
        remove(folder)
    parts, left_out = answer["parts"], tuple(answer["left_out"])
    return [
        Converted(str(source), str(place), parts[ending]["tensors"], parts[ending]["bytes"], () if ending else left_out)
        for ending, place in targets.items()
    ]


def _check_free(target: Path, source: Path, taken: set[str], *, replace: bool) -> None:
    """Refuse to write over the pickle itself, over what this call wrote, and over any file without --replace."""
    if target.exists() and target.samefile(source):
        other = source.with_suffix(".ckpt")
        move = f"mv {shlex.quote(str(source))} {shlex.quote(str(other))} && personalq convert {shlex.quote(str(other))}"
        raise RepositoryError(f"{source}: must not be named as what is made of it, got a pickle of that name; {move}")
    if str(target) in taken:
        raise RepositoryError(f"{source}: must have a name of its own, got that of {target}, just written; rename it")
    if target.exists() and not replace:
        raise RepositoryError(
            f"{target}: must be free, got a file; replace it with --replace, or name a folder with --out"
        )


class Reader:
    """The process that reads pickles; started when it is first needed, and anew when a file ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors: BinaryIO | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()  # idle, or interrupted
            self._end()

    def ask(self, source: Path, folder: Path) -> dict[str, Any]:
        """The answer of `exporters.unpickle`. Raises RepositoryError when the process ended instead."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"source": str(source.resolve()), "folder": str(folder.resolve())}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise RepositoryError(
            f"{source}: must be weights that can be read in bounds, got {self._end()}; it was not converted"
        )

    def _start(self) -> subprocess.Popen[str]:
        # -P: a torch.py in the folder where this runs is not imported. One thread: memory is bounded.
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in _end)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "exporters.unpickle"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        return self._process

    def _end(self) -> str:
        """Wait for the end of the process; return how it ended, with the last line that it wrote."""
        assert self._process is not None and self._errors is not None
        self._process.communicate()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        status, self._process, self._errors = self._process.returncode, None, None
        how = f"a reader killed by signal {-status}" if status < 0 else f"a reader that ended with status {status}"
        return how + (f" ({said[-1][:160]})" if said else "")
