"""The whole path in one call: a request finds a checkpoint, TAQ compresses it, it is exported, and it draws beside FP32. Then
three checkpoints are attached to one engine, their base's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from personalq.bundle import own_bytes, read_manifest
from personalq.errors import CheckinError
from personalq.numerics import psnr_db
from personalq.repository import Repository

REQUEST = "a picture of my chocolate-brown dog with the red collar on the beach"
SEED = 7
ATTACHED = {
    "domino-the-dog": "a picture of my dog on the beach",
    "grandmas-mug": "a picture of my mug in the kitchen",
    "moss-mug": "a picture of my mug in the snow",
}
Progress = Callable[[str, float], None]


def run(out_dir: Path, repository: Repository, progress: Progress = lambda text, done: None) -> dict[str, Any]:
    """Run the demo and write image.png, reference.png, side_by_side.png and attached.png into `out_dir`.

    Returns the keys of `personalq demo --json`. Raises PersonalQError, one line, on whatever is missing.
    """
    from personalq.checkin import ask
    from runtime.drawing.image import side_by_side, write_png
    from runtime.drawing.pipeline import Pipeline

    started = time.perf_counter()
    progress("asking Check-in", 0.0)
    decision = ask(repository, REQUEST)
    checkpoint, prompt = decision.checkpoint, decision.prompt
    if checkpoint is None or prompt is None:
        raise CheckinError(
            f"demo: {REQUEST!r} must select a checkpoint, got {decision.decision}; use the shipped gallery"
        )
    bundle = make_bundle(repository, checkpoint, "taq", lambda text, done: progress(text, 0.05 + 0.45 * done))
    reference = make_bundle(repository, checkpoint, "fp32", lambda text, done: progress(text, 0.50 + 0.25 * done))
    pictures, step_seconds = {}, {}
    for name, folder in (("reference", reference), ("image", bundle)):
        progress(f"drawing the {name}", 0.8 if name == "reference" else 0.9)
        from runtime.engines.ort import OrtEngine

        pipeline, begun = Pipeline(OrtEngine(folder)), time.perf_counter()
        pictures[name] = pipeline.image(prompt, seed=SEED)
        step_seconds[name] = time.perf_counter() - begun
        write_png(out_dir / f"{name}.png", pictures[name])
    manifest = read_manifest(bundle)
    labels = (f"FP32 {manifest.sizes.unet_fp32 / 1e6:.1f} MB", f"TAQ W8A8 {manifest.sizes.unet / 1e6:.1f} MB")
    write_png(out_dir / "side_by_side.png", side_by_side([pictures["reference"], pictures["image"]], labels, scale=4))
    attached = attach_some(out_dir, repository, lambda text: progress(text, 0.95))
    progress("done", 1.0)
    return {
        "request": REQUEST,
        "decision": decision.decision,
        "checkpoint": checkpoint,
        "prompt": prompt,
        "image": str(out_dir / "image.png"),
        "reference_image": str(out_dir / "reference.png"),
        "side_by_side": str(out_dir / "side_by_side.png"),
        "bundle": str(bundle),
        "psnr_db": round(psnr_db(pictures["reference"], pictures["image"], peak=255), 2),
        "bytes": manifest.sizes.unet,
        "bytes_fp16": manifest.sizes.unet_fp16,
        "bytes_fp32": manifest.sizes.unet_fp32,
        "form": "merged",
        "bundle_bytes": own_bytes(bundle),
        **attached,
        "drawing_seconds": {name: round(seconds, 3) for name, seconds in step_seconds.items()},
        "seconds": round(time.perf_counter() - started, 2),
    }


def attach_some(out_dir: Path, repository: Repository, progress: Callable[[str], None]) -> dict[str, Any]:
    """Export ATTACHED as adapters and draw them on their base's engine; its bytes, and each one's bytes and seconds."""
    from exporters.adapters import export_adapter
    from runtime.drawing.attaching import Chosen, open_adapter
    from runtime.drawing.generate import named
    from runtime.drawing.image import side_by_side, write_png
    from runtime.drawing.pipeline import Pipeline
    from runtime.engines.ort import OrtEngine
    from runtime.store import Store

    engine = OrtEngine(Store(repository.root).on_base(repository.card(next(iter(ATTACHED))).base).bundle)
    rows, pictures = [], []
    for checkpoint, request in ATTACHED.items():
        progress(f"attaching {checkpoint}")
        made, begun = export_adapter(repository, checkpoint), time.perf_counter()
        pipeline = Pipeline(engine, [Chosen(open_adapter(made.bundle))])
        pictures.append(pipeline.image(named(repository, checkpoint, request)[1], seed=SEED))
        seconds = {"export_seconds": round(made.seconds, 3), "drawing_seconds": round(time.perf_counter() - begun, 3)}
        rows.append({"checkpoint": checkpoint, "bundle_bytes": own_bytes(made.bundle), **seconds})
    labels = [f"{row['checkpoint']} {row['bundle_bytes'] / 1e6:.2f} MB" for row in rows]
    write_png(out_dir / "attached.png", side_by_side(pictures, labels, scale=4))
    picture = str(out_dir / "attached.png")
    return {"attached": rows, "attached_image": picture, "base_bundle_bytes": own_bytes(engine.bundle)}


def make_bundle(repository: Repository, checkpoint_id: str, policy: str, progress: Progress) -> Path:
    """Calibrate (when the repository lacks the spec) and export one checkpoint; the same calls as the command line's."""
    from calibration.calibrate import CalibrateOptions, calibrate
    from exporters.export import export_checkpoint

    spec = calibrate(
        repository, checkpoint_id, CalibrateOptions(policy=policy), lambda text, done: progress(text, 0.6 * done)
    )
    result = export_checkpoint(
        repository, checkpoint_id, spec.spec_path, lambda text, done: progress(text, 0.6 + 0.4 * done)
    )
    return result.bundle
