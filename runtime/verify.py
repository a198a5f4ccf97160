"""Does a bundle compute what its checkpoint computes? Checks against goldens that torch and diffusers wrote in FP32.

It judges one bundle by its own files; it needs neither torch nor the checkpoint. Never raises: what cannot be computed
is a failed check with its reason.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.bundle import Manifest, check_files, inside, read_manifest
from personalq.errors import BundleError, PersonalQError
from personalq.numerics import cosine, psnr_db, snr_db

from .engine import Conditioning, OrtEngine, one_line, open_session, unet_file
from .pipeline import Pipeline, PromptRows

GOLDEN = "golden.safetensors"
GOLDEN_TENSORS = (
    *("ids", "text_embeds", "rows", "sample", "timestep", "prompt", "noise_pred"),
    *("latent", "decoded", "image_prompt", "start_noise", "images"),
)
TIME_BINS = ((750, 1001, "750-999"), (500, 750, "500-749"), (250, 500, "250-499"), (0, 250, "0-249"))

CONV_KERNELS = ("QLinearConv", "ConvInteger")
LINEAR_KERNELS = (
    *("MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulNBits"),
    *("QGemm", "QAttention"),
)
FLOAT_CONV_KERNELS = ("Conv", "FusedConv", "NhwcFusedConv")
FLOAT_LINEAR_KERNELS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")

_LARGEST_DB = 200.0  # stands for "equal": JSON has no infinity


@dataclass(frozen=True)
class Limits:
    """What a bundle must reach. cosine and snr_db: noise prediction per time-step bin; *_psnr_db: whole pictures."""

    text_cosine: float
    rows_cosine: float
    kept_error: float
    cosine: float
    snr_db: float
    vae_psnr_db: float
    image_psnr_db: float
    worst_image_psnr_db: float
    reason: str


# By the narrowest weights of the UNet. Text encoder, rows and VAE decoder are stored in float16 at worst.
LIMITS: dict[str, Limits] = {
    "float32": Limits(
        text_cosine=0.9999,
        rows_cosine=0.9999,
        kept_error=2**-10,
        cosine=0.9999,
        snr_db=40,
        vae_psnr_db=45,
        image_psnr_db=45,
        worst_image_psnr_db=35,
        reason="the same numbers, summed in another order; 45 dB is about one grey level",
    ),
    "float16": Limits(
        text_cosine=0.9999,
        rows_cosine=0.9999,
        kept_error=2**-8,
        cosine=0.999,
        snr_db=30,
        vae_psnr_db=40,
        image_psnr_db=35,
        worst_image_psnr_db=25,
        reason="weights rounded to 11 bits, 2^-12 relative each, summed over layers and steps",
    ),
    "int8": Limits(
        text_cosine=0.9999,
        rows_cosine=0.999,
        kept_error=2**-8,
        cosine=0.99,
        snr_db=15,
        vae_psnr_db=40,
        image_psnr_db=25,
        worst_image_psnr_db=15,
        reason="cosine 0.99 is 17 dB a step; under 25 dB people see the difference side by side",
    ),
    "int6": Limits(
        text_cosine=0.9999,
        rows_cosine=0.999,
        kept_error=2**-8,
        cosine=0.97,
        snr_db=12,
        vae_psnr_db=40,
        image_psnr_db=20,
        worst_image_psnr_db=12,
        reason="two weight bits fewer than int8: between int8 and int4",
    ),
    "int4": Limits(
        text_cosine=0.9999,
        rows_cosine=0.999,
        kept_error=2**-8,
        cosine=0.95,
        snr_db=9,
        vae_psnr_db=40,
        image_psnr_db=15,
        worst_image_psnr_db=8,
        reason="steps of 1/15 of the range: pictures keep their content, not their pixels",
    ),
}


@dataclass(frozen=True)
class Check:
    """One number and its limit. `reason`: why it failed when there is no number."""

    name: str
    value: float
    limit: float
    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Every check of one bundle; passed when all of them did."""

    bundle: Path
    checks: tuple[Check, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        checks = []
        for check in self.checks:
            row = {"name": check.name, "value": check.value, "limit": check.limit, "passed": check.passed}
            checks.append({**row, "reason": check.reason} if check.reason else row)
        return {"passed": self.passed, "checks": checks}


def verify_bundle(bundle: Path, threads: int | None = None) -> Report:
    """Check a bundle against its own goldens: files, every graph, kept rows, pictures and the kernels that ran."""
    try:
        manifest = read_manifest(bundle)
        problems = check_files(bundle, manifest)
    except (PersonalQError, OSError) as error:
        return Report(bundle, (_failed("files intact", one_line(error)),))
    intact = Check("files intact", len(problems), 0, not problems, problems[0] if problems else "")
    if problems:
        return Report(bundle, (intact,))
    try:
        subject = Subject(bundle, manifest, threads)
    except Exception as error:  # the boundary: a bundle that cannot be opened is a failed check, whatever the cause
        return Report(bundle, (intact, _failed("bundle opens", _reason(error))))
    checks = [intact]
    for name, compute in CHECKS:
        try:
            checks += list(compute(subject))
        except Exception as error:  # the boundary: a check that cannot be computed has failed
            checks.append(_failed(name, _reason(error)))
    return Report(bundle, tuple(checks))


class Subject:
    """What the checks look at: the bundle's goldens, its engine and pipeline, and rows computed once."""

    def __init__(self, bundle: Path, manifest: Manifest, threads: int | None) -> None:
        self.bundle, self.manifest, self.threads = bundle, manifest, threads
        self.golden, metadata = read_golden(bundle)
        self.prompts: list[str] = json.loads(metadata.get("prompts", "[]"))
        self.steps = int(metadata.get("steps", manifest.steps))
        self.guidance = float(metadata.get("guidance", manifest.guidance))
        self.limits = LIMITS[precision(manifest)]
        self.engine = OrtEngine(bundle, threads)
        self.pipeline = Pipeline(self.engine)

    @cached_property
    def rows(self) -> list[PromptRows]:
        """Rows of each golden prompt from its golden embeddings, so that the text encoder's error stays out."""
        ids, embeds = self.golden["ids"], self.golden["text_embeds"]
        return [self.pipeline.rows_of_ids(ids[i], text_embeds=embeds[i : i + 1]) for i in range(len(ids))]

    def noise_pred(self, conditioning: Conditioning, n: int) -> npt.NDArray[np.float32]:
        """(4,h,w): the UNet on golden input n."""
        sample = self.golden["sample"][n : n + 1]
        denoiser = self.engine.denoiser(conditioning, *sample.shape[2:])
        return np.array(denoiser(sample, float(self.golden["timestep"][n]))[0], dtype=np.float32)


def read_golden(bundle: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of golden.safetensors. Raises BundleError when it is missing or lacks one."""
    from safetensors import safe_open

    file = inside(bundle, GOLDEN)
    if not file.is_file():
        raise BundleError(f"{GOLDEN}: must be in the bundle, got no file; export the checkpoint again")
    with safe_open(str(file), framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        metadata = dict(opened.metadata() or {})
    missing = [name for name in GOLDEN_TENSORS if name not in tensors]
    if missing:
        raise BundleError(f"{GOLDEN}: must hold {', '.join(missing)}, got nothing of that name; export again")
    return tensors, metadata


def precision(manifest: Manifest) -> str:
    """The key of LIMITS: the narrowest weight that the bundle's layers have, or its float storage."""
    kinds = {key.split()[-1].split("/")[0] for key, count in manifest.census.items() if count}
    narrowest = next((kind for kind in ("int4", "int6", "int8") if kind in kinds), manifest.spec.storage)
    return narrowest if narrowest in LIMITS else "float32"


def _text_encoder(subject: Subject) -> Iterator[Check]:
    golden = subject.golden
    ids = np.stack([subject.pipeline.tokenizer.encode(prompt).ids for prompt in subject.prompts])
    yield _at_most("token ids that differ", int((ids != golden["ids"]).sum()), 0)
    embeds = subject.engine.encode(golden["ids"])
    worst = min(cosine(golden["text_embeds"][i], embeds[i]) for i in range(len(embeds)))
    yield _at_least("text encoder cosine", worst, subject.limits.text_cosine)


def _rows(subject: Subject) -> Iterator[Check]:
    golden, slots = subject.golden, subject.manifest.rows.kept.slots
    index = np.zeros((1, slots), dtype=np.int64)
    worst = 1.0
    for i, embeds in enumerate(golden["text_embeds"]):
        rows = subject.engine.text_rows(embeds[None], index)["rows"][0]
        worst = min(worst, cosine(golden["rows"][i], rows))
    yield _at_least("text rows cosine", worst, subject.limits.rows_cosine)


def _kept_rows(subject: Subject) -> Iterator[Check]:
    """Kept rows pass no quantiser: they are the graph's own rows rounded to FP16, and close to the goldens."""
    if subject.manifest.rows.form != "split":
        return
    changed, worst = 0, 0.0
    for i, prompt in enumerate(subject.rows):
        index = np.zeros((1, subject.manifest.rows.kept.slots), dtype=np.int64)
        rows = subject.engine.text_rows(subject.golden["text_embeds"][i : i + 1], index)["rows"][0]
        for slot, position in enumerate(prompt.kept):
            kept, golden = prompt.conditioning["kept"][0, slot], subject.golden["rows"][i, position]
            changed += int((kept != rows[position].astype(np.float16)).sum())
            error = np.abs(kept.astype(np.float64) - golden).max() / max(float(np.abs(golden).max()), 1e-12)
            worst = max(worst, float(error))
    yield _at_most("kept rows: values that are not FP16 roundings", changed, 0)
    yield _at_most("kept rows: largest error / largest value", worst, subject.limits.kept_error)


def _kept_rows_matter(subject: Subject) -> Iterator[Check]:
    """Changing only a used slot changes the prediction; changing only an unused one does not."""
    slots = subject.manifest.rows.kept.slots
    used = [i for i, prompt in enumerate(subject.rows) if prompt.kept]
    if used:
        count = sum(_changes_prediction(subject, i, 0) for i in used)
        yield _at_least("kept rows: prompts whose prediction they change", count, len(used))
    spare = [i for i, prompt in enumerate(subject.rows) if len(prompt.kept) < slots]
    if spare and subject.manifest.rows.form == "split":
        count = sum(_changes_prediction(subject, i, slots - 1) for i in spare)
        yield _at_most("kept rows: unused slots that change the prediction", count, 0)


def _changes_prediction(subject: Subject, prompt: int, slot: int) -> bool:
    conditioning = dict(subject.rows[prompt].conditioning)
    before = subject.noise_pred(conditioning, 0)
    kept = conditioning["kept"].copy()
    kept[:, slot] = 1 - 2 * kept[:, slot]
    conditioning["kept"] = kept
    return not np.array_equal(before, subject.noise_pred(conditioning, 0))


def _unet(subject: Subject) -> Iterator[Check]:
    golden, limits = subject.golden, subject.limits
    predicted = [subject.noise_pred(subject.rows[int(p)].conditioning, n) for n, p in enumerate(golden["prompt"])]
    for low, high, name in TIME_BINS:
        chosen = [n for n, t in enumerate(golden["timestep"]) if low <= t < high]
        if not chosen:
            continue
        reference, value = golden["noise_pred"][chosen], np.stack([predicted[n] for n in chosen])
        yield _at_least(f"unet cosine, t {name}", cosine(reference, value), limits.cosine)
        yield _at_least(f"unet SNR dB, t {name}", snr_db(reference, value), limits.snr_db)


def _decoder(subject: Subject) -> Iterator[Check]:
    decoded = subject.engine.decode(subject.golden["latent"])
    yield _at_least("vae PSNR dB", psnr_db(subject.golden["decoded"], decoded, peak=2.0), subject.limits.vae_psnr_db)


def _images(subject: Subject) -> Iterator[Check]:
    """Pictures drawn from the goldens' start noise beside those that diffusers drew."""
    golden, values = subject.golden, []
    for prompt, noise, reference in zip(golden["image_prompt"], golden["start_noise"], golden["images"], strict=True):
        image = subject.pipeline.image(
            subject.prompts[int(prompt)], steps=subject.steps, guidance=subject.guidance, noise=noise
        )
        values.append(min(psnr_db(reference, image, peak=255), _LARGEST_DB))
    yield _at_least("image PSNR dB, mean", float(np.mean(values)), subject.limits.image_psnr_db)
    yield _at_least("image PSNR dB, worst", min(values), subject.limits.worst_image_psnr_db)


def _kernels(subject: Subject) -> Iterator[Check]:
    """Every layer that the manifest calls quantised ran as an integer kernel, and no other ran as a float one."""
    ran = kernels_that_run(subject)
    census = subject.manifest.census
    convs = _count(census, "conv", lambda weight, activation: activation != "float" and weight != "float")
    linears = _count(census, "linear", lambda weight, _: weight != "float")
    attentions = 2 * len(subject.manifest.rows.layers)  # a block attends to itself and to the text
    float_convs = _count(census, "conv") - convs
    float_linears = _count(census, "linear") - linears + 2 * attentions  # Q.K^T and .V of each
    yield _equal("conv layers on integer kernels", sum(ran[kind] for kind in CONV_KERNELS), convs)
    yield _equal("linear layers on integer kernels", sum(ran[kind] for kind in LINEAR_KERNELS), linears)
    yield _at_most("float conv kernels", sum(ran[kind] for kind in FLOAT_CONV_KERNELS), float_convs)
    yield _at_most("float matmul kernels", sum(ran[kind] for kind in FLOAT_LINEAR_KERNELS), float_linears)


CHECKS: tuple[tuple[str, Callable[[Subject], Iterator[Check]]], ...] = (
    ("text encoder", _text_encoder),
    ("text rows", _rows),
    ("kept rows", _kept_rows),
    ("kept rows matter", _kept_rows_matter),
    ("unet", _unet),
    ("vae decoder", _decoder),
    ("images", _images),
    ("kernels", _kernels),
)


def kernels_that_run(subject: Subject) -> Counter[str]:
    """How many nodes of each kind ran in one step of the UNet, from ONNX Runtime's own profile."""
    file = inside(subject.bundle, unet_file(subject.manifest))
    prompt = subject.rows[int(subject.golden["prompt"][0])]
    feed = {"sample": subject.golden["sample"][:1], "timestep": subject.golden["timestep"][:1]}
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(file, subject.threads, profile=Path(folder) / "profile")
        session.run(None, {**feed, **prompt.conditioning})
        events = json.loads(Path(session.end_profiling()).read_text())
    names = {
        (event["name"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return Counter(kind for _, kind in names)


def _count(census: dict[str, int], op: str, wanted: Callable[[str, str], bool] = lambda *_: True) -> int:
    """Layers of `op` in a census ('conv int8/int8': 40) whose (weight, activation) is wanted."""
    total = 0
    for key, count in census.items():
        kind, _, types = key.partition(" ")
        weight, _, activation = types.partition("/")
        total += count if kind == op and wanted(weight, activation) else 0
    return total


def _at_least(name: str, value: float, limit: float) -> Check:
    return Check(name, min(float(value), _LARGEST_DB), float(limit), bool(value >= limit))


def _at_most(name: str, value: float, limit: float) -> Check:
    return Check(name, float(value), float(limit), bool(value <= limit))


def _equal(name: str, value: int, limit: int) -> Check:
    return Check(name, value, limit, value == limit)


def _failed(name: str, reason: str) -> Check:
    return Check(name, 0, 0, False, reason)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return text if isinstance(error, PersonalQError) else f"{type(error).__name__}: {text}"
