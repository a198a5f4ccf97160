"""The rooms depend in one direction, importing does nothing, and a missing extra is one line that names it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOP = ("personalq", "calibration", "exporters", "runtime", "fleet", "cli", "gallery", "bench")

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "onnx", "onnx_ir", "onnxscript"}
ABOVE = {"fleet", "cli", "bench", "tests", "gallery"}
FORBIDDEN = {
    "personalq": HEAVY | ABOVE | {"calibration", "exporters", "runtime"},
    "runtime": HEAVY | ABOVE | {"calibration", "exporters"},
    "calibration": ABOVE | {"exporters", "runtime"},
    "exporters": ABOVE | {"calibration", "runtime"},
    "fleet": ABOVE - {"fleet"},
}


def imports(file: Path) -> Iterator[str]:
    """The top-level name of every absolute import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value.split(".")[0]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [f"{file.relative_to(ROOT)}: {name}" for file in files for name in imports(file) if name in FORBIDDEN[room]]
    assert not wrong


@pytest.mark.parametrize("room", FORBIDDEN)
def test_relative_imports_stay_in_their_room(room: str) -> None:
    for file in sorted((ROOT / room).rglob("*.py")):
        depth = len(file.relative_to(ROOT).parts) - 1
        levels = [node.level for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        assert all(level <= depth for level in levels), file


# Pieces of tensor names in files people bring: LoRA halves and prefixes, embeddings, the original layout, old prefixes.
SPELLINGS = re.compile(
    r"lora_(?:[AB]|down|up|mid|unet|te)|[._]lora\.|_linear_layer|hada_w|lokr_w|dora_scale|magnitude_vector"
    r"|_custom_diffusion\b|clip_[lg]\b|emb_params|bundle_emb|string_to_param|token_embedding"
    r"|model\.diffusion_model|cond_stage_model|first_stage_model|conditioner\.|text_model\."
)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_the_spelling_of_tensors_in_files_stands_in_the_reader_alone(room: str) -> None:
    reader = ROOT / "personalq" / "weights"
    files = [file for file in sorted((ROOT / room).rglob("*.py")) if not file.is_relative_to(reader)]
    spelt = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SPELLINGS.search(node.value)
    ]
    assert not spelt


def fresh(code: str) -> str:
    """What a new interpreter prints for `code`."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "room", ["runtime", "personalq", "cli", "exporters", "calibration", "fleet", "gallery", "bench"]
)
def test_importing_a_room_loads_nothing_heavy(room: str) -> None:
    loaded = set(fresh(f"import {room}, sys; print(*sys.modules)").split())
    assert not loaded & (HEAVY | {"onnxruntime", "openvino", "tensorrt", "scipy"})


def test_the_whole_runtime_and_personalq_load_without_torch() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in ("personalq", "runtime")
        for file in sorted((ROOT / room).rglob("*.py"))
    ]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    assert not set(fresh(code).split()) & HEAVY


# What a command needs -> (the command, the package that is taken away, the extra that must be named).
MISSING = [
    (["calibrate", "biscuit-the-dog"], "torch", "export"),
    (["calibrate", "biscuit-the-dog"], "diffusers", "export"),
    (["export", "biscuit-the-dog", "--spec", "fp16"], "onnx", "convert"),
    (["convert", "model.ckpt"], "torch", "export"),
    (["ask", "my dog"], "onnxruntime", "cpu"),
    (["serve"], "fastapi", "serve"),
    (["serve"], "prometheus_client", "serve"),
]


@pytest.mark.parametrize(("command", "package", "extra"), MISSING, ids=[f"{c[0]}-{p}" for c, p, _ in MISSING])
def test_a_missing_package_is_one_line_that_names_its_extra(command: list[str], package: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['personalq', *{command!r}]\nimport cli; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"personalq: {package} is not installed; run: pip install 'personalq[{extra}]'\n"
    assert done.stdout == ""


def test_every_extra_that_a_message_names_exists() -> None:
    from runtime.console import EXTRAS
    from runtime.doctor import EXTRAS as OF_TARGETS

    known = PROJECT["optional-dependencies"]
    assert {*EXTRAS.values(), *OF_TARGETS.values()} <= known.keys()
    # Distribution and module names differ in their dashes only.
    of_extra = {extra: " ".join(lines).replace("-", "_") for extra, lines in known.items()}
    assert all(package in of_extra[extra] for package, extra in (EXTRAS | OF_TARGETS).items())


def test_cpu_and_gpu_are_alternatives() -> None:
    extras = PROJECT["optional-dependencies"]
    assert not any("onnxruntime" in line for extra in set(extras) - {"cpu", "gpu"} for line in extras[extra])


def test_base_dependencies_hold_nothing_heavy() -> None:
    named = " ".join(PROJECT["dependencies"])
    assert not [package for package in HEAVY if package in named]


def test_every_room_is_packaged() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for room in TOP
        if (ROOT / room).is_dir()
        for file in (ROOT / room).rglob("__init__.py")
    }
    assert packages == set(tools["packages"])
    assert tools["py-modules"] == ["cli"]


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = [
        *PROJECT["dependencies"],
        *(
            PROJECT["optional-dependencies"][extra][i]
            for extra in ("cpu", "openvino", "serve", "convert", "export", "ray", "store", "dev")
            for i in range(len(PROJECT["optional-dependencies"][extra]))
        ),
    ]
    names = {re.split(r"[\[>=<]", line)[0].strip().lower().replace("_", "-") for line in wanted}
    assert names - {"personalq"} <= pinned


def test_no_other_distribution_owns_our_top_level_names() -> None:
    try:
        distribution("personalq")
    except PackageNotFoundError:
        pytest.skip("personalq is not installed here: pip install -e .")
    owners = packages_distributions()
    assert {name: set(owners.get(name, [])) - {"personalq"} for name in TOP} == {name: set() for name in TOP}


def test_the_command_line_is_small_and_every_command_prints_json() -> None:
    from cli import cli

    assert len((ROOT / "cli.py").read_text().splitlines()) <= 250
    without = {"spec", "serve"}
    for name, command in cli.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert name in without or "--json" in options, name


def test_the_readme_names_every_command_it_shows() -> None:
    from cli import cli

    shown = [line.split()[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("personalq ")]
    assert shown and set(shown) <= set(cli.commands)
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
