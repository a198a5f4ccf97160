"""Record cross-attention: how much attention each text row gets, and where in the picture the trigger gets it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.pipeline import cross_attention

# (layer index, probabilities (B, heads, N, 77)) -> None
Note = Callable[[int, Tensor], None]


class WatchedAttention:
    """Attention processor equivalent to the layer's own, with the softmax computed explicitly so that it can be read."""

    def __init__(self, index: int, note: Note):
        self.index, self.note = index, note

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """hidden_states (B, N, C), encoder_hidden_states (B, 77, C_text) -> (B, N, C)."""
        parts = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        query, key, value = (_heads(x, attn.heads) for x in parts)
        probabilities = (query @ key.transpose(-1, -2) * attn.scale).softmax(dim=-1)
        self.note(self.index, probabilities)
        attended = (probabilities @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def watching_attention(unet: nn.Module, note: Note) -> Iterator[None]:
    """Every cross-attention layer reports its probabilities to `note` inside the block; processors are put back after it."""
    layers = cross_attention(unet)
    before = [attention.processor for _, attention in layers]
    for index, (_, attention) in enumerate(layers):
        attention.set_processor(WatchedAttention(index, note))
    try:
        yield
    finally:
        for (_, attention), processor in zip(layers, before, strict=True):
            attention.set_processor(processor)


class TriggerMap:
    """Where the trigger is attended to: mean probability of the trigger's columns per latent pixel, over all layers."""

    def __init__(self, side: int):
        self.side = side
        self.total: Tensor | None = None

    def add(self, probabilities: Tensor, columns: list[list[int]]) -> None:
        """probabilities (B, heads, N, 77); columns: the trigger's positions of each batch row ([] = none)."""
        batch, _, n_pixels, _ = probabilities.shape
        rows = [
            p.mean(0)[:, c].sum(-1) if c else p.new_zeros(n_pixels) for p, c in zip(probabilities, columns, strict=True)
        ]
        size = int(n_pixels**0.5)
        grid = torch.stack(rows).view(batch, 1, size, size)
        wide = nn.functional.interpolate(grid, size=(self.side, self.side), mode="bilinear", align_corners=False)
        self.total = wide if self.total is None else self.total + wide

    def take(self) -> Tensor:
        """(B, 1, h, w) weights (1 + relative attention) / 2, mean 1 per row (all ones where no trigger is); starts over.

        Blended with 1: an error beside the subject still reaches it through the next step's self-attention.
        """
        assert self.total is not None, "no attention was watched"
        mean = self.total.mean(dim=(2, 3), keepdim=True)
        weights = torch.where(mean > 0, 0.5 + 0.5 * self.total / mean.clamp(min=1e-12), torch.ones_like(self.total))
        self.total = None
        return weights
