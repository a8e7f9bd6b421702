"""Prove by interval bounds that a unit is silent on every input of a box.

A data set can only show that a unit was silent so far; a unit whose bound on the pre-activation is
not positive cannot fire anywhere in the box:

>>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).requires_grad_(False)
>>> _ = model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]]))
>>> _ = model[0].bias.copy_(torch.tensor([-3.0, -1.0, -2.5]))
>>> certify_dead(model, low=-1.0, high=1.0)["1"].certified.tolist()
[True, False, True]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relubook.units._listing import SiteListing, plain_table
from relubook.units.readers import is_plain
from relubook.units.sites import unwrapped

__all__ = ["Certificate", "CertifiedSite", "certify_dead"]


def _kinds(*names: str) -> tuple[Any, ...]:
    """The classes for one, two and three dimensions."""
    return tuple(getattr(nn, f"{name}{dims}d") for name in names for dims in (1, 2, 3))


_LINEAR = (nn.Linear, *_kinds("Conv"))
_BATCH_NORMS = _kinds("BatchNorm")
_DROPOUTS = (nn.Dropout, nn.AlphaDropout, *_kinds("Dropout"))
_RESHAPING = (nn.Flatten, nn.Unflatten)
_AVERAGES = _kinds("AvgPool", "AdaptiveAvgPool")
# What comes last, but the averages, returns one of its inputs or a constant.
_SUPPORTED = (
    *(nn.Sequential, *_LINEAR, *_BATCH_NORMS, *_AVERAGES, *_RESHAPING, *_DROPOUTS, nn.Identity),
    *(nn.ReLU, nn.Hardtanh, nn.ReLU6, *_kinds("MaxPool", "AdaptiveMaxPool")),
)


@dataclass(frozen=True)
class CertifiedSite:
    """One rectifier, by its qualified name, and its kind, its class in lower case.

    ``upper``, float64, ``(units,)``, bounds its pre-activations over box and positions.
    """

    name: str
    kind: str
    upper: Tensor

    @property
    def certified(self) -> Tensor:
        """Bool, ``(units,)``: which units are silent on every input of the box."""
        return self.upper <= 0


@dataclass(frozen=True)
class Certificate(SiteListing[CertifiedSite]):
    """The rectifiers that can be silent, in execution order; its text is a table."""

    sites: tuple[CertifiedSite, ...]

    @property
    def total(self) -> int:
        """Number of certified units."""
        return sum(int(site.certified.sum()) for site in self.sites)

    def __repr__(self) -> str:
        rows = [("site", "kind", "units", "certified dead", "smallest upper bound")]
        for site in self.sites:
            counts = f"{len(site.upper)}", f"{int(site.certified.sum())}"
            rows.append((site.name, site.kind, *counts, f"{float(site.upper.min()):.3g}"))
        units = sum(len(site.upper) for site in self.sites)
        title = f"Certificate: {self.total} of {units} units are silent on the whole box"
        return "\n".join([title, *plain_table(rows, words=2)])


def certify_dead(model: nn.Module, low: float | Tensor, high: float | Tensor) -> Certificate:
    """Find the units that are silent on every input x with low <= x <= high.

    Every layer's values are bounded by intervals: exact for the first linear layer, sound but loose
    behind it, since how units depend on each other is ignored. They hold for what the model itself
    computes: they are evaluated in float64 and widened by the a-priori error of a sum of n products
    in any order, n u / (1 - n u) times the sum of the absolute products (Higham, Accuracy and
    Stability of Numerical Algorithms, chapter 3), for the u of the coarsest parameters, 2^-24 in
    float32. Not covered: transformed convolutions (Winograd, FFT), TF32, autocast, lower precision.

    Args:
        model: An ``nn.Sequential`` (nested ones too) or one layer. Up to the last rectifier it may
            hold linear layers, convolutions, batch norm with running statistics, ReLU, ReLU6,
            Hardtanh, max and average pooling, dropout and reshaping; behind it anything.
        low, high: Corners: numbers or tensors that together have the shape of one input without
            the batch; two numbers do where the first layer is linear.

    Raises TypeError if a layer is not supported, or the box holds no numbers; ValueError if the box
    is empty, not finite or of another shape, no rectifier can be silent, or a layer trains where
    that matters, has hooks, is not finite, or may overflow.
    """
    model = unwrapped(model)
    total = sum(_can_be_silent(m) for _, m in model.named_modules(remove_duplicate=False))
    if not total:
        raise ValueError("there is no rectifier that can be silent: ReLU, ReLU6, Hardtanh from 0")
    kinds = [torch.finfo(p.dtype) for p in model.parameters()] or [torch.finfo(torch.float32)]
    arithmetic = _Arithmetic(
        u=max(kind.eps for kind in kinds) / 2,
        largest=min(kind.max for kind in kinds),
        tiny=max(kind.tiny for kind in kinds),
    )
    box = arithmetic.widen(_box(next(_flat(model))[1], low, high), 1)
    sites: list[CertifiedSite] = []
    dim = -1
    for name, layer in _flat(model):
        kind = type(layer).__name__
        if _can_be_silent(layer):
            upper = box.high.movedim(dim, 0).flatten(1).amax(1)
            sites.append(CertifiedSite(name, kind.lower(), upper))
            if len(sites) == total:
                break
        if isinstance(layer, (*_LINEAR, *_BATCH_NORMS, *_RESHAPING)):
            dim = -1 if isinstance(layer, (nn.Linear, *_RESHAPING)) else 1
        try:
            with torch.no_grad():
                box = arithmetic.apply(layer, box)
        except (RuntimeError, ValueError) as error:
            shape = tuple(box.low.shape[1:])
            raise ValueError(
                f"layer {name!r} ({kind}) has no bounds on an input of the shape {shape}: {error}"
            ) from error
    return Certificate(tuple(sites))


def _flat(layer: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and layers in the order of execution, each checked in turn, without containers."""
    if not is_plain(layer, _SUPPORTED):
        names = ", ".join(sorted(kind.__name__ for kind in _SUPPORTED))
        raise TypeError(f"layer {name!r} is a {type(layer).__name__}; supported are {names}")
    training = layer.training and isinstance(layer, (*_BATCH_NORMS, *_DROPOUTS))
    for is_wrong, why in (
        (layer._forward_hooks or layer._forward_pre_hooks, "has forward hooks"),
        (training, "normalizes by its batch, or drops values at random: call eval()"),
        (getattr(layer, "running_mean", 0) is None, "has no running statistics"),
    ):
        if is_wrong:
            raise ValueError(f"layer {name!r} ({layer}) {why}")
    if isinstance(layer, nn.Sequential):
        for key, child in layer._modules.items():  # an activation may stand in several places
            yield from _flat(child, f"{name}.{key}".lstrip("."))
        return
    for kind, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{kind!r} of layer {name!r} is not finite")
    yield name, layer


def _can_be_silent(layer: Any) -> bool:
    if isinstance(layer, nn.Hardtanh):
        return layer.min_val == 0 and layer.max_val > 0
    return isinstance(layer, nn.ReLU)


class _Box(NamedTuple):
    """Bounds on what the model computes, float64, ``(1, ...)``."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())


def _box(first: Any, low: Any, high: Any) -> _Box:
    low, high = (_double(torch.as_tensor(corner)) for corner in (low, high))
    for side, corner in (("low", low), ("high", high)):
        if not bool(corner.isfinite().all()):
            raise ValueError(f"{side} is not finite everywhere")
    try:
        lower, upper = torch.broadcast_tensors(low, high)
    except RuntimeError as error:
        raise ValueError(f"the shapes of low and high do not fit: {error}") from None
    if not lower.dim():
        if not isinstance(first, nn.Linear):
            raise ValueError("numbers do not tell the shape of an input: pass a tensor as low")
        lower, upper = (corner.expand(first.in_features) for corner in (lower, upper))
    if len(wrong := (lower > upper).nonzero()):
        at = tuple(wrong[0].tolist())
        raise ValueError(f"low > high at {at}: {float(lower[at])} > {float(upper[at])}")
    return _Box(lower[None], upper[None])


class _Arithmetic(NamedTuple):
    """The model's precision: unit roundoff, largest and smallest normal number."""

    u: float
    largest: float
    tiny: float

    def widen(self, box: _Box, n: int, size: Tensor | None = None, factor: float = 1.0) -> _Box:
        """Widen by the error of sums of n terms whose absolute values add up to ``size``."""
        # The model makes n rounding errors, which add up to at most n u / (1 - n u) < 1.4 n u, we
        # at most 8 n. Underflow, ``factor`` times, adds up to n times the smallest normal number.
        size = box.size if size is None else size
        margin = n * (size * (1.4 * self.u + 8 * 2.0**-53) + 4 * self.tiny * (1 + factor))
        if n * self.u > 0.25 or not bool((size + margin < self.largest / 2).all()):
            raise ValueError("a partial sum may overflow, or lose all its digits")
        return _Box(box.low - margin, box.high + margin)

    def apply(self, layer: Any, box: _Box) -> _Box:
        if isinstance(layer, _LINEAR):
            return self.linear(layer, box)
        if isinstance(layer, _BATCH_NORMS):
            return self.batch_norm(layer, box)
        ends = _Box(layer(box.low.clone()), layer(box.high.clone()))  # it may work in place
        if isinstance(layer, _AVERAGES):
            return self.widen(ends, prod(box.low.shape[2:]) + 2, layer(box.size))
        return self.widen(ends, int(isinstance(layer, nn.Hardtanh)))  # its limits round

    def linear(self, layer: Any, box: _Box) -> _Box:
        taps = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        if taps and box.low.dim() != taps + 2:
            raise ValueError(f"it takes {taps + 1} dimensions")
        product = partial(layer._conv_forward, bias=None) if taps else F.linear
        weight = _double(layer.weight)
        center, radius = (box.high + box.low) / 2, (box.high - box.low) / 2
        middle, spread = product(center, weight), product(radius, weight.abs())
        size = product(center.abs() + radius, weight.abs())
        if layer.bias is not None:
            bias = _double(layer.bias).reshape(-1, *[1] * taps)
            middle, size = middle + bias, size + bias.abs()
        bounds = _Box(middle - spread, middle + spread)
        return self.widen(bounds, 3 + weight[0].numel(), size, float(weight.abs().max()))

    def batch_norm(self, layer: Any, box: _Box) -> _Box:
        mean, variance = _double(layer.running_mean), _double(layer.running_var)
        weight = _double(layer.weight) if layer.affine else torch.ones_like(mean)
        bias = _double(layer.bias) if layer.affine else torch.zeros_like(mean)
        ends = [F.batch_norm(x, mean, variance, weight, bias, eps=layer.eps) for x in box]
        sizes = -mean.abs(), variance, weight.abs(), bias.abs()
        size = F.batch_norm(box.size, *sizes, eps=layer.eps)
        factor = float((weight.abs() / (variance + layer.eps).sqrt()).max())
        return self.widen(_Box(torch.minimum(*ends), torch.maximum(*ends)), 12, size, factor)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
