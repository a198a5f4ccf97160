"""One module's tensors -> its edits: which algorithm they belong to, whether all are there, and whether they fit the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from ...errors import RepositoryError
from ..tensorfile import TensorFile
from .edits import ANOTHER_BASE, Added, Edit, LowRank, Scaled
from .lycoris import Butterfly, Generalised, Grown, Hadamard, Kronecker, Matrix, Tucker, Turned

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trained:
    """What a file has for one module. parts: what a tensor is -> its name; base: shape of the module's weight.

    scale_of: rank -> the factor of the change (alpha / rank, or as the file's configuration has it).
    """

    file: TensorFile
    where: str
    parts: Mapping[str, str]
    base: Shape
    scale_of: Callable[[int], float]

    def shape(self, part: str) -> Shape:
        return self.file.shape(self.parts[part])

    def number(self, part: str) -> float:
        """The value of a tensor of one element."""
        if prod(self.shape(part)) != 1:
            raise RepositoryError(
                f"{self.where}: {part} must be one number, got {list(self.shape(part))}; copy the file again"
            )
        return float(self.file.read(self.parts[part]).reshape(-1)[0])

    def scale(self, rank: int) -> float:
        return self.scale_of(rank) * (self.number("scalar") if "scalar" in self.parts else 1.0)

    def refusal(self, got: str) -> RepositoryError:
        return RepositoryError(f"{self.where}: must fit the base's {list(self.base)}, got {got}; {ANOTHER_BASE}")


@dataclass(frozen=True)
class Algorithm:
    """needs, may: the parts a module must have, and may have too. build: they -> the edit of the weight."""

    name: str
    needs: frozenset[str]
    may: frozenset[str]
    build: Callable[[Trained], Edit]


def edit_of(one: Trained) -> Edit:
    """The edit of a module's weight. Raises RepositoryError for parts that are missing, left over or of another shape."""
    algorithm = next((known for part, known in ALGORITHMS.items() if part in one.parts), None)
    parts = frozenset(one.parts)
    if algorithm is None or not algorithm.needs <= parts:
        names = "both LoRA halves" if algorithm in (None, LORA) else f"all parts of a {algorithm.name}"
        raise RepositoryError(f"{one.where}: must have {names}, got {', '.join(sorted(parts))}; copy the file again")
    if left := sorted(parts - algorithm.needs - algorithm.may):
        raise RepositoryError(
            f"{one.where}: every tensor must be a part of its {algorithm.name}, got {one.parts[left[0]]} besides; "
            "train or save it again"
        )
    return _scaled(one, algorithm.build(one))


def _scaled(one: Trained, merged: Edit) -> Edit:
    """The merged weight with its lengths, for a DoRA; without them as it is.

    peft has one length an output. `dora_scale` (LyCORIS) has (out, 1, ...), or (1, in, ...) when it was trained per input.
    """
    part = next((part for part in ("magnitude", "dora_scale") if part in one.parts), None)
    if part is None:
        return merged
    shape = one.shape(part)
    per_input = part == "dora_scale" and shape[:1] == (1,) and shape[1:2] == one.base[1:2] and one.base[0] != 1
    axis = 1 if per_input else 0
    if prod(shape) != one.base[axis]:
        raise RepositoryError(
            f"{one.where}: DoRA lengths must fit the base's {list(one.base)}, got {list(shape)}; {ANOTHER_BASE}"
        )
    return Scaled(merged, one.file, one.parts[part], axis)


def _plain(shape: Shape) -> Shape:
    """A 1x1 convolution's shape without its last two axes."""
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _lora(one: Trained) -> Edit:
    down, up = one.shape("down"), one.shape("up")
    if "mid" in one.parts:
        return _locon(one)
    is_matching = len(down) > 1 and len(up) > 1 and up[1] == down[0] and up[0] == one.base[0] and set(up[2:]) <= {1}
    if not is_matching or len(one.base) < 2 or _plain(down)[1:] != _plain(one.base)[1:]:
        raise one.refusal(f"up {list(up)} @ down {list(down)}")
    return LowRank(one.file, one.parts["down"], one.parts["up"], one.scale(down[0]))


def _locon(one: Trained) -> Edit:
    down, mid, up = (one.shape(part) for part in ("down", "mid", "up"))
    is_matching = len(down) > 1 and len(up) > 1 and mid[:2] == (up[1], down[0]) and {*up[2:], *down[2:]} <= {1}
    if not is_matching or (up[0], down[1], *mid[2:]) != one.base:
        raise one.refusal(f"up {list(up)}, mid {list(mid)}, down {list(down)}")
    return Tucker(one.file, one.parts["down"], one.parts["mid"], one.parts["up"], one.scale(down[0]))


def _loha(one: Trained) -> Edit:
    if ("hada_t1" in one.parts) != ("hada_t2" in one.parts):
        raise RepositoryError(f"{one.where}: must have hada_t1 and hada_t2, got one of them; copy the file again")
    first, second = (_matrix(one, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    for half in (first, second):
        if half.shape()[0] != one.base[0] or prod(half.shape()) != prod(one.base):
            raise one.refusal(f"a factor of {list(half.shape())}")
    return Hadamard(first, second, one.scale(first.inner() or 1))


def _lokr(one: Trained) -> Edit:
    """LoKr. The rank is that of the half that is factored; with none, LyCORIS takes no notice of alpha."""
    first, second = (_half(one, i) for i in (1, 2))
    a, b = first.shape(), second.shape()
    is_matching = len(a) == 2 and (a[0] * b[0], a[1] * prod(b[1:])) == (one.base[0], prod(one.base[1:]))
    if not is_matching or (len(b) > 2 and b[2:] != one.base[2:]):
        raise one.refusal(f"a Kronecker product of {list(a)} and {list(b)}")
    return Kronecker(first, second, one.scale(second.inner() or first.inner() or 0))


def _half(one: Trained, i: int) -> Matrix:
    whole, factors = f"lokr_w{i}", (f"lokr_w{i}_a", f"lokr_w{i}_b")
    has_factors = [part in one.parts for part in factors]
    if (whole in one.parts) == any(has_factors) or any(has_factors) != all(has_factors):
        got = ", ".join(sorted(one.parts))
        raise RepositoryError(f"{one.where}: must have {whole} or both its factors, got {got}; copy the file again")
    if whole in one.parts:
        matrix = Matrix(one.file, (one.parts[whole],))
        if not matrix.fits():
            raise one.refusal(f"{whole} {list(matrix.shape())}")
        return matrix
    return _matrix(one, *factors, f"lokr_t{i}")


def _matrix(one: Trained, a: str, b: str, core: str) -> Matrix:
    parts = (a, b, core) if core in one.parts else (a, b)
    matrix = Matrix(one.file, tuple(one.parts[part] for part in parts))
    if not matrix.fits():
        raise one.refusal(", ".join(f"{part} {list(one.shape(part))}" for part in parts))
    return matrix


def _glora(one: Trained) -> Edit:
    """GLoRA; LyCORIS before 2.0 called a1 a2 and b1 b2 the other way round."""
    old = ("a2", "a1", "b2", "b1")
    for order in (("a1", "a2", "b1", "b2"), old):
        a1, a2, b1, b2 = (_plain(one.shape(part)) for part in order)
        if all(len(shape) > 1 for shape in (a1, a2, b1, b2)) and (a1[1], b1[1]) == (a2[0], b2[0]):
            outputs, inputs = one.base[0], one.base[1:2]
            is_low = len(a1) == len(a2) == len(b1) == 2 and a1[:1] == a2[1:] == inputs
            if is_low and b1[0] == outputs and b2[1:] == _plain(one.base)[1:]:
                left, right, up, down = (one.parts[part] for part in order)
                return Generalised(one.file, left, right, up, down, one.scale(a2[0]))
    raise one.refusal(", ".join(f"{part} {list(one.shape(part))}" for part in reversed(old)))


def _ia3(one: Trained) -> Edit:
    axis = 1 if one.number("on_input") else 0
    if len(one.base) <= axis or prod(one.shape("weight")) != one.base[axis]:
        raise one.refusal(f"factors of {list(one.shape('weight'))} on its {'inputs' if axis else 'outputs'}")
    return Grown(one.file, one.parts["weight"], axis)


def _full(one: Trained) -> Edit:
    part = next(part for part in ("diff", "w_norm") if part in one.parts)
    if _plain(one.shape(part)) != _plain(one.base):
        raise one.refusal(f"{part} {list(one.shape(part))}")
    return Added(one.file, one.parts[part])


def _oft(one: Trained) -> Edit:
    """OFT and BOFT. `alpha` limits the rotation: |Q| <= alpha * outputs (0: no limit). `oft_diag` is LyCORIS 2.0's, R itself."""
    part = next(part for part in ("oft_blocks", "oft_diag") if part in one.parts)
    shape, outputs = one.shape(part), one.base[0]
    rescale = one.parts.get("rescale")
    is_matching = len(shape) in (3, 4) and shape[-1] == shape[-2] and shape[-3] * shape[-1] == outputs
    if len(shape) == 4:
        widest = 2 ** (shape[0] - 1) * shape[-1] if 0 < shape[0] <= 32 else 0
        is_matching &= part == "oft_blocks" and shape[-1] % 2 == 0 and widest > 0 and outputs % widest == 0
    if not is_matching or (rescale and prod(one.file.shape(rescale)) != outputs):
        raise one.refusal(f"{part} {list(shape)}")
    limit = one.number("alpha") * outputs if "alpha" in one.parts and part == "oft_blocks" else 0.0
    if len(shape) == 4:
        return Butterfly(one.file, one.parts[part], rescale, limit)
    return Turned(one.file, one.parts[part], rescale, limit, part == "oft_diag")


_LENGTHS = frozenset({"magnitude", "dora_scale"})
_FACTOR = frozenset({"alpha", "scalar"})
_BIAS = frozenset({"diff_b"})
LORA = Algorithm("LoRA", frozenset({"down", "up"}), _LENGTHS | _FACTOR | _BIAS | {"mid", "bias"}, _lora)
_LOHA = Algorithm(
    "LoHa",
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    _LENGTHS | _FACTOR | {"hada_t1", "hada_t2"},
    _loha,
)
_LOKR = Algorithm(
    "LoKr",
    frozenset(),
    _LENGTHS | _FACTOR | {*(f"lokr_w{i}{end}" for i in (1, 2) for end in ("", "_a", "_b")), "lokr_t2"},
    _lokr,
)
_GLORA = Algorithm("GLoRA", frozenset({"a1", "a2", "b1", "b2"}), _FACTOR, _glora)
_OFT = Algorithm("OFT", frozenset(), frozenset({"oft_blocks", "rescale", "alpha"}), _oft)
_OLD_OFT = Algorithm("OFT", frozenset({"oft_diag"}), frozenset({"alpha"}), _oft)
# By the part that tells them.
ALGORITHMS: dict[str, Algorithm] = {
    "down": LORA,
    "up": LORA,
    **{f"hada_w{i}_{side}": _LOHA for i in (1, 2) for side in "ab"},
    **{f"lokr_w{i}{end}": _LOKR for i in (1, 2) for end in ("", "_a", "_b")},
    "a1": _GLORA,
    "b1": _GLORA,
    "on_input": Algorithm("(IA)^3", frozenset({"on_input", "weight"}), frozenset(), _ia3),
    "diff": Algorithm("full difference", frozenset({"diff"}), _BIAS, _full),
    "w_norm": Algorithm("norm", frozenset({"w_norm"}), frozenset({"b_norm"}), _full),
    "oft_blocks": _OFT,
    "oft_diag": _OLD_OFT,
}
