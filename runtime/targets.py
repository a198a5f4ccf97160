"""Where bundles can run: each target's package, and why a target cannot be served here. Imports no engine."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from personalq.adapters import ADAPTER, read_adapter_manifest
from personalq.bundle import DOWN, read_manifest
from personalq.weights.adapter import CORRECTION
from personalq.weights.header import read_header

# Target -> the module its engine needs. TensorRT for RTX comes as a package of its own.
TARGETS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
FALLBACK = "onnxruntime"
NEEDS_PLAN = ("tensorrt", "tensorrt-rtx")  # built by an exporter; the others open a bundle as it is
NARROW = ("openvino", *NEEDS_PLAN)  # no convolution of theirs takes its weights as an input
TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
}
# Module -> the extra that installs it.
_EXTRAS = {"onnxruntime": "cpu", "openvino": "openvino", "tensorrt": "tensorrt"}


def missing(target: str) -> str:
    """Why no engine of this target can run here, and what to do; '' when one can."""
    return not_installed(TARGETS[target])


def misfit(bundle: Path, target: str, adapter: Path | None = None) -> str:
    """Why a bundle, with an adapter beside it, cannot run on this target here; '' when it can."""
    is_here = (
        adapter is not None and (adapter / ADAPTER).is_file()
    )  # one that is still in a store says it when it is opened
    if adapter is not None and is_here and target in NARROW and is_wide(bundle, adapter):
        return f"{TITLES[target]} takes adapters of attention layers alone, and this one changes others too"
    if target not in NEEDS_PLAN:
        return ""
    from .engines.tensorrt import fits_here

    return fits_here(bundle, target, max(ranks(bundle, adapter).values(), default=0) if adapter and is_here else 0)


def is_wide(bundle: Path, adapter: Path) -> bool:
    """Whether an adapter changes layers for which a base has branches in its wide graph alone. Reads headers."""
    inputs = read_manifest(bundle).adapters
    return inputs is not None and any(inputs.branches["unet"][layer].is_wide for layer in ranks(bundle, adapter))


def ranks(bundle: Path, adapter: Path) -> dict[str, int]:
    """layer of a base's UNet -> the rank of what an adapter puts there, with its correction if it is of this engine's spec."""
    base, correction = read_manifest(bundle), read_adapter_manifest(adapter).correction
    places = {} if base.adapters is None else base.adapters.branches["unet"]
    is_corrected = correction is not None and correction.spec_sha256 == base.spec.sha256
    parts = ("unet", CORRECTION) if is_corrected else ("unet",)
    found: Counter[str] = Counter()
    for name, shape in read_header(adapter / ADAPTER).shapes.items():
        component, _, layer = name.removesuffix(DOWN).partition(".")
        if name.endswith(DOWN) and component in parts and layer in places:
            found[layer] += shape[1] if places[layer].op == "linear" else shape[0]
    return dict(found)


def not_installed(module: str) -> str:
    """Why a module cannot be imported, and how to install it; '' when it is there."""
    try:
        found = find_spec(module) is not None
    except ValueError:  # it is in sys.modules without a spec: taken away, or a stand-in
        found = False
    if found:
        return ""
    extra = _EXTRAS.get(module)
    how = f"run: pip install 'personalq[{extra}]'" if extra else f"install NVIDIA's {module} package"
    return f"{module} is not installed; {how}"
