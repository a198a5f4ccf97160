"""The project's own gate: two gallery checkpoints, exported under committed specs, against committed baselines.

    python -m gallery.gate            what CI runs: exit 1 when a check fails
    python -m gallery.gate --accept   after the exporter or the runtime changed on purpose: new baselines
    python -m gallery.gate --update   after the weights or the policy changed on purpose: new specs, then new baselines

Goldens are computed here by torch (they are too large to commit); specs and baselines lie in gallery/gate/.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from personalq.repository import Repository

HERE = Path(__file__).parent
GATED = ("grandmas-mug", "moss-mug")
SPEC = "taq-w8a8"
FOLDER = HERE / "gate"
BASELINES = FOLDER / "baselines.json"


def working_copy(root: Path) -> Repository:
    """The gated checkpoints and their base in a repository of its own."""
    for part in ("bases", *(f"checkpoints/{name}" for name in GATED)):
        shutil.copytree(HERE / "repository" / part, root / part)
    return Repository.open(root)


def export_gated(repository: Repository, name: str, *, calibrated: bool) -> Path:
    """The checkpoint's bundle, with goldens of today's weights; `calibrated`: under a new spec, which is kept."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint

    specs = repository.root / "specs" / name
    calibrate(repository, name, CalibrateOptions(policy="taq" if calibrated else "fp32"))
    committed = FOLDER / name
    if calibrated:
        committed.mkdir(parents=True, exist_ok=True)
    source, target = (specs, committed) if calibrated else (committed, specs)
    for kind in ("json", "safetensors"):
        shutil.copyfile(source / f"{SPEC}.{kind}", target / f"{SPEC}.{kind}")
    return export_checkpoint(repository, name, specs / f"{SPEC}.json").bundle


def weights_reader() -> Any:
    from personalq.weights.checkpoint import open_weights

    return open_weights


def run(*, calibrated: bool = False, accept: bool = False, html: Path | None = None) -> bool:
    """Gate each checkpoint; print each headline and what failed. True when all passed."""
    from runtime.gate.gate import Options, run_gate
    from runtime.gate.reports.html import html as page
    from runtime.gate.request import sources_of

    reports = []
    with tempfile.TemporaryDirectory(prefix="personalq-gate-") as scratch:
        repository = working_copy(Path(scratch) / "repository")
        for name in GATED:
            bundle = export_gated(repository, name, calibrated=calibrated)
            options = Options(threads=1, extra_pictures=0, baseline=BASELINES, update=accept)
            report = run_gate(bundle, options, sources_of(bundle, repository, weights_reader))
            reports.append(report)
            print(report.headline, *(f"  {check.name}: {check.reason}" for check in report.failed), sep="\n")
    if html is not None:
        html.write_text(page(reports))
    return all(report.passed for report in reports)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write the baselines of today's exports")
    parser.add_argument("--update", action="store_true", help="calibrate anew, then --accept")
    parser.add_argument("--html", type=Path, help="also write the report page")
    options = parser.parse_args()
    sys.exit(0 if run(calibrated=options.update, accept=options.accept or options.update, html=options.html) else 1)


if __name__ == "__main__":
    main()
