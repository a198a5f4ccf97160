"""`personalq convert`: the tensors of a pickle, bit for bit, and nothing that it asks to run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from personalq.cards.importers import read_source
from personalq.errors import RepositoryError
from personalq.weights.pickles import pickle_refusal
from tests.conftest import tiny_pipeline

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from exporters.convert import Reader, convert  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
W = torch.arange(12.0).reshape(3, 4)


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(content: Any, name: str, **how: Any) -> Path:
    torch.save(content, name, **how)
    return Path(name)


def ran(*arguments: str | Path) -> tuple[dict[str, Any], int]:
    done = CliRunner().invoke(cli, ["convert", *map(str, arguments), "--json"])
    return json.loads(done.stdout), done.exit_code


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal names, types, shapes and bits."""
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


def metadata(file: Path) -> dict[str, str]:
    with safe_open(str(file), framework="pt") as opened:
        return dict(opened.metadata())


TENSORS = {
    "strided": W.T,
    "sliced": W[:, 1:3],
    "one of two names": W,
    "the other": W,
    "expanded": torch.ones(1, 4).expand(3, 4),
    "half": W.half(),
    "bfloat": W.bfloat16(),
    "double": W.double() / 3,
    "ids": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "trained": torch.nn.Parameter(W + 1),
}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pytorch_lora_weights.bin": (TENSORS, {}),
    "adapter_model.bin": (OrderedDict(TENSORS), {}),
    "old format.pt": (TENSORS, {"_use_new_zipfile_serialization": False}),
    "lightning.ckpt": ({"state_dict": TENSORS, "epoch": 1, "lr_schedulers": []}, {}),
    "zero.pt": ({"module": TENSORS}, {}),
}


def test_every_tensor_is_converted_bit_for_bit_in_its_own_type() -> None:
    for name, (content, how) in LAYOUTS.items():
        saved(content, name, **how).chmod(0o640)
    data, code = ran(*LAYOUTS)
    assert code == 0 and data["refused"] == []
    for name, one in zip(LAYOUTS, data["converted"], strict=True):
        file = Path(name).with_suffix(".safetensors")
        counts = {"tensors": len(TENSORS), "bytes": file.stat().st_size, "left_out": []}
        assert one == {"source": name, "file": str(file), **counts}
        assert same(load_file(file), {key: value.detach() for key, value in TENSORS.items()})
        assert metadata(file)["format"] == "pt"
        assert file.stat().st_mode & 0o777 == 0o640  # as readable as the pickle
    assert len(list(Path().iterdir())) == 2 * len(LAYOUTS)


def test_a_checkpoint_of_lightning_keeps_its_numbers_as_text_and_names_the_rest() -> None:
    content = {
        "state_dict": {"w": W},
        "epoch": 7,
        "pytorch-lightning_version": "1.4.2",
        "optimizer_states": [{"exp_avg": W}],
        "hyper_parameters": argparse.Namespace(lr=np.float64(1e-4)),
    }
    data, code = ran(saved(content, "sd.ckpt"))
    assert code == 0
    assert data["converted"][0]["left_out"] == ["'optimizer_states' (list of 1)", "'hyper_parameters' (Namespace)"]
    assert metadata(Path("sd.safetensors")) == {"format": "pt", "epoch": "7", "pytorch-lightning_version": "1.4.2"}


def test_an_a1111_embedding_is_what_diffusers_reads_from_the_pickle() -> None:
    vectors = torch.nn.Parameter(torch.linspace(-1, 1, 64).reshape(2, 32))
    forms = {"cat-toy": {"*": vectors}, "module": torch.nn.ParameterDict({"*": vectors})}
    for name, params in forms.items():
        notes = {"name": "cat", "step": 400, "sd_checkpoint": None}
        saved({"string_to_token": {"*": 265}, "string_to_param": params, **notes}, f"{name}.pt")
    data, code = ran("cat-toy.pt", "module.pt")
    assert code == 0 and {*data["converted"][0]["left_out"]} == {"'string_to_token' (dict of 1)"}
    pipe = tiny_pipeline()
    pipe.load_textual_inversion("cat-toy.pt", token="<cat-toy>")
    first = pipe.tokenizer.convert_tokens_to_ids("<cat-toy>")
    rows = pipe.text_encoder.get_input_embeddings().weight[first : first + 2].detach()
    for name in forms:
        assert same(load_file(f"{name}.safetensors"), {"emb_params": rows})
        assert metadata(Path(f"{name}.safetensors")) == {"format": "pt", "name": "cat", "step": "400"}


def test_embeddings_and_custom_diffusion_can_be_added_as_they_come_out() -> None:
    place = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    saved({"<cat-toy>": torch.ones(32)}, "learned_embeds.bin")
    saved({"unet": {place: W}, "modifier_token": {"<new1>": torch.ones(32)}}, "delta.bin")
    data, _ = ran("delta.bin", "--out", "cat")
    assert [one["file"] for one in data["converted"]] == ["cat/delta.safetensors", "cat/delta-tokens.safetensors"]
    ran("learned_embeds.bin", "--out", "toy")
    cards = [read_source(Path(name)).card for name in ("cat", "toy")]
    assert [(card.kind, card.trigger) for card in cards] == [
        ("custom_diffusion", ("<new1>",)),
        ("textual_inversion", ("<cat-toy>",)),
    ]


def test_the_command_of_the_refusal_works_in_a_shell() -> None:
    file = saved({"unet.x.to_k.lora_A.weight": W, "unet.x.to_k.lora_B.weight": W.T}, "my old; dog's lora.bin")
    with pytest.raises(RepositoryError) as caught:
        read_source(file)
    command = str(caught.value).partition("nothing else: ")[2]
    personalq = f"{shlex.quote(sys.executable)} -c 'import cli; cli.main()'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command.replace("personalq", personalq, 1), shell=True, check=True, env=environment, timeout=120)
    assert read_source(file.with_suffix(".safetensors")).card.kind == "lora"


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


ATTACKS = {
    "system": Attack(os.system, "touch pwned"),
    "eval": Attack(eval, "open('pwned', 'w')"),
    "exec": Attack(exec, "open('pwned', 'w')"),
    "subprocess": Attack(subprocess.check_call, ["touch", "pwned"]),
    "open": Attack(open, "pwned", "w"),
    "loads": Attack(json.loads, "[]"),
}


def test_a_pickle_with_code_in_it_is_not_opened() -> None:
    names = []
    for old in (False, True):
        for attack, content in ATTACKS.items():
            names.append(f"{attack}{'-old' if old else ''}.ckpt")
            saved({"w": W, "x": content}, names[-1], _use_new_zipfile_serialization=not old)
    saved({"w": W, "x": torch.nn.Linear(2, 2)}, "model.ckpt")
    data, code = ran(*names, "model.ckpt")
    assert code == 1 and data["converted"] == []
    assert [one["source"] for one in data["refused"]] == [*names, "model.ckpt"]
    for one in data["refused"]:
        assert one["reason"].startswith(f"{one['source']}: contains more than weights (it asks for "), one
        assert one["reason"].endswith("), so it is not opened; get it as safetensors from its author")
    assert not Path("pwned").exists() and not list(Path().glob("*.safetensors"))


def test_objects_that_trainers_leave_are_never_imported() -> None:
    Path("pytorch_lightning").mkdir()
    Path("pytorch_lightning/__init__.py").write_text("open('pwned', 'w')\nclass Callback: pass\n")
    Path("torch.py").write_text("open('pwned', 'w')\n")
    code = (
        "import sys, types; made = types.ModuleType('pytorch_lightning'); sys.modules['pytorch_lightning'] = made\n"
        "class Callback: pass\n"
        "Callback.__module__ = 'pytorch_lightning'; made.Callback = Callback; sys.path.remove('')\n"
        "import torch; torch.save({'state_dict': {'w': torch.ones(2)}, 'callbacks': {Callback: Callback()}}, 'sd.ckpt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    data, code_ = ran("sd.ckpt")
    assert (code_, data["converted"][0]["left_out"]) == (0, ["'callbacks' (dict of 1)"])
    assert not Path("pwned").exists()


def broken() -> Iterator[tuple[str, str]]:
    """Names of files that are no weights -> what is said of them."""
    whole = saved({"w": W}, "whole.pt").read_bytes()
    Path("whole.pt").unlink()
    Path("cut.ckpt").write_bytes(whole[:-60])
    yield (
        "cut.ckpt",
        "must be weights as torch saves them, got a file that its weights-only reader refuses (RuntimeError:",
    )
    Path("junk.pt").write_bytes(b"\x80\x02junk" * 9)
    yield "junk.pt", "must be weights as torch saves them, got a file that its weights-only reader refuses ("
    saved([W], "list.pt")
    yield "list.pt", "must hold tensors by name, got list of 1"
    saved({"w": torch.eye(3).to_sparse()}, "sparse.pt")
    yield "sparse.pt", "w: must be a plain tensor with its values, got sparse_coo, cpu; save it dense"
    saved({"w": torch.empty(3, device="meta")}, "meta.pt")
    yield "meta.pt", "w: must be a plain tensor with its values, got strided, meta; save it dense"
    saved({"w": torch.zeros(1).expand(10**10)}, "bomb.pt")
    yield "bomb.pt", "must hold at most 67115"
    save_file({"w": W}, "safe.ckpt")
    yield "safe.ckpt", "must be safetensors by name and content, got safetensors named .ckpt; rename it: mv safe.ckpt"
    Path("page.bin").write_text("<html>")
    yield "page.bin", "must be safetensors by name and content, got a web page; fetch it again"
    yield "nothing.bin", "must be a file with pickled weights, got none; check the path"


def test_each_file_stands_alone_and_says_what_is_wrong_with_it() -> None:
    wanted = dict(broken())
    good = [saved({"w": W}, name) for name in ("a.pt", "z.pt")]
    data, code = ran(good[0], *wanted, good[1])
    assert code == 1
    assert [one["source"] for one in data["converted"]] == ["a.pt", "z.pt"]
    reasons = {one["source"]: one["reason"] for one in data["refused"]}
    assert reasons.keys() == wanted.keys()
    for name, reason in wanted.items():
        assert reasons[name].startswith(f"{name}: {reason}") and "\n" not in reasons[name], reasons[name]


def test_people_get_one_line_for_each_refusal() -> None:
    Path("page.bin").write_text("<html>")
    done = CliRunner().invoke(cli, ["convert", "page.bin", str(saved({"w": W}, "a.pt"))])
    assert done.exit_code == 1
    assert (
        done.stderr == "personalq: page.bin: must be safetensors by name and content, got a web page; fetch it again\n"
    )
    assert "a.safetensors" in done.stdout


def test_an_existing_file_is_written_over_only_with_replace() -> None:
    saved({"w": W}, "a.pt")
    Path("a.safetensors").write_text("mine")
    data, code = ran("a.pt")
    reason = "a.safetensors: must be free, got a file; replace it with --replace, or name a folder with --out"
    assert (code, data["refused"]) == (1, [{"source": "a.pt", "reason": reason}])
    assert Path("a.safetensors").read_text() == "mine"
    assert ran("a.pt", "--replace")[1] == 0
    assert same(load_file("a.safetensors"), {"w": W})


def test_two_pickles_of_one_name_do_not_replace_each_other() -> None:
    saved({"w": W}, "a.pt")
    saved({"w": W + 1}, "a.ckpt")
    data, code = ran("a.pt", "a.ckpt", "--replace")
    assert code == 1 and same(load_file("a.safetensors"), {"w": W})
    assert "must have a name of its own, got that of a.safetensors, just written" in data["refused"][0]["reason"]


def test_a_pickle_named_safetensors_is_never_written_over() -> None:
    before = saved({"w": W}, "a.safetensors").read_bytes()
    data, code = ran("a.safetensors", "--replace")
    assert code == 1 and Path("a.safetensors").read_bytes() == before
    command = "mv a.safetensors a.ckpt && personalq convert a.ckpt"
    assert data["refused"][0]["reason"].endswith(f"got a pickle of that name; {command}")
    assert ran("a.safetensors", "--out", "safe")[1] == 0 and same(load_file("safe/a.safetensors"), {"w": W})


def test_a_reader_that_was_killed_costs_its_own_file_only() -> None:
    with Reader() as reader:
        Path("one").mkdir()
        assert reader.ask(saved({"w": W}, "a.pt"), Path("one"))["parts"].keys() == {""}
        assert reader._process is not None
        reader._process.kill()
        reader._process.wait()
        with pytest.raises(
            RepositoryError, match=r"a.pt: must be weights that can be read in bounds, got a reader killed"
        ):
            reader.ask(Path("a.pt"), Path("one"))
        assert "parts" in reader.ask(Path("a.pt"), Path("one"))


def alone(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_where_pickles_are_read_there_is_no_network_and_no_other_process() -> None:
    code = """
import os, socket, subprocess, sys
import exporters.unpickle as room
sys.addaudithook(room._refuse)
for call in (lambda: socket.socket(), lambda: os.system("true"), lambda: subprocess.run(["true"]), lambda: os.fork(),
             lambda: socket.getaddrinfo("localhost", 80)):
    try:
        call()
        print("done")
    except PermissionError as error:
        print("refused")
"""
    assert alone(code).split() == ["refused"] * 5


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is bounded where /proc says what is used")
def test_where_pickles_are_read_memory_and_files_are_bounded() -> None:
    code = """
import exporters.unpickle as room, resource
room.limit(1000)
try:
    bytes(4 << 30)
except MemoryError:
    print("memory")
print(resource.getrlimit(resource.RLIMIT_CPU)[0] < 300, resource.getrlimit(resource.RLIMIT_FSIZE)[0] < 1 << 28)
"""
    assert alone(code).split() == ["memory", "True", "True"]


def test_progress_names_every_file() -> None:
    seen: list[tuple[str, float]] = []
    convert([saved({"w": W}, "a.pt"), Path("nothing.pt")], progress=lambda text, done: seen.append((text, done)))
    assert seen == [("reading a.pt", 0.0), ("reading nothing.pt", 0.5)]


def test_a_pickle_is_refused_by_what_it_holds_and_not_by_its_name() -> None:
    assert "personalq convert" in str(pickle_refusal(saved({"w": W}, "a.bin")))
