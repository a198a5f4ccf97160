"""The commands in docs/gate.md run as they stand, in a folder with one repository of one bundle."""

import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import cli
from runtime.gate.baseline import read_baselines

PAGE = Path(__file__).parents[3] / "docs" / "gate.md"
COMMANDS = [
    line.partition("#")[0].strip() for line in PAGE.read_text().splitlines() if line.startswith("personalq verify ")
]


@pytest.fixture(scope="module")
def folder(made_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("docs")
    card = {"id": "moss-mug", "name": "Moss mug", "kind": "textual_inversion", "base": "tiny", "trigger": ["sks"]}
    home = root / "repository" / "checkpoints" / "moss-mug"
    home.mkdir(parents=True)
    (home / "card.json").write_text(json.dumps(card))
    shutil.copytree(made_bundles["split"], root / "repository" / "bundles" / "split000")
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_page_passes(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "openvino" in command and find_spec("openvino") is None:
        pytest.skip("openvino is not installed: pip install 'personalq[openvino]'")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PERSONALQ_REPO", "repository")
    result = CliRunner().invoke(cli, [*shlex.split(command)[1:], "--threads", "1"])
    assert result.exit_code == 0, result.stdout + result.stderr
    assert result.stdout.startswith("PASSED moss-mug/taq")
    for name in (word for word in command.split() if word.startswith("gate.")):
        assert (folder / name).stat().st_size > 1000
    if "--update-baseline" in command:
        assert set(read_baselines(folder / "repository.baselines.json").bundles) == {"moss-mug/taq"}


def test_a_failing_bundle_exits_1_with_its_name_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(folder / "repository" / "bundles" / "split000", folder / "spoiled"))
    (copy / "vae_decoder.onnx").write_bytes(b"x")
    result = CliRunner().invoke(cli, ["verify", str(copy)])
    assert result.exit_code == 1
    assert result.stdout.startswith("FAILED moss-mug/taq: files intact: vae_decoder.onnx: bytes differ")


def test_a_judge_that_cannot_be_imported_is_one_line(folder: Path) -> None:
    result = CliRunner().invoke(
        cli, ["verify", str(folder / "repository" / "bundles" / "split000"), "--judge", "no:such"]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("personalq: --judge: must be MODULE:FUNCTION that can be imported, got 'no:such'")


def test_a_judge_is_compared_with_fp32_both_ways(made_bundles: dict[str, Path], tmp_path: Path) -> None:
    """A judge that sees a large change between the two sides fails, whichever side it prefers."""
    import numpy as np

    from runtime.gate.gate import Options, run_gate
    from runtime.gate.subject import Sources

    def judging(sign: float, gap: float) -> Sources:
        calls: list[int] = []

        def judge(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
            calls.append(len(images))
            return {"concept": np.full(len(prompts), 0.5 + (sign * gap if len(calls) > 1 else 0.0))}

        return Sources(judge=judge)

    for sign, word in ((1, "better"), (-1, "worse")):
        report = run_gate(made_bundles["split"], Options(threads=1), judging(sign, 0.1))
        assert [(check.name, check.reason) for check in report.failed] == [
            ("judge concept, beside FP32", f"{word} than FP32 by 0.100")
        ]
        assert run_gate(made_bundles["split"], Options(threads=1), judging(sign, 0.005)).passed
