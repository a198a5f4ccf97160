"""Which tensors of a pickle's content are a checkpoint's, and under which names. Knows structures, not torch.

Trainers wrap their weights: Lightning in 'state_dict', A1111's embeddings in 'string_to_param', Custom Diffusion in 'unet'
and 'modifier_token'. Only these and their like are unwrapped; what else lies beside the weights is named, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RepositoryError

IsTensor = Callable[[object], bool]

TOKENS = "-tokens"  # ending of the second file of a Custom-Diffusion delta
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model", "params_ema", "params")
_A1111, _ANY_TOKEN = "string_to_param", "*"
_VECTORS = "emb_params"  # the same vectors in A1111's safetensors: the file's name is the token
_CUSTOM = ("unet", "modifier_token")
_MAX_TEXT, _MAX_NAME = 1000, 80


@dataclass(frozen=True)
class Unwrapped:
    """parts: ending of a file's name -> its tensors by name. metadata: text. left_out: 'name (type)' of what is neither."""

    parts: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def unwrapped(content: object, is_tensor: IsTensor) -> Unwrapped:
    """The tensors of a file's content by name. Raises RepositoryError, without the file, when their names are not known."""
    if not isinstance(content, Mapping):
        got = "one tensor without a name" if is_tensor(content) else _called(content)
        raise RepositoryError(f"must hold tensors by name, got {got}; only weights under names can be converted")
    if _A1111 in content:
        return _beside(content, _A1111, {"": _embedding(content[_A1111], is_tensor)})
    if set(_CUSTOM) <= content.keys() and all(_is_flat(content[part], is_tensor) for part in _CUSTOM):
        delta, tokens = (content[part] for part in _CUSTOM)
        return _beside(content, _CUSTOM, {"": dict(delta), **({TOKENS: dict(tokens)} if tokens else {})})
    wrapper = next((name for name in _WRAPPERS if _holds(content.get(name), is_tensor)), "")
    if wrapper and not any(map(is_tensor, content.values())):
        inner = unwrapped(content[wrapper], is_tensor)
        outer = _beside(content, wrapper, inner.parts)
        return Unwrapped(inner.parts, {**outer.metadata, **inner.metadata}, outer.left_out + inner.left_out)
    return _flat(content, is_tensor)


def _flat(content: Mapping[Any, Any], is_tensor: IsTensor) -> Unwrapped:
    tensors = {name: value for name, value in content.items() if is_tensor(value)}
    groups = [name for name, value in content.items() if _holds(value, is_tensor)]
    if odd := next((name for name in tensors if not isinstance(name, str)), None):
        raise RepositoryError(f"must hold tensors by name, got one named {_shown(odd)}; such weights are not known")
    if groups or not tensors:
        inside = f"tensors inside {', '.join(map(_shown, groups[:3]))}" if groups else "no tensor"
        raise RepositoryError(f"must hold tensors by name, got {inside}; such weights are not known")
    return _beside(content, tuple(tensors), {"": tensors})


def _embedding(params: object, is_tensor: IsTensor) -> dict[str, Any]:
    """A1111's and the first Textual Inversion's form: '*' -> vectors; a token that is named is kept."""
    vectors = vars(params).get("_parameters", params) if hasattr(params, "__dict__") else params
    if not _is_flat(vectors, is_tensor) or not vectors:
        raise RepositoryError(
            f"must hold vectors in {_A1111!r}, got {_called(vectors)}; such an embedding is not known"
        )
    assert isinstance(vectors, Mapping)
    return {_VECTORS if token == _ANY_TOKEN else token: vector for token, vector in vectors.items()}


def _beside(content: Mapping[Any, Any], used: str | tuple[str, ...], parts: Mapping[str, Any]) -> Unwrapped:
    """What lies beside the weights: plain values become text, everything else is named."""
    others = {
        name: value for name, value in content.items() if name not in ((used,) if isinstance(used, str) else used)
    }
    plain = {name: v for name, v in others.items() if isinstance(name, str) and isinstance(v, str | int | float)}
    rest = {name: value for name, value in others.items() if name not in plain and not _is_empty(value)}
    left_out = [f"{_shown(name)} ({_called(value)})" for name, value in rest.items()]
    return Unwrapped(parts, {name: str(value)[:_MAX_TEXT] for name, value in plain.items()}, tuple(left_out))


def _is_flat(value: object, is_tensor: IsTensor) -> bool:
    """Tell whether a value is a mapping from names to tensors and nothing else."""
    return isinstance(value, Mapping) and all(isinstance(n, str) and is_tensor(v) for n, v in value.items())


def _holds(value: object, is_tensor: IsTensor) -> bool:
    """Tell whether a value has tensors somewhere inside."""
    return any(is_tensor(one) for one in _inside(value))


def _inside(value: object) -> Iterator[object]:
    """Every value inside mappings, lists and tuples, each container once however they are nested."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping | list | tuple | set) and id(one) not in seen:
            seen.add(id(one))
            inner = list(one.values() if isinstance(one, Mapping) else one)
            waiting += inner
            yield from inner


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, Mapping | list | tuple | set) and not value)


def _shown(name: object) -> str:
    return repr(name)[:_MAX_NAME] if isinstance(name, str | int | float | tuple) else type(name).__name__


def _called(value: object) -> str:
    return (
        f"{type(value).__name__} of {len(value)}" if isinstance(value, Mapping | list | tuple) else type(value).__name__
    )
