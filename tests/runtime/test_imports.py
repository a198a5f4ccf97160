"""The runtime is light: no torch, diffusers, transformers or onnx, not even after a picture was drawn."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "calibration", "exporters")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    loaded = run("import runtime, sys; print(sorted(m for m in sys.modules if '.' not in m))")
    assert not set(ast.literal_eval(loaded)) & {*FORBIDDEN, "onnxruntime", "numpy", "tokenizers", "PIL"}


def test_drawing_and_verifying_import_no_training_package(bundle: Path, tmp_path: Path) -> None:
    loaded = run(
        f"""
        import sys
        from pathlib import Path
        from runtime import OrtEngine, Pipeline, verify_bundle, write_png
        bundle = Path({str(bundle)!r})
        image = Pipeline(OrtEngine(bundle, threads=1)).image("a photo of sks dog", steps=2)
        write_png(Path({str(tmp_path / "image.png")!r}), image)
        assert verify_bundle(bundle, threads=1).passed
        print(sorted(set(m.split('.')[0] for m in sys.modules)))
        """
    )
    assert not set(ast.literal_eval(loaded)) & set(FORBIDDEN)
    assert (tmp_path / "image.png").stat().st_size > 100


def test_every_public_name_loads() -> None:
    assert all(getattr(runtime, name) for name in runtime.__all__)
    assert set(runtime.__all__) <= set(dir(runtime))
    with pytest.raises(AttributeError, match="module 'runtime' has no attribute 'torch'"):
        runtime.torch  # noqa: B018


@pytest.mark.parametrize("file", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda file: file.name)
def test_no_file_of_the_runtime_imports_a_training_package(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not {name.split(".")[0] for name in names} & set(FORBIDDEN)
