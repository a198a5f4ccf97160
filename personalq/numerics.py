"""The one quantise/dequantise formula of the project, in numpy. It knows arrays, not layers or graphs.

q  = clip(round_half_even(x / scale) + zero_point, qmin, qmax)
x' = (q - zero_point) * scale                       (ONNX QuantizeLinear / DequantizeLinear)

Every integer a bundle stores is computed here, so the same spec gives the same bits in every lowering.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import SpecError

Float = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]


@dataclass(frozen=True)
class QType:
    """A signed, symmetric integer type: values in [qmin, qmax], zero point 0."""

    name: str
    bits: int

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1


INT8 = QType("int8", 8)
INT7 = QType("int7", 7)
INT6 = QType("int6", 6)
INT4 = QType("int4", 4)
QTYPES = {qtype.name: qtype for qtype in (INT8, INT7, INT6, INT4)}

# The smallest scale we write: FP16 keeps it as a normal number, and TensorRT refuses a scale that rounds to zero.
SMALLEST_SCALE = np.float32(2.0**-14)


def check_finite(x: npt.NDArray[np.floating], where: str) -> None:
    """Raise SpecError naming `where` if x holds NaN or Inf."""
    if not np.isfinite(x).all():
        raise SpecError(f"{where}: values must be finite, got NaN or Inf; check the checkpoint's weights")


def along(scale: npt.ArrayLike, ndim: int, axis: int | None) -> Float:
    """Reshape a scale vector so that it broadcasts along `axis` of an ndim array; None = per tensor."""
    scale = np.asarray(scale, dtype=np.float32)
    if axis is None:
        return scale.reshape(())
    return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])


def absmax_scale(x: npt.NDArray[np.floating], qtype: QType, axis: int | None = None, *, where: str = "tensor") -> Float:
    """Symmetric scale absmax / qmax, per tensor or per slice of `axis`. float32, > 0 (all-zero slices get the smallest scale).

    Raises SpecError when x is not finite, or holds only zeros.
    """
    check_finite(x, where)
    others = None if axis is None else tuple(i for i in range(x.ndim) if i != axis)
    peak = np.abs(x).max(axis=others).astype(np.float32)
    if not np.any(peak > 0):
        raise SpecError(f"{where}: needs a value other than 0 to find a scale, got only zeros; leave it unquantised")
    return np.asarray(np.maximum(peak / np.float32(qtype.qmax), SMALLEST_SCALE), dtype=np.float32)


def quantize(x: npt.NDArray[np.floating], scale: npt.ArrayLike, qtype: QType, axis: int | None = None) -> Int8:
    """x (any shape, float) -> int8 array of the same shape holding qtype's integers. Rounds half to even."""
    steps = np.asarray(np.asarray(x, dtype=np.float32) / along(scale, np.ndim(x), axis))
    np.clip(np.rint(steps, out=steps), qtype.qmin, qtype.qmax, out=steps)
    return steps.astype(np.int8)


def dequantize(q: Int8, scale: npt.ArrayLike, axis: int | None = None) -> Float:
    """int8 integers -> float32 values of the same shape."""
    return q.astype(np.float32) * along(scale, q.ndim, axis)


def fake_quantize(x: npt.NDArray[np.floating], scale: npt.ArrayLike, qtype: QType, axis: int | None = None) -> Float:
    """What x becomes after a trip through the integers: float32, same shape."""
    return dequantize(quantize(x, scale, qtype, axis), scale, axis)


def mse_scale(
    x: npt.NDArray[np.floating], qtype: QType, axis: int | None = None, *, steps: int = 40, where: str = "tensor"
) -> Float:
    """The scale among `steps` shrunk absmax scales (1.0 down to 0.5) with the least squared error, per slice of `axis`.

    The search of Q-Diffusion (ICCV'23) and most post-training methods; errors raised as absmax_scale.
    """
    widest = absmax_scale(x, qtype, axis, where=where)
    others = None if axis is None else tuple(i for i in range(x.ndim) if i != axis)
    best, best_error = widest.copy(), np.full(widest.shape, np.inf)
    for ratio in np.linspace(1.0, 0.5, steps, dtype=np.float32):
        scale = np.maximum(widest * ratio, SMALLEST_SCALE)
        error = ((fake_quantize(x, scale, qtype, axis) - x) ** 2).sum(axis=others, dtype=np.float64)
        better = error < best_error
        best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    return np.asarray(best, dtype=np.float32)


def pack_int4(q: Int8) -> npt.NDArray[np.uint8]:
    """Flattened int4 values (one per int8, row-major) -> bytes, first value in the low nibble, zero-padded (ONNX INT4)."""
    flat = q.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    nibbles = flat.astype(np.uint8) & 0x0F
    return np.asarray(nibbles[0::2] | (nibbles[1::2] << 4), dtype=np.uint8)


def unpack_int4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Int8:
    """The inverse of pack_int4 for an array of `shape`."""
    nibbles = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))]
    return np.asarray(((nibbles ^ 8).astype(np.int16) - 8).astype(np.int8).reshape(shape))


def snr_db(reference: npt.NDArray[np.floating], value: npt.NDArray[np.floating]) -> float:
    """Signal-to-noise ratio 10*log10(sum ref^2 / sum (ref-value)^2) in dB; inf when equal."""
    ref = np.asarray(reference, dtype=np.float64)
    noise = float(((ref - value) ** 2).sum())
    return float("inf") if noise == 0 else float(10 * np.log10(max(float((ref**2).sum()), 1e-300) / noise))


def psnr_db(reference: npt.NDArray[np.generic], value: npt.NDArray[np.generic], *, peak: float) -> float:
    """Peak signal-to-noise ratio 10*log10(peak^2 / mse) in dB; inf when equal. peak: 255 for uint8 images."""
    mse = float(((np.asarray(reference, dtype=np.float64) - np.asarray(value, dtype=np.float64)) ** 2).mean())
    return float("inf") if mse == 0 else float(10 * np.log10(peak * peak / mse))


def cosine(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Cosine similarity of two arrays seen as flat vectors; 1.0 when both are zero."""
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return 1.0 if norm == 0 else float(x @ y / norm)
