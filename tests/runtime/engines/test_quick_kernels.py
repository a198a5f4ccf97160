"""ONNX Runtime's quick int8 kernels are exact when weights lie within -64..64, and are used then; also without VNNI."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.bundle import read_manifest
from runtime.engines import sessions
from runtime.engines.ort import OrtEngine
from runtime.engines.sessions import has_narrow_weights, open_session
from tests.runtime.one_layer import write_layer

CHANNELS = 96


@pytest.mark.parametrize("shape", [(64, CHANNELS), (64, CHANNELS, 1, 1), (64, CHANNELS, 3, 3)], ids=str)
@pytest.mark.parametrize("kind", ["64", "-64", "either", "any"])
def test_the_largest_narrow_weights_give_exact_sums(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    random = np.random.default_rng(0)
    values = {
        "64": np.full(shape, 64),
        "-64": np.full(shape, -64),
        "either": random.choice([-64, 64], shape),
        "any": random.integers(-64, 65, shape),
    }
    scales, pads = (1 / 128, int(np.prod(shape[1:])) / 256), {"pads": [shape[-1] // 2] * 4} if len(shape) == 4 else {}
    file = write_layer(tmp_path / "layer.onnx", values[kind].astype(np.int8), 1 / 128, scales, **pads)
    exact, quick = (open_session(file, 1, may_saturate=may) for may in (True, False))
    place = (2, CHANNELS, 5, 6) if len(shape) == 4 else (2, 30, CHANNELS)
    for x in (np.full(place, 0.99), np.full(place, -1.0), random.choice([-1, 0.99], place)):
        one, other = (session.run(None, {"x": x.astype(np.float32)})[0] for session in (exact, quick))
        np.testing.assert_array_equal(one, other)
        assert np.abs(one).max() > 0


@pytest.mark.parametrize(
    ("kinds", "is_narrow"),
    [
        (["conv int4/int8", "linear float/float"], True),
        (["conv int6/int8", "linear int7/int8"], True),
        (["conv int7/int8", "linear int8/int8"], False),
        ([], False),
    ],
    ids=str,
)
def test_narrow_is_what_the_census_says(bundle: Path, kinds: list[str], is_narrow: bool) -> None:
    census = dict.fromkeys(kinds, 3)
    manifest = read_manifest(bundle).model_copy(update={"census": census | {"linear int8/float": 0}})
    assert has_narrow_weights(manifest) is is_narrow


@pytest.mark.parametrize(("is_narrow", "may_saturate"), [(True, False), (False, True)])
def test_an_engine_takes_quick_kernels_for_narrow_weights_only(
    copied: Path, monkeypatch: pytest.MonkeyPatch, is_narrow: bool, may_saturate: bool
) -> None:
    seen = []

    def spy(file: Path, *arguments: Any, **named: Any) -> Any:
        seen.append((file.name, named.get("may_saturate")))
        return open_session(file, *arguments, **named)

    monkeypatch.setattr(sessions, "open_session", spy)
    monkeypatch.setattr(sessions, "has_int8_dot_product", lambda: False)
    monkeypatch.setattr(sessions, "has_narrow_weights", lambda manifest: is_narrow)
    OrtEngine(copied, threads=1)
    unets = ("unet.ort.onnx", sessions.PREPARED)  # the second where another test opened the bundle before
    assert {told for file, told in seen if file in unets} == {may_saturate}
