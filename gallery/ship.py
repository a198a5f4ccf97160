"""Make the base's engine that the gallery ships: calibrate the base over its checkpoints, export it, put it in its place.

    python -m gallery.ship

With it a machine without torch draws every checkpoint that can be attached. Run it when the base, its checkpoints or the
exporter changed; the bundle of before is removed. Other exports in the gallery's repository are left alone.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from personalq.bundle import Manifest, read_manifest
from personalq.repository import Repository
from personalq.repository.atomic import atomic_directory

from .record import BASE, REPOSITORY, readable

MADE_HERE = ("bundles", "specs", "families", "shared", "index", ".*")
BUNDLES = REPOSITORY / "bundles"


def shipped() -> list[tuple[Path, Manifest]]:
    """Every engine of the gallery's base in its repository."""
    found = [(file.parent, read_manifest(file.parent)) for file in BUNDLES.glob("*/unet.ort_wide.onnx")]
    return [(folder, manifest) for folder, manifest in found if manifest.checkpoint.id == BASE.name]


def main() -> None:
    """Calibrate and export in a copy of the repository, then replace what is shipped."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_base

    with tempfile.TemporaryDirectory(prefix="personalq-ship-") as scratch:
        root = Path(scratch) / "repository"
        shutil.copytree(REPOSITORY, root, ignore=shutil.ignore_patterns(*MADE_HERE))
        repository = Repository.open(root)
        spec = calibrate(repository, BASE.name, CalibrateOptions())
        place(export_base(repository, BASE.name, spec.spec_path).bundle)


def place(bundle: Path) -> None:
    """Put a bundle's files among those that are shipped, in place of the one before."""
    readable(bundle)
    for folder, _ in shipped():
        shutil.rmtree(folder)
    with atomic_directory(BUNDLES / bundle.name) as there:
        for file in bundle.iterdir():
            if file.is_file():
                shutil.copyfile(file, there / file.name)


if __name__ == "__main__":
    main()
