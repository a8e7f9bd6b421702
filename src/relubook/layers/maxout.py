"""Maxout: units that take the largest of several linear maps; exact forms of ReLU and relatives."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.layers.initializers import initialize_

__all__ = ["MaxPieces", "Maxout", "maxout", "maxout_leaky_relu"]


def maxout(input: Tensor, pieces: int, dim: int = -1) -> Tensor:
    """Return the maximum over groups of neighbors: (..., units * pieces, ...) to (..., units, ...).

    Where several pieces attain the maximum, autograd shares the gradient equally among them.
    ValueError if the dimension is not a multiple of ``pieces``.
    """
    _check_at_least_one(pieces=pieces)
    if input.shape[dim] % pieces:
        words = f"dimension {dim} of size {input.shape[dim]}"
        raise ValueError(f"{words} is no multiple of pieces={pieces}")
    dim %= input.dim()
    return input.unflatten(dim, (-1, pieces)).amax(dim + 1)


class MaxPieces(nn.Module):
    """:func:`maxout` over the last dimension as a module: (..., units * pieces) to (..., units)."""

    def __init__(self, pieces: int = 2):
        super().__init__()
        _check_at_least_one(pieces=pieces)
        self.pieces = pieces

    def forward(self, input: Tensor) -> Tensor:
        """Return the maximum over each unit's pieces."""
        return maxout(input, self.pieces)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"pieces={self.pieces}"


class Maxout(nn.Module):
    """A dense layer of maxout units, h_i = max_j (x . w_ij + b_ij): (..., in) to (..., out).

    With one piece it is ``nn.Linear``. A unit is convex and piecewise linear; its gradient goes
    to the piece that is largest, so that it is never 0 for want of a slope. The weight has shape
    (out_features * pieces, in_features): the pieces of a unit are neighbors.

    Args:
        in_features, out_features, pieces: Size of an input, number of units and of their pieces,
            each at least 1; ValueError otherwise.
        bias, device, dtype: As for ``nn.Linear``.
        initializer: What ``relubook.layers.initializers.initializer`` takes. LeCun's normal draw
            keeps the second moment of the layer's output at two pieces.
        generator: Source of the randomness.

    Source: Goodfellow et al. 2013, Maxout networks, https://arxiv.org/abs/1302.4389
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int = 2,
        *,
        bias: bool = True,
        initializer: str | Callable[..., Any] = "lecun_normal",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_at_least_one(in_features=in_features, out_features=out_features, pieces=pieces)
        self.in_features, self.out_features, self.pieces = in_features, out_features, pieces
        rows = out_features * pieces
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        initialize_(initializer, self.weight, self.bias, generator=generator)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return maxout(F.linear(input, self.weight, self.bias), self.pieces)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pieces={self.pieces}, bias={self.bias is not None}"
        )


def maxout_leaky_relu(linear: nn.Linear, negative_slope: float = 0.01) -> Maxout:
    """Return the maxout layer that equals the leaky rectifier of ``linear(x)``.

    Its two pieces are copies of the linear map and of ``negative_slope`` times it; 0 gives ReLU,
    -1 the absolute value. ValueError if the slope is above 1 (not convex) or not finite.
    """
    if not (math.isfinite(negative_slope) and negative_slope <= 1):
        raise ValueError(f"negative_slope must be a finite number <= 1, not {negative_slope!r}")
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    layer = nn.utils.skip_init(Maxout, *sizes, pieces=2, bias=bias, **like)
    with torch.no_grad():
        for ours, theirs in zip(layer.parameters(), linear.parameters(), strict=True):
            ours.copy_(torch.stack([theirs, negative_slope * theirs], 1).flatten(0, 1))
    return layer


def _check_at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
