"""What a bundle must reach, by the narrowest weights of its UNet, with the reason of each table."""

from dataclasses import dataclass

from personalq.bundle import Manifest


@dataclass(frozen=True)
class Limits:
    """What a bundle must reach. cosine and snr_db: noise prediction per time-step bin; *_psnr_db: whole pictures.

    block_*: the worst block or layer. attention_drift: of the trigger's share of attention, in the worst layer.
    """

    text_cosine: float
    rows_cosine: float
    kept_error: float
    kept_row_snr_db: float
    block_snr_db: float
    block_cosine: float
    attention_drift: float
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
LIMITS: dict[str, Limits] = {
    "float32": Limits(
        text_cosine=0.9999,
        rows_cosine=0.9999,
        kept_error=2**-10,
        kept_row_snr_db=60,
        block_snr_db=60,
        block_cosine=0.9999,
        attention_drift=0.001,
        cosine=0.9999,
        snr_db=40,
        vae_psnr_db=45,
        image_psnr_db=45,
        worst_image_psnr_db=35,
        image_ssim=0.99,
        reason="the same numbers, summed in another order; 45 dB is about one grey level",
    ),
    "float16": Limits(
        text_cosine=0.9999,
        rows_cosine=0.9999,
        kept_error=2**-8,
        kept_row_snr_db=50,
        block_snr_db=30,
        block_cosine=0.999,
        attention_drift=0.01,
        cosine=0.999,
        snr_db=30,
        vae_psnr_db=40,
        image_psnr_db=35,
        worst_image_psnr_db=25,
        image_ssim=0.95,
        reason="weights rounded to 11 bits, 2^-12 relative each, summed over layers and steps",
    ),
    "int8": Limits(
        text_cosine=0.9999,
        rows_cosine=0.999,
        kept_error=2**-8,
        kept_row_snr_db=50,
        block_snr_db=10,
        block_cosine=0.95,
        attention_drift=0.1,
        cosine=0.99,
        snr_db=15,
        vae_psnr_db=40,
        image_psnr_db=25,
        worst_image_psnr_db=15,
        image_ssim=0.8,
        reason="cosine 0.99 is 17 dB a step; under 25 dB people see the difference side by side",
    ),
    "int6": Limits(
        text_cosine=0.9999,
        rows_cosine=0.999,
        kept_error=2**-8,
        kept_row_snr_db=50,
        block_snr_db=6,
        block_cosine=0.9,
        attention_drift=0.2,
        cosine=0.97,
        snr_db=12,
        vae_psnr_db=40,
        image_psnr_db=20,
        worst_image_psnr_db=12,
        image_ssim=0.65,
        reason="two weight bits fewer than int8: between int8 and int4",
    ),
    "int4": Limits(
        text_cosine=0.9999,
        rows_cosine=0.999,
        kept_error=2**-8,
        kept_row_snr_db=50,
        block_snr_db=3,
        block_cosine=0.8,
        attention_drift=0.4,
        cosine=0.95,
        snr_db=9,
        vae_psnr_db=40,
        image_psnr_db=15,
        worst_image_psnr_db=8,
        image_ssim=0.5,
        reason="steps of 1/15 of the range: pictures keep their content, not their pixels",
    ),
}


def precision(manifest: Manifest) -> str:
    """The key of LIMITS: the narrowest weight that the bundle's layers have, or its float storage."""
    kinds = {key.split()[-1].split("/")[0] for key, count in manifest.census.items() if count}
    narrowest = next((kind for kind in ("int4", "int6", "int8") if kind in kinds), manifest.spec.storage)
    return narrowest if narrowest in LIMITS else "float32"
