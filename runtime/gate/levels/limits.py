"""What a bundle must reach, by the narrowest weights of its UNet, with the reason of each table."""

from dataclasses import dataclass

from personalq.bundle import Manifest


@dataclass(frozen=True)
class Limits:
    """What a bundle must reach. cosine and snr_db: noise prediction per time-step bin; *_psnr_db: whole pictures.

    block_*: the worst block or layer. attention_drift: of the trigger's share of attention, in the worst layer. branch_stray:
    how far from 1 the factor may be that an adapter's branch lacks at its layer.
    """

    text_cosine: float
    rows_cosine: float
    kept_error: float
    kept_row_snr_db: float
    block_snr_db: float
    block_cosine: float
    attention_drift: float
    branch_stray: float
    cosine: float
    snr_db: float
    vae_psnr_db: float
    image_psnr_db: float
    worst_image_psnr_db: float
    image_ssim: float
    reason: str


# Text rows that are not kept, by the bits that the narrowest layer stores them in: one scale per token, layer and K|V.
REST_ROW_SNR_DB = {8: 30.0, 6: 18.0, 4: 6.0}

# By the narrowest weights of the UNet. Text encoder, rows and VAE decoder are stored in float16 at worst.
PRECISIONS = ("float32", "float16", "int8", "int7", "int6", "int4")
TABLE: dict[str, tuple[float, ...]] = {
    "text_cosine": (0.9999, 0.9999, 0.9999, 0.9999, 0.9999, 0.9999),
    "rows_cosine": (0.9999, 0.9999, 0.999, 0.999, 0.999, 0.999),
    "kept_error": (2**-10, 2**-8, 2**-8, 2**-8, 2**-8, 2**-8),
    "kept_row_snr_db": (60, 50, 50, 50, 50, 50),
    "block_snr_db": (60, 30, 10, 8, 6, 3),
    "block_cosine": (0.9999, 0.999, 0.95, 0.93, 0.9, 0.8),
    "attention_drift": (0.001, 0.01, 0.1, 0.15, 0.2, 0.4),
    "branch_stray": (0.05, 0.1, 0.3, 0.3, 0.35, 0.4),
    "cosine": (0.9999, 0.999, 0.99, 0.98, 0.97, 0.95),
    "snr_db": (40, 30, 15, 14, 12, 9),
    "vae_psnr_db": (45, 40, 40, 40, 40, 40),
    "image_psnr_db": (45, 35, 25, 23, 20, 15),
    "worst_image_psnr_db": (35, 25, 15, 14, 12, 8),
    "image_ssim": (0.99, 0.95, 0.8, 0.75, 0.65, 0.5),
}
REASONS = {
    "float32": "the same numbers, summed in another order; 45 dB is about one grey level",
    "float16": "weights rounded to 11 bits, 2^-12 relative each, summed over layers and steps",
    "int8": "cosine 0.99 is 17 dB a step; under 25 dB people see the difference side by side",
    "int7": "one weight bit fewer than int8: between int8 and int6",
    "int6": "two weight bits fewer than int8: between int8 and int4",
    "int4": "steps of 1/15 of the range: pictures keep their content, not their pixels",
}
LIMITS = {
    kind: Limits(reason=REASONS[kind], **{name: values[i] for name, values in TABLE.items()})
    for i, kind in enumerate(PRECISIONS)
}


def precision(manifest: Manifest) -> str:
    """The key of LIMITS: the narrowest weight that the bundle's layers have, or its float storage."""
    narrowest = next((kind for kind in reversed(PRECISIONS) if kind in manifest.weight_kinds), manifest.spec.storage)
    return narrowest if narrowest in LIMITS else "float32"
