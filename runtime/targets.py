"""Where bundles can run: each target's package, and why a target cannot be served here. Imports no engine."""

from importlib.util import find_spec
from pathlib import Path

# Target -> the module its engine needs. TensorRT for RTX comes as a package of its own.
TARGETS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
FALLBACK = "onnxruntime"
NEEDS_PLAN = ("tensorrt", "tensorrt-rtx")  # built by an exporter; the others open a bundle as it is
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


def misfit(bundle: Path, target: str) -> str:
    """Why a bundle has no plan for this target that runs here; '' when it has one, or needs none."""
    if target not in NEEDS_PLAN:
        return ""
    from .engines.tensorrt import fits_here

    return fits_here(bundle, target)


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
