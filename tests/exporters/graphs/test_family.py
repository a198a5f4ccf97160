"""Families that lie traced beside the exporter: whole, of this recipe, and taken in place of a trace."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import onnx
import pytest

from exporters.graphs import family
from exporters.graphs.family import NOTE, SHIPPED, TRACE_VERSION, open_family
from personalq.architecture import SECOND_ENCODER, family_key, read_configs
from tests.personalq.test_architecture import PUBLISHED

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
ROOT = Path(__file__).parents[3]
GALLERY = ROOT / "gallery" / "repository" / "bases" / "toyworld"
FOLDERS = sorted(folder for folder in SHIPPED.iterdir() if folder.is_dir())


def test_stable_diffusions_as_published_and_the_gallery_are_shipped() -> None:
    notes = [json.loads((folder / NOTE).read_text()) for folder in FOLDERS]
    assert {family_key(PUBLISHED), family_key(read_configs(GALLERY))} <= {note["key"] for note in notes}
    kinds = {(n["configs"]["unet"]["cross_attention_dim"], SECOND_ENCODER in n["configs"]) for n in notes}
    assert {(768, False), (1024, False), (2048, True)} <= kinds


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name[:8])
def test_a_shipped_family_has_every_parameter_of_its_models(folder: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from exporters.graphs.trace import hollow

    note = json.loads((folder / NOTE).read_text())
    configs = note["configs"]
    assert folder.name == f"{family_key(configs)}-v{TRACE_VERSION}", "run: python tools/trace_families.py"
    assert note["trace_version"] == TRACE_VERSION and note["versions"].keys() >= {"torch", "diffusers"}
    held = {
        file.stem: {one.name: tuple(one.dims) for one in onnx.load(file, load_external_data=False).graph.initializer}
        for file in folder.glob("*.onnx")
    }
    unet = hollow(UNet2DConditionModel.from_config, configs["unet"])
    for name, parameter in unet.named_parameters():
        (found,) = (graph[name] for graph in (held["unet"], held["text_rows"]) if name in graph)
        assert found == tuple(parameter.shape), name
    vae = hollow(AutoencoderKL.from_config, configs["vae"])
    for name, parameter in vae.named_parameters():
        if name.startswith(("decoder.", "post_quant_conv.")):
            assert held["vae_decoder"][name] == tuple(parameter.shape), name
    encoders = [name for name in ("text_encoder", SECOND_ENCODER) if name in configs]
    assert held.keys() == {"unet", "text_rows", "vae_decoder", *encoders}


def test_a_shipped_family_is_taken_and_not_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(family, "_trace", refuse)
    found = open_family(tmp_path / "families", GALLERY)
    assert found.folder == tmp_path / "families" / f"{found.key}-v{TRACE_VERSION}"
    shipped = SHIPPED / found.folder.name
    names = sorted(file.name for file in shipped.iterdir())
    assert names == sorted(file.name for file in found.folder.iterdir())
    assert all((shipped / name).read_bytes() == (found.folder / name).read_bytes() for name in names)
    shutil.rmtree(found.folder)
    monkeypatch.setattr(family, "SHIPPED", tmp_path / "nothing")
    with pytest.raises(AssertionError, match="traced"):
        open_family(tmp_path / "families", GALLERY)
    assert list((tmp_path / "families").glob("[!.]*")) == []


def test_a_first_export_of_a_shipped_family_needs_no_torch(tmp_path: Path) -> None:
    for part in ("bases", "checkpoints/domino-the-dog"):
        shutil.copytree(ROOT / "gallery" / "repository" / part, tmp_path / part)
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "onnxscript"):
    sys.modules[name] = None
sys.argv = ["personalq", "--repo", sys.argv[1], "export", "domino-the-dog", "--spec", "fp16", "--json"]
import cli
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (Path(json.loads(done.stdout)["bundle"]) / "unet.ort.onnx").is_file()


def test_the_tool_tells_a_family_that_is_traced_otherwise_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("trace_families", ROOT / "tools" / "trace_families.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    note = json.loads((FOLDERS[0] / NOTE).read_text())

    def retrace(folder: Path, key: str, *_: object, change: bytes = b"") -> None:
        shutil.copytree(SHIPPED / f"{key}-v{TRACE_VERSION}", folder, dirs_exist_ok=True)
        (folder / "unet.onnx").write_bytes((folder / "unet.onnx").read_bytes() + change)

    monkeypatch.setattr(tool, "version", lambda name: note["versions"][name])
    monkeypatch.setattr(tool, "write_family", retrace)
    assert tool.differs(note) is False
    monkeypatch.setattr(tool, "write_family", partial(retrace, change=b"more"))
    assert tool.differs(note) is True
    monkeypatch.setattr(tool, "version", lambda name: "another")
    assert tool.differs(note) is False
    equal, other, elsewhere = capsys.readouterr().out.splitlines()
    assert equal.endswith(": equal") and other.endswith("differs in unet.onnx") and elsewhere.endswith("not compared")
