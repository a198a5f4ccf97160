"""A trt graph compiled with the real TensorRT-for-RTX builder, for three architectures in one engine; no GPU needed.

`make test-rtx` installs the builder and names its folder in $TRT_RTX_DIR.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.trt import TOOL, compile_graph
from exporters.graphs.census import spec_kinds
from exporters.targets.engine_layers import from_aot, mismatches, table
from exporters.targets.settings import Shapes
from personalq.spec import SpecFile


def require_compiles(graph: Path, shapes: Shapes, spec_file: SpecFile) -> None:
    """Every layer of the spec is in the engine, in the types the spec says. Skips without the builder."""
    checked = subprocess.run([sys.executable, TOOL, "--self-check"], capture_output=True, text=True, check=False)
    if checked.returncode and "TRT_RTX_DIR" not in os.environ:
        pytest.skip("TensorRT for RTX is not installed: make test-rtx")
    assert not checked.returncode, checked.stdout + checked.stderr
    report = compile_graph(graph, {name: three[1] for name, three in shapes.items()}, "sm86,sm89,sm120", "")
    layers, wanted = from_aot(report), spec_kinds(spec_file.spec.layers)
    assert mismatches(layers, wanted) == []
    assert sum(table(layers, wanted).values()) == len(spec_file.spec.layers)
