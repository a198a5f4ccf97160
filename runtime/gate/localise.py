"""When numbers fail: which layer moved first, and whose floats would bring them back."""

from collections.abc import Sequence

from .check import Check
from .subject import Subject
from .swap import bisect

Fell = Sequence[tuple[str, float, float]]
BLAMED = "layer that moved first"
LEAST_GAIN_DB = 1.0  # a layer whose floats give back less is one of many


def localise(subject: Subject, checks: Sequence[Check], fell: Fell, known: dict[str, str]) -> list[Check]:
    """One failed check that names the layer, when a check of the noise prediction or of what is inside it failed.

    fell: layers and blocks that lost SNR against the baseline, in the order they are computed. known: the baseline's
    decisions.
    """
    if not any(
        not check.passed and check.name.startswith(("unet", "blocks", "layers", "attention")) for check in checks
    ):
        return []
    culprit = bisect(subject)
    first = next((name for name, _, _ in fell if name in subject.spec_file.spec.layers), "")
    layer = first or (culprit.layer if culprit is not None and culprit.gain_db >= LEAST_GAIN_DB else "")
    if not layer:
        return []
    parts = [f"{layer}"]
    parts += [f"{before:.1f} -> {now:.1f} dB at its output" for name, before, now in fell if name == layer]
    decision = subject.spec_file.spec.layers[layer]
    now = f"{decision.weight}/{decision.activation}"
    if known.get(layer, now) != now:
        parts.append(f"spec: {known[layer]} -> {now}")
    if culprit is not None:
        whose = "its floats" if culprit.layer == layer else f"floats in {culprit.layer}"
        parts.append(f"{whose} give the noise prediction {culprit.gain_db:+.1f} dB")
    gain = culprit.gain_db if culprit is not None else 0.0
    return [Check(BLAMED, gain, LEAST_GAIN_DB, False, "; ".join(parts), "numerics", layer)]
