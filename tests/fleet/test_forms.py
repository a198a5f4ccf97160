"""Many checkpoints in the forms that suit them: one engine a base, adapters for what attaches exactly, the rest merged."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cli import cli
from exporters.adapters import export_adapter
from exporters.export import ExportResult
from fleet import step, verified
from fleet.planning import bases_of, form_for
from fleet.run import run_fleet
from fleet.step import run_task
from fleet.verified import NOTE, is_verified, verified_level
from fleet.work import Outcome, Task, Work
from personalq.errors import SpecError
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from personalq.repository.remote import Remote
from runtime.gate.check import Check, Report
from tests.fleet.many import NAMES, content, fresh_copy


def quiet(_: str, __: float) -> None:
    """No progress shown."""


@pytest.fixture
def root(many: Path, tmp_path: Path) -> Path:
    """The five LoRAs, and 'dora', which is no low-rank product."""
    root = fresh_copy(many, tmp_path / "repository").root
    folder = root / "checkpoints" / "dora"
    folder.mkdir()
    card = json.loads((root / "checkpoints" / "rex" / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "id": "dora"}))
    file = next((root / "checkpoints" / "rex").glob("*.safetensors"))
    tensors = load_file(file)
    lengths = {
        name.replace(".lora.up.weight", ".lora_magnitude_vector"): abs(value).sum(axis=1)
        for name, value in tensors.items()
        if name.endswith(".lora.up.weight")
    }
    save_file({**tensors, **lengths}, folder / file.name)
    return root


class Engines:
    """In place of calibration and the export of a base: makes what the repository reads of an engine, and counts."""

    def __init__(self, root: Path, error: Exception | None = None) -> None:
        self.root, self.error, self.asked = root, error, list[tuple[str, str]]()

    def __call__(self, repository: Repository, base_id: str, spec: Path, targets: Any, **_: Any) -> ExportResult:
        self.asked.append((base_id, spec.stem))
        if self.error is not None:
            raise self.error
        place = self.root / "bundles" / ("e" * 64)
        reused = place.is_dir()
        place.mkdir(parents=True, exist_ok=True)
        of = weights_sha256(self.root / "bases" / base_id, None)
        told = {"kind": "base", "checkpoint": {"id": base_id}, "key_parts": {"weights": of}, "files": {}}
        (place / "manifest.json").write_text(json.dumps(told))
        return ExportResult(place, place.name, 1, 2, 4, ("onnxruntime",), 0.1, 1, reused)


@pytest.fixture
def engines(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    made = Engines(root)
    monkeypatch.setattr(step, "base_request", made)
    monkeypatch.setattr(step, "calibrated", lambda _, id_, name: root / "specs" / id_ / f"{name}.json")
    monkeypatch.setattr(step, "read_any", lambda bundle: SimpleNamespace(files={}))
    monkeypatch.setattr("fleet.run.read_any", lambda bundle: SimpleNamespace(files={}))
    yield made


class Here:
    """Workers that run tasks in this process, in the order they are given out."""

    def __init__(self, work: Work) -> None:
        self.work, self.asked = work, list[tuple[str, str]]()

    def submit(self, task: Task) -> "Future[Outcome]":
        self.asked.append((task.kind, task.id))
        future: Future[Outcome] = Future()
        outcome = run_task(Work.from_json(self.work.to_json()), task)
        future.set_result(Outcome(**json.loads(json.dumps(asdict(outcome)))))
        return future

    def close(self) -> None:
        """Nothing runs."""


def test_a_run_makes_one_engine_a_base_and_attaches(root: Path, engines: Engines) -> None:
    work = Work(str(root), verify="none", threads=1)
    workers = Here(work)
    summary = run_fleet(work, ["one", "two", "three"], workers, 0, quiet)
    assert workers.asked == [("base", "tiny"), *(("checkpoint", name) for name in ("one", "two", "three"))]
    assert engines.asked == [("tiny", "taq-w8a8")]
    data = summary.to_json()
    assert data["forms"] == {"attached": 3, "merged": 0} and data["failed"] == []
    (base,) = data["bases"]
    assert (base["id"], base["form"], base["state"], base["spec"]) == ("tiny", "base", "done", "taq-w8a8")
    for row in data["done"]:
        assert (row["form"], row["form_reason"]) == ("attached", "its change is a low-rank product, layer by layer")
        assert export_adapter(Repository.open(root), row["id"]).key == row["bundle"]
    again = run_fleet(work, ["one", "two", "three"], Here(work), 0, quiet).to_json()
    assert [row["id"] for row in again["reused"]] == ["one", "three", "two"] and again["done"] == []


def test_the_bytes_are_those_of_one_export_after_the_other(root: Path, engines: Engines, tmp_path: Path) -> None:
    work = Work(str(root), verify="none", threads=1)
    run_fleet(work, NAMES, Here(work), 0, quiet)
    found = content(root / "bundles")
    other = fresh_copy(root, tmp_path / "other")
    for name in NAMES:
        export_adapter(other, name)
    alone = content(other.root / "bundles")
    assert len(alone) == 2 * len(NAMES) and {name: found[name] for name in alone} == alone


def test_what_is_no_adapter_exactly_is_merged_and_says_why(root: Path) -> None:
    repository, work = Repository.open(root), Work(str(root))
    form = form_for(work, repository, "dora")
    assert form.name == "merged" and form.reason.endswith("is no low-rank product")
    assert bases_of(work, repository, ["dora", "homeless", "wish", "nobody"]) == []
    assert bases_of(work, repository, ["dora", "one", "two"]) == ["tiny"]


@pytest.mark.parametrize(
    ("fields", "form", "bases"),
    [
        ({"spec": "taq-w4a8"}, "merged", []),
        ({"form": "merged"}, "merged", []),
        ({"form": "attached", "spec": "taq-w4a8"}, "attached", ["tiny"]),
    ],
    ids=str,
)
def test_a_named_spec_means_merged_unless_the_form_was_named_too(
    root: Path, fields: dict[str, str], form: str, bases: list[str]
) -> None:
    work, repository = Work(str(root), **fields), Repository.open(root)
    assert form_for(work, repository, "one").name == form and bases_of(work, repository, ["one"]) == bases


def test_a_base_that_cannot_be_made_is_told_and_stops_no_adapter(root: Path, engines: Engines) -> None:
    engines.error = SpecError("toy: must be so, got not; do that")
    work = Work(str(root), verify="none", threads=1)
    summary = run_fleet(work, ["one"], Here(work), 0, quiet)
    data = summary.to_json()
    assert summary.has_failed and [row["id"] for row in data["done"]] == ["one"]
    assert (data["bases"][0]["state"], data["bases"][0]["step"]) == ("failed", "export")
    assert data["bases"][0]["reason"] == "toy: must be so, got not; do that"


def test_an_adapter_is_verified_on_the_engine_it_is_attached_to(
    root: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def answer(request: Any, opened: Any, open_weights: Any) -> Any:
        asked.append((Path(request.bundle).name, request.level))
        check = Check("files intact", value=0.0, limit=0.0, passed=len(asked) != 3)
        return SimpleNamespace(report=Report(root, (check,), headline="FAILED one"))

    monkeypatch.setattr(verified, "answer", answer)
    engine = engines(Repository.open(root), "tiny", Path("taq-w8a8.json"), ()).bundle
    work = Work(str(root), verify="images", threads=1)
    first = run_task(work, Task("checkpoint", "one"))
    assert (first.state, first.verified) == ("done", "integrity"), first.reason  # no goldens: the files alone
    assert run_task(work, Task("checkpoint", "one")).state == "reused" and asked == [(first.bundle, "integrity")]
    bundle = root / "bundles" / first.bundle
    assert json.loads((bundle / NOTE).read_text()).keys() >= {"level", "manifest_sha256", "engine_sha256"}
    manifest = engine / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files": {}', '"files": {}, "steps": 3'))
    assert verified_level(bundle, engine) == "" and not is_verified(bundle, "integrity", engine)  # another engine
    (root / "specs" / "one").mkdir()
    (root / "specs" / "one" / "reference.safetensors").write_bytes(b"goldens")
    assert run_task(replace(work, verify="numerics"), Task("checkpoint", "one")).verified == "numerics"
    assert asked[-1] == (first.bundle, "numerics")
    failed = run_task(work, Task("checkpoint", "one"))
    assert (failed.state, failed.step, failed.reason) == ("failed", "verify", "FAILED one")


def test_from_the_command_line_to_a_store_base_and_adapters_are_made_verified_and_published(
    root: Path, tmp_path: Path
) -> None:
    """Nothing here is in place of anything: an unquantised engine of the base needs no calibration."""
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'personalq[store]'")
    ids, url = tmp_path / "ids", f"file://{tmp_path}/store"
    ids.write_text("one\ntwo\ndora\n")
    options = ["--form", "attached", "--spec", "fp16", "--workers", "2", "--threads", "1", "--store", url]
    ran = CliRunner().invoke(cli, ["--repo", str(root), "export", "--ids", str(ids), *options, "--json"])
    data = json.loads(ran.stdout)
    assert ran.exit_code == 0, data["failed"]
    (base,) = data["bases"]
    assert (base["state"], base["id"], base["verified"]) == ("done", "tiny", "integrity")
    assert [(row["id"], row["form"], row["verified"]) for row in data["done"]] == [
        (name, "attached", "integrity") for name in ("dora", "one", "two")
    ]
    remote, sha256 = Remote(url), weights_sha256(root / "bases" / "tiny", None)
    assert remote.ids() == ["dora", "one", "two"]
    of_base = remote.base(sha256)
    assert of_base is not None and of_base.key == base["bundle"]
    repository = Repository.open(root)
    assert repository.check() == []
    assert {name: repository.exports(name).form for name in ("one", "rex")} == {"one": "attached", "rex": ""}
    assert [place.name for place in repository.base_engines(sha256)] == [base["bundle"]]
    again = json.loads(CliRunner().invoke(cli, ["--repo", str(root), "export", "one", "--store", url, "--json"]).stdout)
    assert again["reused"] and again["base_in_store"] and Path(again["base_bundle"]).name == base["bundle"]


def test_a_bases_engine_is_exported_by_its_id(root: Path) -> None:
    ran = CliRunner().invoke(cli, ["--repo", str(root), "export", "--base", "tiny", "--spec", "fp16", "--json"])
    assert ran.exit_code == 0, ran.stderr
    data = json.loads(ran.stdout)
    assert (data["form"], data["base"]) == ("base", "tiny") and Path(data["bundle"], "unet.ort.onnx").is_file()
    wrong = CliRunner().invoke(cli, ["--repo", str(root), "export", "--base", "rex", "--spec", "fp16"])
    assert wrong.exit_code == 1 and wrong.stderr.count("\n") == 1 and "rex: must be a base" in wrong.stderr
    unknown = CliRunner().invoke(cli, ["--repo", str(root), "export", "--base", "nowhere"])
    assert unknown.exit_code == 1 and unknown.stderr.count("\n") == 1, unknown.stderr
