"""Prove by interval bounds that a unit is silent on every input of a box.

A data set can only show that a unit was silent so far; a unit whose bound on the pre-activation is
not positive cannot fire anywhere in the box:

>>> import torch
>>> from torch import nn
>>> from relubook.units.certificate import certify_dead
>>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
>>> with torch.no_grad():
...     _ = model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]]))
...     _ = model[0].bias.copy_(torch.tensor([-3.0, -1.0, -2.5]))
>>> certify_dead(model, low=-1.0, high=1.0)["1"].certified.tolist()
[True, False, True]
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, inf, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relubook.units.readers import is_plain
from relubook.units.report import SiteListing, plain_table

__all__ = ["Certificate", "CertifiedSite", "certify_dead"]


def _kinds(*names: str) -> tuple[Any, ...]:
    """The classes for one, two and three dimensions."""
    return tuple(getattr(nn, f"{name}{dims}d") for name in names for dims in (1, 2, 3))


_TRANSPOSED = _kinds("ConvTranspose")
_LINEAR = (nn.Linear, *_kinds("Conv"), *_TRANSPOSED)
_BATCH_NORMS = _kinds("BatchNorm")
_DROPOUTS = (nn.Dropout, nn.AlphaDropout, *_kinds("Dropout"))
_RESHAPING = (nn.Flatten, nn.Unflatten)
# Monotone functions that return one of their inputs or a constant, so that they do not round.
_EXACT = (nn.Identity, nn.ReLU, nn.ReLU6, *_RESHAPING, *_kinds("MaxPool", "AdaptiveMaxPool"))
_SMOOTH: tuple[Any, ...] = (
    *(nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Sigmoid, nn.Tanh),
    *(nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardsigmoid),
)


@dataclass(frozen=True)
class CertifiedSite:
    """One rectifier.

    Attributes:
        name: Qualified name of the rectifier, or its place in the list of layers.
        kind: Its class in lower case, such as ``"relu"``.
        certified: Bool, ``(units,)``: which units are silent on every input of the box.
        upper: Float64, ``(units,)``: bound on the pre-activation over box and positions.
    """

    name: str
    kind: str
    certified: Tensor
    upper: Tensor


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


def certify_dead(
    model_or_layers: nn.Module | Iterable[nn.Module],
    low: float | Tensor,
    high: float | Tensor,
    *,
    input_shape: Sequence[int] | None = None,
    unit_roundoff: float | None = None,
) -> Certificate:
    """Find the units that are silent on every input x with low <= x <= high.

    Every layer's values are bounded by intervals: exact for the first linear layer, sound but loose
    behind it, since how units depend on each other is ignored.

    The bounds hold for what the model itself computes: they are evaluated in float64 and widened
    by the a-priori error of a sum of n products in any order, n u / (1 - n u) times the sum of the
    absolute products (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3), for the
    model's own u and for float64's; the box by the rounding of its corners. Not covered are
    transformed convolutions (Winograd, FFT), TF32, autocast and a lowered matmul precision.

    Args:
        model_or_layers: An ``nn.Sequential`` (nested ones too), one layer, or layers in the order
            of execution: linear layers, convolutions (also transposed), batch norm with running
            statistics, PReLU and monotone activations, max and average pooling, dropout, reshaping.
        low: Lower corner: a number, or a tensor that broadcasts to one input, without the batch.
        high: Upper corner, likewise.
        input_shape: Shape of one input without the batch. By default that of ``low`` and ``high``,
            or the number of features that a linear layer takes.
        unit_roundoff: Relative error of one operation of the model; by default half the ``eps`` of
            its coarsest parameter type, 2^-24 for float32. Larger where the above is not covered.

    Raises:
        TypeError: If a layer is not supported, or the box holds no numbers.
        ValueError: If the box is empty, not finite or of another shape, a layer is in training mode
            where that matters or has hooks or parameters that are not finite, or no rectifier can
            be silent.
    """
    layers = list(_flat(model_or_layers))
    if not any(_can_be_silent(layer) for _, layer in layers):
        raise ValueError("there is no rectifier that can be silent (ReLU, ReLU6, ...)")
    dtypes = {p.dtype for _, layer in layers for p in layer.parameters()} or {torch.float32}
    kinds = list(map(torch.finfo, dtypes))
    u = max(kind.eps / 2 for kind in kinds) if unit_roundoff is None else unit_roundoff
    if not 0 <= u < 1:
        raise ValueError(f"unit_roundoff is {unit_roundoff}, not between 0 and 1")
    largest, tiny = min(kind.max for kind in kinds), max(kind.tiny for kind in kinds)
    arithmetic = _Arithmetic(max(u, 2.0**-53), largest, tiny)
    box = arithmetic.widen(_box(layers[0][1], low, high, input_shape), 1)
    sites, dim = [], -1
    with torch.no_grad():
        for name, layer in layers:
            kind = type(layer).__name__
            if _can_be_silent(layer):
                upper = box.high.movedim(dim, 0).flatten(1).amax(1)
                limit = arithmetic.below(getattr(layer, "threshold", 0.0))
                sites.append(CertifiedSite(name, kind.lower(), upper <= limit, upper))
            if isinstance(layer, (*_LINEAR, *_BATCH_NORMS, *_RESHAPING)):
                dim = -1 if isinstance(layer, (nn.Linear, *_RESHAPING)) else 1
            try:
                box = arithmetic.apply(layer, box)
            except RuntimeError as error:
                shape = tuple(box.low.shape[1:])
                raise ValueError(
                    f"layer {name!r} ({kind}) does not take an input of the shape {shape}: {error}"
                ) from error
    return Certificate(tuple(sites))


def _flat(layers: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and layers in the order of execution, checked, without the containers."""
    if isinstance(layers, nn.Module):
        name = prefix or type(layers).__name__.lower()
        _check(name, layers)
        if not isinstance(layers, nn.Sequential):
            yield name, layers
            return
        children = list(layers._modules.items())  # an activation may stand in several places
    elif prefix or not isinstance(layers, Iterable):
        what = f"layer {prefix!r} is" if prefix else "model_or_layers is"
        expected = "torch.nn.Module" if prefix else "module or a list"
        raise TypeError(f"{what} a {type(layers).__name__}, not a {expected}")
    else:
        children = [(str(i), layer) for i, layer in enumerate(layers)]
    for name, layer in children:
        yield from _flat(layer, f"{prefix}.{name}" if prefix else name)


def _check(name: str, layer: Any) -> None:
    supported = (nn.Sequential, *(kind for kinds, _ in _RULES for kind in kinds))
    if not is_plain(layer, supported):
        names = ", ".join(sorted({kind.__name__ for kind in supported}))
        raise TypeError(f"layer {name!r} is a {type(layer).__name__}; supported are {names}")
    alpha, beta, slope = (getattr(layer, k, 1) for k in ("alpha", "beta", "negative_slope"))
    batch = isinstance(layer, _BATCH_NORMS) and (layer.training or layer.running_mean is None)
    random = isinstance(layer, _DROPOUTS) and layer.training and layer.p > 0
    for is_wrong, why in (
        (layer._forward_hooks or layer._forward_pre_hooks, "has forward hooks"),
        (batch, "normalizes by the batch's statistics: call eval() (and keep running statistics)"),
        (random, "drops values at random: call eval()"),
        (isinstance(layer, _SMOOTH) and (alpha <= 0 or beta <= 0 or slope < 0), "is not monotone"),
    ):
        if is_wrong:
            raise ValueError(f"layer {name!r} ({layer}) {why}")
    for kind, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{kind!r} of layer {name!r} is not finite")


def _can_be_silent(layer: Any) -> bool:
    if isinstance(layer, nn.Hardtanh):
        return layer.min_val == 0 and layer.max_val > 0
    return isinstance(layer, nn.ReLU) or (isinstance(layer, nn.Threshold) and layer.value == 0)


class _Box(NamedTuple):
    """Bounds on what the model computes, float64, ``(1, ...)``."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def is_finite(self) -> bool:
        return bool(self.size.isfinite().all())


def _box(first: Any, low: Any, high: Any, shape: Sequence[int] | None) -> _Box:
    corners = []
    for side, corner in (("low", low), ("high", high)):
        if isinstance(corner, bool) or not isinstance(corner, int | float | Tensor):
            raise TypeError(f"{side} is a {type(corner).__name__}, not a number or a tensor")
        corners.append(_double(torch.as_tensor(corner)))
        if not bool(corners[-1].isfinite().all()):
            raise ValueError(f"{side} is not finite everywhere")
    if shape is None:
        are_numbers = not any(corner.dim() for corner in corners)
        if are_numbers and not isinstance(first, nn.Linear):
            raise ValueError("numbers do not tell the shape of an input: pass input_shape=")
        shape = (first.in_features,) if are_numbers else ()
    try:
        lower, upper, _ = torch.broadcast_tensors(*corners, torch.empty(shape))
    except RuntimeError as error:
        raise ValueError(f"the shapes of low, high and the input do not fit: {error}") from None
    if len(wrong := (lower > upper).nonzero()):
        at = tuple(wrong[0].tolist())
        raise ValueError(f"low > high at {at}: {float(lower[at])} > {float(upper[at])}")
    return _Box(lower[None], upper[None])


class _Arithmetic(NamedTuple):
    """The model's precision: unit roundoff, largest and smallest normal number."""

    u: float
    largest: float
    tiny: float

    def below(self, constant: float) -> float:
        """A lower bound on a constant after rounding to the model's precision."""
        return constant - abs(constant) * self.u * (1 + 2.0**-20)

    def widen(self, box: _Box, n: int, size: Tensor | None = None, factor: float = 1.0) -> _Box:
        """Widen by the error of sums of n terms whose absolute values add up to ``size``.

        The model makes n rounding errors, and we at most 4 n. What underflows, ``factor`` times,
        adds up to n times the smallest normal number.
        """
        size = box.size if size is None else size
        error = _gamma(n, self.u) * (1 + 2.0**-20) + 4 * _gamma(n, 2.0**-53)
        margin = size * error * (1 + _gamma(n, 2.0**-53)) + 4 * n * self.tiny * (1 + factor)
        # Where a partial sum may overflow, the model may compute anything, NaN included.
        margin = torch.where((size + margin < self.largest / 2).all(), margin, inf)
        low, high = box.low - margin, box.high + margin
        return _Box(low - low.abs() * 2.0**-52, high + high.abs() * 2.0**-52)

    def apply(self, layer: Any, box: _Box) -> _Box:
        """Bounds behind a layer; none for any value once they are lost for one."""
        rule = next(rule for kinds, rule in _RULES if isinstance(layer, kinds))
        zeros = torch.zeros_like(box.low)
        bounds = rule(self, layer, box if box.is_finite() else _Box(zeros, zeros))
        if box.is_finite() and bounds.is_finite():
            return bounds
        return _Box(torch.full_like(bounds.low, -inf), torch.full_like(bounds.low, inf))

    def exact(self, layer: Any, box: _Box) -> _Box:
        return _Box(layer(box.low.clone()), layer(box.high.clone()))  # it may work in place

    def average(self, layer: Any, box: _Box) -> _Box:
        return self.widen(self.exact(layer, box), prod(box.low.shape[2:]) + 2, layer(box.size))

    def smooth(self, layer: Any, box: _Box) -> _Box:
        # Implementations differ by some units in the last place, relative to 1 where the formula
        # subtracts 1 (elu, sigmoid by tanh); softplus jumps by exp(-threshold) at its threshold.
        scale, slack = max(getattr(layer, "alpha", 1.0), 2.0), 0.0
        if isinstance(layer, nn.Softplus):
            scale, slack = 2.0 / layer.beta, exp(-layer.threshold) / layer.beta
        low, high = self.exact(layer, box)
        ends = _Box(low - slack, high + slack)
        return self.widen(ends, 16, ends.size + scale)

    def prelu(self, layer: Any, box: _Box) -> _Box:
        zero = torch.zeros_like(box.low).clamp(*box)  # the least value, where the slope is negative
        values = torch.stack([F.prelu(x, _double(layer.weight)) for x in (*box, zero)])
        return self.widen(_Box(values.amin(0), values.amax(0)), 3)

    def linear(self, layer: Any, box: _Box) -> _Box:
        taps = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        if not taps and box.low.shape[-1] != layer.in_features:
            raise RuntimeError(f"it takes {layer.in_features} features")
        if taps and box.low.dim() != taps + 2:
            raise RuntimeError(f"it takes {taps + 1} dimensions")
        weight = _double(layer.weight)
        center, radius = (box.high + box.low) / 2, (box.high - box.low) / 2
        middle, spread = _product(layer, center, weight), _product(layer, radius, weight.abs())
        size = _product(layer, center.abs() + radius, weight.abs())
        if layer.bias is not None:
            bias = _double(layer.bias).reshape(-1, *[1] * taps)
            middle, size = middle + bias, size + bias.abs()
        transposed = isinstance(layer, _TRANSPOSED)
        terms = weight[:, 0].numel() // layer.groups if transposed else weight[0].numel()
        bounds = _Box(middle - spread, middle + spread)
        return self.widen(bounds, 3 + terms, size, float(weight.abs().max()))

    def batch_norm(self, layer: Any, box: _Box) -> _Box:
        def per_channel(values: Tensor) -> Tensor:
            return _double(values).reshape(1, -1, *[1] * (box.low.dim() - 2))

        mean = per_channel(layer.running_mean)
        scale, shift = 1 / (per_channel(layer.running_var) + layer.eps).sqrt(), mean * 0
        if layer.affine:
            scale, shift = scale * per_channel(layer.weight), per_channel(layer.bias)
        ends = [(end - mean) * scale + shift for end in box]
        size = (box.size + mean.abs()) * scale.abs() + shift.abs()
        bounds = _Box(torch.minimum(*ends), torch.maximum(*ends))
        return self.widen(bounds, 12, size, float(scale.abs().max()))

    def threshold(self, layer: nn.Threshold, box: _Box) -> _Box:
        below, above = self.below(layer.threshold), -self.below(-layer.threshold)
        passes, stops = box.high > below, box.low <= above
        value = torch.full_like(box.low, layer.value)
        low = torch.where(passes, box.low.clamp(min=below), inf)
        high = torch.where(passes, box.high, -inf)
        low = low.minimum(torch.where(stops, value, inf))
        return self.widen(_Box(low, high.maximum(torch.where(stops, value, -inf))), 1)


# The first that fits holds: ReLU6 is a Hardtanh.
_RULES: tuple[tuple[tuple[Any, ...], Callable[[_Arithmetic, Any, _Box], _Box]], ...] = (
    (_LINEAR, _Arithmetic.linear),
    (_BATCH_NORMS, _Arithmetic.batch_norm),
    (_DROPOUTS, lambda arithmetic, layer, box: box),
    (_EXACT, _Arithmetic.exact),
    (_SMOOTH, _Arithmetic.smooth),
    (_kinds("AvgPool", "AdaptiveAvgPool"), _Arithmetic.average),
    ((nn.Hardtanh,), lambda a, layer, box: a.widen(a.exact(layer, box), 1)),  # limits round
    ((nn.PReLU,), _Arithmetic.prelu),
    ((nn.Threshold,), _Arithmetic.threshold),
)


def _gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u) if n * u < 0.5 else inf


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's linear map of another input with another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if not isinstance(layer, _TRANSPOSED):
        return layer._conv_forward(x, weight, None)
    transposed = getattr(F, f"conv_transpose{len(layer.kernel_size)}d")
    options = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    return transposed(x, weight, None, *options)
