"""A process that reads pickled weights and does nothing else: a job a line in, an answer a line out (`exporters.convert`).

torch's weights-only reader takes tensors and plain values and refuses every function a pickle asks for. Around it stand
limits on memory, time and file size, and a hook that refuses sockets and processes.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.serialization import safe_globals

from personalq.errors import RepositoryError
from personalq.weights.pickles import content_of
from personalq.weights.unwrapping import unwrapped

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

# What trainers and tools leave in a file beside its weights. None of it is imported: an empty object stands in its place.
_HARMLESS = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "argparse.Namespace", "pathlib.",
    "typing.Any", "torch.nn.modules.container.ParameterDict",
)  # fmt: skip
_ASKED_FOR = re.compile(r"GLOBAL ([\w.]+)|unrecognized function (.{1,80})")
_MAX_ASKED = 64
_FORBIDDEN = re.compile(
    r"(socket|subprocess|pty|urllib|ftplib|http|smtplib)\.|os\.(system|exec|fork|spawn|posix_spawn|startfile)"
)
_GROWTH, _SLACK = 4, 64 << 20  # tensors may share bytes of a file, so they may be more than it; a bomb is far more
_BYTES_PER_CPU_SECOND = 10 << 20


class StandIn:
    """Stands in the place of an object that is no weight; keeps what the file says of it and does nothing."""

    def __new__(cls, *_: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({name: value for name, value in state.items() if isinstance(name, str)})


def main() -> None:
    """Answer jobs until there are no more."""
    sys.addaudithook(_refuse)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(answer(Path(job["source"]), Path(job["folder"]))), flush=True)


def _refuse(event: str, _: object) -> None:
    if _FORBIDDEN.match(event):
        raise PermissionError(f"{event} is not allowed where a pickle is read")


def answer(source: Path, folder: Path) -> dict[str, Any]:
    """Write the weights of a file into `folder`; {'parts': {ending: {'tensors', 'bytes'}}, 'left_out'} or {'refused'}."""
    try:
        limit(source.stat().st_size)
        found = unwrapped(load(source), torch.is_tensor)
        budget = _GROWTH * source.stat().st_size + _SLACK
        parts = {ending: packed(tensors, budget) for ending, tensors in found.parts.items()}
        written = {}
        for ending, tensors in parts.items():
            target = folder / f"part{ending}.safetensors"
            save_file(tensors, target, {**found.metadata, "format": "pt"})  # 'pt': transformers asks for it
            written[ending] = {"tensors": len(tensors), "bytes": target.stat().st_size}
    except RepositoryError as error:
        return {"refused": str(error)}
    except (Exception, MemoryError) as error:  # the boundary: whatever a file does to its reader is a refusal
        return {"refused": f"must be weights that can be read, got {_first_line(error)}"}
    return {"parts": written, "left_out": list(found.left_out)}


def load(source: Path) -> Any:
    """The content of a file that torch saved: tensors, containers and plain values. Raises RepositoryError for any more."""
    is_zip, stand_ins = content_of(source) == "zip", dict[str, type[StandIn]]()
    is_misnamed = source.suffix == ".safetensors"  # torch goes by this name; from an open file it goes by the bytes
    while True:
        try:
            with (
                source.open("rb") as file,
                warnings.catch_warnings(action="ignore"),
                safe_globals([(kind, name) for name, kind in stand_ins.items()]),
            ):
                place = file if is_misnamed else source
                return torch.load(place, map_location="cpu", weights_only=True, mmap=is_zip and not is_misnamed)
        except Exception as error:
            asked = _ASKED_FOR.search(str(error))
            if asked is None:
                raise RepositoryError(
                    f"must be weights as torch saves them, got a file that its weights-only reader refuses "
                    f"({_first_line(error)}); fetch it again, or get it as safetensors from its author"
                ) from error
            name = asked[1] or asked[2]
            if not name.startswith(_HARMLESS) or name in stand_ins or len(stand_ins) >= _MAX_ASKED:
                raise RepositoryError(
                    f"contains more than weights (it asks for {name[:80]}), so it is not opened; "
                    "get it as safetensors from its author"
                ) from error
            stand_ins[name] = type(name.rpartition(".")[2], (StandIn,), {})


def packed(tensors: Mapping[str, torch.Tensor], budget: int) -> dict[str, torch.Tensor]:
    """The same numbers, each tensor contiguous and with memory of its own. Raises RepositoryError beyond `budget` bytes."""
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = f"{tensor.layout}, {tensor.device.type}".replace("torch.", "")
            raise RepositoryError(f"{name[:80]}: must be a plain tensor with its values, got {kind}; save it dense")
        total += tensor.numel() * tensor.element_size()
    if total > budget:
        raise RepositoryError(
            f"must hold at most {budget} bytes of tensors for its size, got {total}; it is no checkpoint"
        )
    made, seen = {}, set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().resolve_conj().resolve_neg()
        place = own.untyped_storage().data_ptr()
        made[name] = own.clone(memory_format=torch.contiguous_format) if place in seen else own.contiguous()
        seen.add(place)
    return made


def limit(size: int) -> None:
    """Bound this process for a file of so many bytes, above what it has now: memory, processor time, bytes written."""
    if resource is None:
        return
    pages = Path("/proc/self/statm")
    now = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.is_file() else 0
    if now:
        _soft(resource.RLIMIT_AS, now + (2 + _GROWTH) * size + (1 << 30))
    used = resource.getrusage(resource.RUSAGE_SELF)
    _soft(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 120 + size // _BYTES_PER_CPU_SECOND)
    _soft(resource.RLIMIT_FSIZE, (1 + _GROWTH) * size + 2 * _SLACK)
    _soft(resource.RLIMIT_CORE, 0)


def _soft(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _first_line(error: BaseException) -> str:
    """What an error says, without the advice that torch puts around it."""
    text = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split()) or "no reason"
    said = text.split(" Check the documentation")[0].split(". ")[0]
    return f"{type(error).__name__}: {said[:160]}"


if __name__ == "__main__":
    main()
