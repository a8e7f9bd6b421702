"""Maxout: units that take the largest of several linear maps; exact forms of ReLU and relatives."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.layers.initializers import initialize_

__all__ = [
    "MaxPieces",
    "Maxout",
    "maxout",
    "maxout_absolute",
    "maxout_leaky_relu",
    "maxout_relu",
]


def maxout(input: Tensor, pieces: int, dim: int = -1) -> Tensor:
    """Return the maximum over groups of ``pieces`` neighbors along a dimension.

    Args:
        input: Shape (..., units * pieces, ...).
        pieces: Number of linear pieces of a unit, at least 1.
        dim: The dimension that holds the pieces.

    Returns:
        Shape (..., units, ...). Where several pieces attain the maximum, autograd shares the
        gradient equally among them.

    Raises:
        ValueError: If the dimension is not a multiple of ``pieces``.

    Source:
        Goodfellow et al. 2013, Maxout networks, https://arxiv.org/abs/1302.4389
    """
    _check_pieces(pieces)
    size = input.shape[dim]
    if size % pieces:
        raise ValueError(f"dimension {dim} of size {size} is no multiple of pieces={pieces}")
    dim %= input.dim()
    return input.unflatten(dim, (size // pieces, pieces)).amax(dim + 1)


class MaxPieces(nn.Module):
    """:func:`maxout` over the last dimension as a module: (..., units * pieces) to (..., units)."""

    def __init__(self, pieces: int = 2):
        super().__init__()
        _check_pieces(pieces)
        self.pieces = pieces

    def forward(self, input: Tensor) -> Tensor:
        """Return the maximum over each unit's pieces."""
        return maxout(input, self.pieces)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"pieces={self.pieces}"


class Maxout(nn.Module):
    """A dense layer of maxout units, h_i = max_j (x . w_ij + b_ij).

    With one piece it is ``nn.Linear``. A unit is convex and piecewise linear; its gradient goes
    to the piece that is largest, so that it is never 0 for want of a slope.

    Args:
        in_features: Size of an input.
        out_features: Number of units.
        pieces: Linear pieces of a unit, at least 1.
        bias: Whether the pieces have a bias.
        initializer: A name of ``relubook.layers.initializers.initializer_names``. LeCun's normal draw keeps the
            second moment of the layer's output at two pieces.
        generator: Source of the randomness.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        weight: Shape (out_features * pieces, in_features); the pieces of a unit are neighbors.
        bias: Shape (out_features * pieces,), or None.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> Maxout(3, 4, pieces=2)(torch.ones(5, 3)).shape
        torch.Size([5, 4])

    Source:
        Goodfellow et al. 2013, Maxout networks, https://arxiv.org/abs/1302.4389
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int = 2,
        *,
        bias: bool = True,
        initializer: str = "lecun_normal",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_pieces(pieces)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        self.in_features, self.out_features, self.pieces = in_features, out_features, pieces
        rows = out_features * pieces
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
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


def maxout_relu(linear: nn.Linear) -> Maxout:
    """Return the maxout layer that equals ``relu(linear(x))``: the pieces are it and 0."""
    return _two_pieces(linear, 0.0)


def maxout_absolute(linear: nn.Linear) -> Maxout:
    """Return the maxout layer that equals ``|linear(x)|``: the pieces are it and its negative."""
    return _two_pieces(linear, -1.0)


def maxout_leaky_relu(linear: nn.Linear, negative_slope: float = 0.01) -> Maxout:
    """Return the maxout layer that equals the leaky rectifier of ``linear(x)``.

    Args:
        linear: The layer in front of the activation; its parameters are copied.
        negative_slope: At most 1, for otherwise the function is not convex and no maximum.

    Returns:
        A layer of two pieces, the linear map and ``negative_slope`` times it.

    Raises:
        ValueError: If ``negative_slope`` is above 1 or not finite.
    """
    if not (math.isfinite(negative_slope) and negative_slope <= 1):
        raise ValueError(f"negative_slope must be a finite number <= 1, not {negative_slope!r}")
    return _two_pieces(linear, negative_slope)


def _two_pieces(linear: nn.Linear, slope: float) -> Maxout:
    with torch.no_grad():
        layer = torch.nn.utils.skip_init(
            Maxout,
            linear.in_features,
            linear.out_features,
            2,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
            if theirs is not None:
                ours.copy_(torch.stack([theirs, slope * theirs], 1).flatten(0, 1))
    return layer


def _check_pieces(pieces: int) -> None:
    if pieces < 1:
        raise ValueError(f"pieces must be at least 1, not {pieces}")
