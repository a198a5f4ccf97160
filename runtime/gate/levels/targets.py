"""The same bundle on two targets, output by output: another engine compared with ONNX Runtime."""

from collections.abc import Iterator

import numpy as np

from personalq.numerics import snr_db

from ...engines.engine import open_engine
from ..check import Check, at_least
from ..subject import Subject

# Outputs that are floats on every target; an engine may run them in bfloat16 (8 bits: some 40 dB an operation).
FLOAT_SNR_DB = 25.0


def cross_target(subject: Subject, target: str) -> Iterator[Check]:
    """SNR in dB of each output on `target` beside ONNX Runtime's. Raises EngineError for a target that is not here."""
    other, golden, mine = open_engine(target, subject.bundle, subject.threads), subject.golden, subject.engine
    slots = subject.manifest.rows.kept.slots
    index = np.zeros((len(golden["ids"]), slots), dtype=np.int64)
    outputs = {
        "text encoder": [
            engine.encode(*subject.pipeline.token_ids(subject.prompts), subject.attached).states
            for engine in (mine, other)
        ],
        "text rows": [
            engine.text_rows(golden["text_embeds"], index, subject.attached)["rows"] for engine in (mine, other)
        ],
        "vae": [engine.decode(golden["latent"]) for engine in (mine, other)],
    }
    for name, (reference, value) in outputs.items():
        yield at_least(f"{name}: {target} beside onnxruntime, SNR dB", snr_db(reference, value), FLOAT_SNR_DB)
    values = []
    for n, (sample, t) in enumerate(zip(golden["sample"], golden["timestep"], strict=True)):
        height, width = sample.shape[1:]
        denoiser = other.denoiser(subject.conditioning(n), height, width, subject.attached)
        theirs = np.array(denoiser(sample[None], float(t))[0], np.float32)
        values.append(snr_db(subject.noise_pred(subject.conditioning(n), n), theirs))
    # Rounding of another float order flips single integers; the limit is what the integers cost anyway.
    yield at_least(f"unet: {target} beside onnxruntime, worst SNR dB", min(values), subject.limits.snr_db)
