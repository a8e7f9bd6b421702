"""Maxout: units that take the largest of several linear maps; exact forms of ReLU and relatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.layers.initializers import initialize_

__all__ = ["MaxPieces", "Maxout", "MaxoutConv2d", "as_maxout", "maxout"]


def maxout(input: Tensor, pieces: int, dim: int = -1) -> Tensor:
    """Return the maximum over groups of neighbors: (..., units * pieces, ...) to (..., units, ...).

    Where several pieces attain the maximum, autograd shares the gradient equally among them. Max
    pooling is the same operation over neighbors in space instead of features.
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
    (out_features * pieces, in_features): the pieces of a unit are neighbors. The paper bounds the
    norm of each piece's weights, without autograd: ``layer.weight.renorm_(2, 0, 1.9365)``.

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


class MaxoutConv2d(nn.Module):
    """Maxout over channels of a convolution: (..., in, height, width) to (..., out, ., .).

    Each output channel is the maximum, place by place, of ``pieces`` filters that are neighbors in
    ``convolution``, an ``nn.Conv2d`` of out_channels * pieces channels.

    Args:
        in_channels, out_channels, pieces: Channels of an image, maxout channels and pieces of each,
            all at least 1; ValueError otherwise.
        kernel_size: As for ``nn.Conv2d``.
        initializer, generator: As for :class:`Maxout`, with its source.
        **options: What else ``nn.Conv2d`` takes, such as ``padding="same"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        pieces: int = 2,
        *,
        initializer: str | Callable[..., Any] = "lecun_normal",
        generator: torch.Generator | None = None,
        **options: Any,
    ):
        super().__init__()
        _check_at_least_one(in_channels=in_channels, out_channels=out_channels, pieces=pieces)
        self.pieces, sizes = pieces, (in_channels, out_channels * pieces, kernel_size)
        self.convolution = nn.utils.skip_init(nn.Conv2d, *sizes, **options)
        initialize_(
            initializer, self.convolution.weight, self.convolution.bias, generator=generator
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map images (..., in_channels, height, width) to (..., out_channels, ., .)."""
        return maxout(self.convolution(input), self.pieces, dim=-3)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"pieces={self.pieces}"


def as_maxout(
    layer: nn.Linear | nn.Conv2d, negative_slope: float | Tensor = 0.0
) -> "Maxout | MaxoutConv2d":
    """Return the layer of two-piece maxout units that equals a layer and a rectifier behind it.

    One piece is a copy of the layer, the other of ``negative_slope`` times it: 0 gives ReLU, 0.01
    leaky ReLU, -1 the absolute value, and the ``weight`` of an ``nn.PReLU`` that one.

    Args:
        layer: The linear map or convolution, which stays as it is; TypeError for another.
        negative_slope: One slope, or one a unit, (1,) or (units,); ValueError if one is above 1
            (such a function is not convex, so no maximum) or not finite.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise TypeError(f"layer must be nn.Linear or nn.Conv2d, not {type(layer).__name__}")
    units, weight = len(layer.weight), layer.weight
    slopes = torch.as_tensor(negative_slope, dtype=weight.dtype, device=weight.device).detach()
    if not (slopes.isfinite() & (slopes <= 1)).all():
        raise ValueError(f"negative_slope must be finite numbers <= 1, not {negative_slope!r}")
    if slopes.numel() not in (1, units) or slopes.dim() > 1:
        shape = tuple(slopes.shape)
        raise ValueError(f"negative_slope must be one number or one a unit ({units}), not {shape}")
    made: Maxout | MaxoutConv2d
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    like |= {"bias": layer.bias is not None, "initializer": nn.init.zeros_}
    if isinstance(layer, nn.Linear):
        made = target = Maxout(layer.in_features, units, **like)
    else:
        kept = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        like |= {name: getattr(layer, name) for name in kept}
        made = MaxoutConv2d(layer.in_channels, units, **like)
        target = made.convolution
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), layer.parameters(), strict=True):
            by_unit = slopes.expand(units).view(-1, *[1] * (theirs.dim() - 1))
            ours.copy_(torch.stack([theirs, by_unit * theirs], 1).flatten(0, 1))
    return made


def _check_at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
