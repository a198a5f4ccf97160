"""Level (d): whole pictures from the same start noise as the FP32 pipeline's, and what a judge says of both.

The goldens hold a few pictures that diffusers drew; where the repository has the checkpoint's unquantised bundle, more
pairs are drawn with it. A judge's limits are two-sided: scoring better than FP32 is as much a change as scoring worse.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personalq.numerics import psnr_db
from personalq.prompts import literal

from ...drawing.pipeline import Pipeline, start_noise
from ...engines.ort import OrtEngine
from ..check import Check, Pictures, at_least
from ..interval import interval
from ..subject import Subject

Images = npt.NDArray[np.uint8]
Noises = npt.NDArray[np.float32]
LARGEST_PICTURE_DB = 60.0  # stands for "equal" in means: a sixteenth of a grey level
JUDGE_TOLERANCE = 0.02  # of the reference's score, either way; MLPerf's limits for FID (facts: CLIP +-0.2 %, FID +-2 %)
WINDOW = 7  # pixels, SSIM (Wang et al. 2004), uniform as in scikit-image's default


@dataclass(frozen=True)
class Pairs:
    """N pictures of each side and the prompt of each pair."""

    reference: Images
    drawn: Images
    prompts: list[str]


def images(subject: Subject, extra: int) -> tuple[list[Check], Pictures]:
    """Checks over the golden pairs and, with an unquantised bundle, `extra` more; the pictures for the reports."""
    golden = _golden_pairs(subject)
    more = _drawn_pairs(subject, extra) if extra and subject.sources.reference else None
    pairs = golden if more is None else _joined(golden, more)
    checks = list(_fidelity(subject, pairs))
    if subject.sources.judge is not None:
        checks += _judged(subject, pairs)
    return checks, Pictures(pairs.reference, pairs.drawn, tuple(pairs.prompts))


def _golden_pairs(subject: Subject) -> Pairs:
    golden = subject.golden
    prompts = [subject.prompts[int(p)] for p in golden["image_prompt"]]
    return Pairs(golden["images"], _draw(subject, subject.pipeline, prompts, golden["start_noise"]), prompts)


def _drawn_pairs(subject: Subject, extra: int) -> Pairs:
    """Golden prompts with noise the goldens do not have, drawn by the unquantised bundle and by this one."""
    assert subject.sources.reference is not None
    asked = [prompt for prompt in subject.prompts if prompt]
    prompts = [asked[i % len(asked)] for i in range(extra)]
    noises = np.stack([start_noise(100 + i, subject.golden["start_noise"].shape[1:]) for i in range(extra)])
    if extra not in subject.references:
        other = Pipeline(OrtEngine(subject.sources.reference, subject.threads), subject.chosen)
        subject.references[extra] = _draw(subject, other, prompts, noises)
    drawn = _draw(subject, subject.pipeline, prompts, subject.move(noises))
    return Pairs(subject.references[extra], drawn, prompts)


def _draw(subject: Subject, pipeline: Pipeline, prompts: list[str], noises: Noises) -> Images:
    settings = {"steps": subject.steps, "guidance": subject.guidance, "sampler": subject.sampler}
    return np.stack([pipeline.image(literal(p), noise=x, **settings) for p, x in zip(prompts, noises, strict=True)])


def _joined(a: Pairs, b: Pairs) -> Pairs:
    reference, drawn = (np.concatenate(pair) for pair in ((a.reference, b.reference), (a.drawn, b.drawn)))
    return Pairs(reference, drawn, a.prompts + b.prompts)


def _fidelity(subject: Subject, pairs: Pairs) -> Iterator[Check]:
    both = list(zip(pairs.reference, pairs.drawn, strict=True))
    psnr = [min(psnr_db(reference, image, peak=255), LARGEST_PICTURE_DB) for reference, image in both]
    similar = [ssim(reference, image) for reference, image in both]
    subject.measured |= {"image PSNR dB": psnr, "image SSIM": similar}
    limits = subject.limits
    yield at_least("image PSNR dB, mean", float(np.mean(psnr)), limits.image_psnr_db, interval=interval(psnr))
    yield at_least("image PSNR dB, worst", min(psnr), limits.worst_image_psnr_db)
    yield at_least("image SSIM, mean", float(np.mean(similar)), limits.image_ssim, interval=interval(similar))


def _judged(subject: Subject, pairs: Pairs) -> Iterator[Check]:
    """Paired difference of every score with FP32's; fails only when its whole interval lies beyond the tolerance."""
    assert subject.sources.judge is not None
    before, after = (subject.sources.judge(images, pairs.prompts) for images in (pairs.reference, pairs.drawn))
    for name, scores in before.items():
        difference = np.asarray(after[name], np.float64) - np.asarray(scores, np.float64)
        subject.measured[f"judge {name}"] = [float(value) for value in after[name]]
        tolerance = JUDGE_TOLERANCE * max(float(np.mean(np.abs(scores))), 1e-6)
        low, high = interval(difference.tolist())
        passed = low <= tolerance and high >= -tolerance
        way = "" if passed else f"{'better' if low > 0 else 'worse'} than FP32 by {abs(difference.mean()):.3f}"
        mean = float(difference.mean())
        yield Check(f"judge {name}, beside FP32", mean, tolerance, passed, way, interval=(low, high))


def ssim(a: Images, b: Images) -> float:
    """Structural similarity of two uint8 pictures (H,W,3), mean over channels; windows of 7x7, sample covariance."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    n = WINDOW * WINDOW
    mean_x, mean_y = _windows(x), _windows(y)
    unbiased = n / (n - 1)
    var_x, var_y = (unbiased * (_windows(v * v) - m * m) for v, m in ((x, mean_x), (y, mean_y)))
    cov = unbiased * (_windows(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _windows(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means of every whole window of (H,W,3)."""
    view = np.lib.stride_tricks.sliding_window_view(x, (WINDOW, WINDOW), axis=(0, 1))
    return np.asarray(view.mean(axis=(-2, -1)))
