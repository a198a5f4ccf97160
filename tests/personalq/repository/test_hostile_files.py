"""Broken and hostile files over `add`: each is taken or refused in one line, and nothing half-written stays."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from personalq.repository import Repository
from tests.personalq import toy_checkpoints as make

FIELDS = st.sampled_from(["dtype", "shape", "data_offsets"])
ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-5, 10**9), max_size=5),
    st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "U32", "C64", [10**9], [0, 4], [4, 0], [[]], {}]),
)
NAMES = st.sampled_from(
    [
        "../../up",
        "/etc/passwd",
        "__metadata__",
        "",
        "lora_unet_.alpha",
        "unet..lora_A.weight",
        "emb_params",
        "clip_g",
        "a" * 4000,
    ]
)


def valid(folder: Path) -> bytes:
    """The bytes of a LoRA that the toy base takes."""
    return (make.lora(folder, with_card=False) / "pytorch_lora_weights.safetensors").read_bytes()


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The file with its header, its bytes or its length changed."""
    how = draw(st.sampled_from(["field", "name", "twice", "metadata", "bytes", "cut", "longer", "length"]))
    header, body = parts(data)
    tensor = draw(st.sampled_from(sorted(header)))
    if how == "field":
        header[tensor] = {**header[tensor], draw(FIELDS): draw(ODD)}
    elif how == "name":
        header[draw(NAMES)] = header.pop(tensor)
    elif how == "twice":
        header[draw(NAMES)] = header[tensor]
    elif how == "metadata":
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=9), ODD, max_size=4))
    elif how == "bytes":
        place = draw(st.integers(0, len(data) - 1))
        return data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place + 9 :]
    elif how == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    elif how == "longer":
        return data + draw(st.binary(min_size=1, max_size=64))
    else:
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    return joined(header, body)


def check_add(repository: Repository, source: Path) -> None:
    """One answer, one line, nothing left over."""
    result = repository.add_all(source, base="toy")
    assert len(result.added) + len(result.refused) >= 1
    for refused in result.refused:
        assert refused.reason and "\n" not in refused.reason and "Traceback" not in refused.reason
    assert repository.check() == []
    assert not [path for path in repository.root.rglob(".tmp-*")]
    for added in result.added:
        repository.remove(added.id)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_file_is_taken_or_refused_in_one_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = Repository.open(folder / "repo", create=True)
        repository.add_base(make.base(folder / "toy"))
        source = folder / "in"
        source.mkdir()
        (source / "dog.safetensors").write_bytes(data.draw(mutated(valid(folder / "lora"))))
        check_add(repository, source)


TEXTS = st.one_of(
    st.text(max_size=200),
    st.sampled_from(
        ["{", "[]", '{"id": "../../x"}', '{"trigger": 5}', "---\nbase_model: [\n---", "\x00\x01", "{" * 3000]
    ),
    st.dictionaries(
        st.sampled_from(
            ["id", "kind", "base", "trigger", "name", "civitai", "trainedWords", "activation text", "sd version"]
        ),
        ODD,
        max_size=5,
    ).map(lambda card: json.dumps(card)),
)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(texts=st.dictionaries(
    st.sampled_from(["card.json", "README.md", "dog.json", "dog.civitai.info", "token_identifier.txt", "dog.metadata.json"]),
    TEXTS,
    max_size=3,
))  # fmt: skip
def test_whatever_lies_beside_the_weights_is_read_or_refused_in_one_line(texts: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = Repository.open(folder / "repo", create=True)
        repository.add_base(make.base(folder / "toy"))
        source = make.lora(folder / "in", with_card=False)
        for file, text in texts.items():
            (source / file).write_text(text, encoding="utf-8", errors="replace")
        check_add(repository, source)


def test_a_file_of_a_hundred_thousand_tensors_is_refused_in_one_line(tmp_path: Path) -> None:
    repository = Repository.open(tmp_path / "repo", create=True)
    repository.add_base(make.base(tmp_path / "toy"))
    tensors = {f"lora_unet_{number}.alpha": np.zeros(1, np.float16) for number in range(100_000)}
    save_file(tensors, tmp_path / "many.safetensors")
    check_add(repository, tmp_path / "many.safetensors")
