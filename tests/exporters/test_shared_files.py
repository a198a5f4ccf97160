"""The bundle store: equal bytes are there once, garbage goes, one export at a time for one key, and kill -9 harms nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporters.export import export_checkpoint
from exporters.external_data import PIECE, StoredTensor, as_float, write_graph
from exporters.lock import only_one
from exporters.request import last_spec
from personalq.bundle import check_files, file_sha256, read_manifest
from personalq.repository import Repository
from personalq.repository.sharing import NOTES, SMALLEST, dangling, forget_dangling, link_shared, note_shared
from personalq.weights.tensorfile import RESIDENT, TensorFile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(exported, tmp_path: Path) -> Repository:
    """A copy of the shared tiny repository that a test may change, without bundles."""
    root = tmp_path / "repository"
    shutil.copytree(exported[0].root, root, ignore=shutil.ignore_patterns("bundles", "shared"))
    return Repository.open(root)


def folder_with(root: Path, name: str, content: dict[str, bytes]) -> tuple[Path, dict[str, str]]:
    folder = root / "bundles" / name
    folder.mkdir(parents=True)
    for file, data in content.items():
        (folder / file).write_bytes(data)
    return folder, {file: file_sha256(folder / file) for file in content}


def test_equal_files_of_two_bundles_are_one_on_disk(tmp_path: Path) -> None:
    big, small = os.urandom(SMALLEST), b"graph"
    first, hashes = folder_with(tmp_path, "a", {"vae.data": big, "vae.onnx": small})
    assert link_shared(tmp_path, first, hashes) == 0
    note_shared(tmp_path, first, hashes)
    second, _ = folder_with(tmp_path, "b", {"vae.data": big, "vae.onnx": small})
    assert link_shared(tmp_path, second, hashes) == len(big)
    assert (first / "vae.data").samefile(second / "vae.data")
    assert not (first / "vae.onnx").samefile(second / "vae.onnx")
    assert list(dangling(tmp_path)) == []
    shutil.rmtree(first)
    assert (second / "vae.data").read_bytes() == big
    assert [note.name for note in dangling(tmp_path)] == [hashes["vae.data"]]
    forget_dangling(tmp_path)
    assert list((tmp_path / NOTES).iterdir()) == []


def test_a_spoiled_file_is_not_handed_to_the_next_bundle(tmp_path: Path) -> None:
    big = os.urandom(SMALLEST)
    first, hashes = folder_with(tmp_path, "a", {"vae.data": big})
    note_shared(tmp_path, first, hashes)
    with (first / "vae.data").open("r+b") as file:
        file.write(bytes([big[0] ^ 1]))
    second, _ = folder_with(tmp_path, "b", {"vae.data": big})
    assert link_shared(tmp_path, second, hashes) == 0
    assert (second / "vae.data").read_bytes() == big
    note_shared(tmp_path, second, hashes)
    assert (tmp_path / NOTES / hashes["vae.data"]).read_text() == "b/vae.data\n"


@pytest.mark.parametrize("note", ["../../outside", "a/../../outside", "/etc/hostname", "a", ""])
def test_a_note_that_leads_out_of_the_bundles_is_not_followed(tmp_path: Path, note: str) -> None:
    big = os.urandom(SMALLEST)
    (tmp_path / "outside").write_bytes(big)
    second, hashes = folder_with(tmp_path, "b", {"vae.data": big})
    (tmp_path / NOTES).mkdir()
    (tmp_path / NOTES / hashes["vae.data"]).write_text(note)
    assert link_shared(tmp_path, second, hashes) == 0
    assert (second / "vae.data").stat().st_nlink == 1


def test_two_specs_of_one_checkpoint_share_what_they_do_not_change_and_rm_frees_it(repository: Repository) -> None:
    specs = [repository.root / "specs" / "rex" / f"{name}.json" for name in ("fp32", "taq-w8a8")]
    bundles = [export_checkpoint(repository, "rex", spec).bundle for spec in specs]
    fp32, taq = (read_manifest(bundle).files for bundle in bundles)
    equal = {n for n in fp32 if n in taq and fp32[n] == taq[n] and fp32[n].bytes >= SMALLEST}
    assert equal
    for name in equal:
        assert (bundles[0] / name).samefile(bundles[1] / name), name
    assert all((bundle / "weights.data").stat().st_nlink == 1 for bundle in bundles)
    repository.remove("rex")
    assert not [bundle for bundle in bundles if bundle.exists()]
    assert list((repository.root / NOTES).iterdir()) == []
    assert repository.check() == []


def test_a_note_without_a_bundle_is_reported_and_removed_only_when_asked(repository: Repository) -> None:
    made = export_checkpoint(repository, "rex", last_spec(repository, "rex"))
    shutil.rmtree(made.bundle)
    problems = repository.check()
    assert problems and {problem.kind for problem in problems} == {"orphan"}
    assert "leads to no bundle any more; remove it with 'personalq check --fix'" in problems[0].message
    assert all(problem.fixed for problem in repository.check(fix=True))
    assert repository.check() == []


def test_two_exporters_of_one_key_do_the_work_once(repository: Repository) -> None:
    code = (
        "import sys; from pathlib import Path; from personalq.repository import Repository;"
        "from exporters.export import export_checkpoint;"
        "print(export_checkpoint(Repository.open(Path(sys.argv[1])), 'rex', Path(sys.argv[2])).reused)"
    )
    spec = last_spec(repository, "rex")
    command = [sys.executable, "-c", code, str(repository.root), str(spec)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in both) == ["False", "True"]
    bundle = export_checkpoint(repository, "rex", spec).bundle
    assert not check_files(bundle, read_manifest(bundle))
    assert not list((repository.root / "bundles").glob(".*"))


def test_a_lock_left_by_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock-key").touch()
    with only_one(tmp_path / "key"):
        assert (tmp_path / ".lock-key").exists()
    assert list(tmp_path.iterdir()) == []


def test_kill_9_at_random_moments_never_leaves_the_store_inconsistent(exported) -> None:
    command = [sys.executable, "-m", "bench.kills", "--exports", "6", "--source", str(exported[0].root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] >= 1
    assert [counts[key] for key in ("inconsistent", "left_over", "reruns_that_differ")] == [0, 0, 0]


def test_a_large_tensor_is_made_in_pieces_and_turned(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((2 * PIECE // 512 + 3, 512)).astype(np.float16)
    starts: list[int] = []

    def convert(rows: np.ndarray, start: int) -> np.ndarray:
        starts.append(start)
        return (rows * 4).astype(np.int8)

    tensor = StoredTensor("w", "w", ir.DataType.INT8, weight.shape[::-1], convert, is_transposed=True)
    np.testing.assert_array_equal(tensor.make(lambda name: weight), (weight * 4).astype(np.int8).T)
    assert len(starts) == 3 and starts[0] == 0


def test_progress_tells_bytes_and_the_time_that_is_left(tmp_path: Path) -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=9)
    tensors = [as_float(f"m.{i}", (1000, 250), ir.DataType.FLOAT) for i in range(4)]
    for tensor in tensors:
        graph.register_initializer(ir.Value(name=tensor.name, const_value=ir.tensor(np.zeros(1), name=tensor.name)))
    told: list[tuple[str, float]] = []
    write_graph(
        model,
        tensors,
        lambda name: np.full((1000, 250), float(name[2:]), np.float16),
        tmp_path / "g.onnx",
        "g.data",
        lambda text, done: told.append((text, done)),
    )
    assert [done for _, done in told] == [0.25, 0.5, 0.75, 1.0]
    assert told[-1][0] == "4 of 4 MB, 0 s left"
    stored = np.fromfile(tmp_path / "g.data", np.float32).reshape(4, -1)
    assert [set(row) for row in stored.tolist()] == [{0.0}, {1.0}, {2.0}, {3.0}]


def test_a_failing_tensor_stops_the_export_with_its_own_error(tmp_path: Path) -> None:
    def read(name: str) -> np.ndarray:
        raise OSError(f"{name}: gone")

    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="g")
    graph.register_initializer(ir.Value(name="m.0", const_value=ir.tensor(np.zeros(1), name="m.0")))
    tensors = [as_float("m.0", (1,), ir.DataType.FLOAT)]
    with pytest.raises(OSError, match=r"m\.0: gone"):
        write_graph(ir.Model(graph, ir_version=9), tensors, read, tmp_path / "g.onnx", "g.data")


def test_reading_a_file_larger_than_what_may_stay_mapped_keeps_the_process_small(tmp_path: Path) -> None:
    """Three times what may stay: what is resident of the file stays below that and one tensor more."""
    n_tensors, size = 6, RESIDENT // 2
    header = {
        f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(n_tensors)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + n_tensors * size)
    opened = TensorFile(path)
    for name in opened.names():
        assert opened.read(name).max() == 0
        assert resident_of(path) <= RESIDENT + size + (4 << 20)


def resident_of(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            is_inside = line.endswith(str(path))
        elif is_inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
