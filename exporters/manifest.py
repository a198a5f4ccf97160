"""What a bundle's manifest says: of the checkpoint or base, its settings and its graphs. It writes nothing."""

import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from personalq.bundle import (
    AdapterInputs,
    BranchPlace,
    CheckpointEntry,
    Graphs,
    Latent,
    Manifest,
    Rows,
    Sizes,
    SpecEntry,
    Text,
)
from personalq.repository.settings import Settings
from personalq.spec import SpecFile
from personalq.weights.checkpoint import CheckpointWeights

from .external_data import Report
from .graphs.family import Family
from .graphs.lower_ort import Lowered

EXPORTER_VERSION = "8"
RANKS = (16, 64)  # of a base's TensorRT graphs: a plan has one rank, and adapters are padded with zeros to it
UNETS = {"ort": "unet.ort.onnx", "trt": "unet.trt.onnx"}
BASE_UNETS = {
    **UNETS,
    "ort_wide": "unet.ort_wide.onnx",
    **{f"trt_rank{rank}": f"unet.trt_rank{rank}.onnx" for rank in RANKS},
}

Places = dict[str, dict[str, BranchPlace]]  # graph -> layer -> where an adapter enters


@dataclass
class Job:
    """Everything one export needs. is_base: its graphs take adapters."""

    checkpoint: CheckpointEntry
    is_base: bool
    settings: Settings
    weights: CheckpointWeights
    family: Family
    spec_file: SpecFile
    parts: dict[str, str]
    key: str
    folder: Path
    progress: Report


def manifest_of(job: Job, lowered: Lowered, text: Text, places: Places) -> Manifest:
    """Everything a runtime needs to know, hashes left out. places: of a base."""
    spec = job.spec_file.spec
    adapters = AdapterInputs(branches=places, first_added_id=job.weights.first_added_id)
    return Manifest(
        kind="base" if job.is_base else "merged",
        key=job.key,
        key_parts=job.parts,
        checkpoint=job.checkpoint,
        family=job.family.key,
        exporter_version=EXPORTER_VERSION,
        spec=SpecEntry(
            name=spec.name, policy=spec.policy, bits=spec.bits, sha256=job.parts["spec"], storage=spec.storage
        ),
        graphs=Graphs(
            unet=BASE_UNETS if job.is_base else UNETS,
            text_rows="text_rows.onnx",
            text_encoder="text_encoder.onnx",
            text_encoder_2="text_encoder_2.onnx" if "text_encoder_2" in job.family.configs else "",
            vae_decoder="vae_decoder.onnx",
        ),
        rows=Rows(
            form="full" if spec.is_float else "split",
            width=sum(2 * layer.width for layer in spec.rows.layers),
            layers=spec.rows.layers,
            kept=spec.rows.kept,
            is_open=True,
        ),
        text=text,
        latent=latent_of(job.settings.configs),
        scheduler=job.settings.scheduler.settings,
        sources=dict(job.settings.sources),
        **job.settings.sampling(),
        sizes=unet_sizes(job, lowered),
        census=lowered.census,
        unquantised=lowered.unquantised,
        adapters=adapters if job.is_base else None,
        versions={name: version(name) for name in ("onnx-ir", "numpy")},
    )


def latent_of(configs: dict[str, dict[str, Any]]) -> Latent:
    """The latent space as the VAE and UNet configs describe it."""
    vae, unet = configs["vae"], configs["unet"]
    return Latent(
        channels=vae["latent_channels"],
        height=unet["sample_size"],
        width=unet["sample_size"],
        scale=2 ** (len(vae["block_out_channels"]) - 1),
        scaling_factor=vae.get("scaling_factor", 0.18215),
        shift_factor=vae.get("shift_factor") or 0.0,
    )


def unet_sizes(job: Job, lowered: Lowered) -> Sizes:
    """Bytes on disk of UNet and text-row encoder; unquantised ones = the family's graphs + every weight at 2 or 4 bytes."""
    written = ("unet.ort.onnx", "weights.data", "text_rows.onnx", "text_rows.data")
    unet = job.weights.component("unet")
    n_weights = sum(math.prod(unet.shape(name)) for name in unet.names())
    graphs = sum((job.family.folder / f"{name}.onnx").stat().st_size for name in ("unet", "text_rows"))
    return Sizes(
        unet=sum((job.folder / name).stat().st_size for name in written),
        unet_fp16=graphs + 2 * n_weights,
        unet_fp32=graphs + 4 * n_weights,
    )
