"""Where bundles can run: each target's package, and why a target cannot be served here. Imports no engine."""

from importlib.util import find_spec
from pathlib import Path

from personalq.adapters import ADAPTER
from personalq.bundle import read_manifest
from personalq.weights.adapter import DOWN
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

    return fits_here(bundle, target)


def is_wide(bundle: Path, adapter: Path) -> bool:
    """Whether an adapter changes layers for which a base has branches in its wide graph alone. Reads headers."""
    inputs = read_manifest(bundle).adapters
    places = {} if inputs is None else inputs.branches["unet"]
    names = (name.removeprefix("unet.").removesuffix(DOWN) for name in read_header(adapter / ADAPTER).entries)
    return any(name in places and places[name].is_wide for name in names)


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
