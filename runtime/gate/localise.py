"""When numbers fail: which layer moved first, and which layer in float would restore them."""

from collections.abc import Sequence

from .baseline import Moved
from .check import Check
from .subject import Subject
from .swap import bisect

BLAMED = "layer that moved first"
LEAST_GAIN_DB = 1.0  # a layer whose floats give back less is one of many


def localise(subject: Subject, checks: Sequence[Check], moved: Sequence[Moved], known: dict[str, str]) -> list[Check]:
    """One failed check that names the layer, when a check of the noise prediction or of what is inside it failed.

    moved: layers and blocks with another SNR than the baseline's, in the order they are computed. known: the
    baseline's decisions.
    """
    if not any(
        not check.passed and check.name.startswith(("unet", "blocks", "layers", "attention")) for check in checks
    ):
        return []
    culprit = bisect(subject, [other.layer for other in moved])
    layer = next((other.layer for other in moved if other.layer in subject.spec_file.spec.layers), "")
    if not layer and culprit is not None and culprit.gain_db >= LEAST_GAIN_DB:
        layer = culprit.layer
    if not layer:
        return []
    parts = [f"{layer}"]
    parts += [f"{x.before:.1f} -> {x.now:.1f} dB at its output" for x in moved if x.layer == layer]
    decision = subject.spec_file.spec.layers[layer]
    now = f"{decision.weight}/{decision.activation}"
    if known.get(layer, now) != now:
        parts.append(f"spec: {known[layer]} -> {now}")
    if culprit is not None and (culprit.layer == layer or culprit.gain_db >= LEAST_GAIN_DB):
        whose = "its floats" if culprit.layer == layer else f"floats in {culprit.layer}"
        parts.append(f"{whose} give the noise prediction {culprit.gain_db:+.1f} dB")
    gain = culprit.gain_db if culprit is not None else 0.0
    return [Check(BLAMED, gain, LEAST_GAIN_DB, False, "; ".join(parts), "numerics", layer)]
