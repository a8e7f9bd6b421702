"""Prove by interval bounds that a unit is silent on every input of a box.

A data set can only show that a unit was silent so far. :func:`certify_dead` bounds every
pre-activation over a whole box of inputs; a unit whose upper bound is not positive cannot fire
anywhere in the box:

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
from math import inf, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relubook.units.report import SiteListing, plain_table

__all__ = ["Certificate", "CertifiedSite", "certify_dead"]

_LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_SELECTING = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_AVERAGING = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold)
_MONOTONE = (
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Hardsigmoid,
)
_SUPPORTED = (
    nn.Sequential,
    *_LINEAR,
    *_BATCH_NORMS,
    *_RECTIFIERS,
    *_MONOTONE,
    *_SELECTING,
    *_AVERAGING,
    *_DROPOUTS,
)


@dataclass(frozen=True)
class CertifiedSite:
    """One rectifier.

    Attributes:
        name: Qualified name of the rectifier, or its place in the list of layers.
        kind: Class of the rectifier in lower case, such as ``"relu"``.
        certified: Bool, ``(units,)``: which units are silent on every input of the box.
        upper: Float64, ``(units,)``: bound on the unit's pre-activation over box and positions.
    """

    name: str
    kind: str
    certified: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Certificate(SiteListing[CertifiedSite]):
    """What :func:`certify_dead` proved; ``certificate["name"]`` is a site, its text a table.

    Attributes:
        sites: One entry for each rectifier that can be silent, in execution order.
    """

    sites: tuple[CertifiedSite, ...]

    @property
    def total(self) -> int:
        """Number of certified units."""
        return sum(int(site.certified.sum()) for site in self.sites)

    def __repr__(self) -> str:
        rows = [("site", "kind", "units", "certified dead", "smallest upper bound")]
        for site in self.sites:
            certified = f"{int(site.certified.sum())}"
            least = f"{float(site.upper.min()):.3g}"
            rows.append((site.name, site.kind, str(site.upper.numel()), certified, least))
        units = sum(site.upper.numel() for site in self.sites)
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

    Every layer's values are bounded by intervals: for a linear layer, the positive weights meet
    the upper and the negative ones the lower bounds of its inputs. For the first layer that is
    exact; behind it the bounds ignore how units depend on each other, so they are sound but loose,
    and a unit may be silent on the box without being certified.

    **Rounding.** The bounds hold for the values that the model itself computes, not for real
    numbers only. They are evaluated in float64 and widened by the a-priori error of a sum of n
    products in any order, n u / (1 - n u) times the sum of the absolute products (Higham, Accuracy
    and Stability of Numerical Algorithms, chapter 3), for the model's own u and for float64's.
    The box is widened by the rounding of its corners to the model's precision. Not covered are
    transformed convolutions (Winograd, FFT), TF32, autocast and a lowered matmul precision: pass a
    larger ``unit_roundoff`` for these.

    Args:
        model_or_layers: An ``nn.Sequential`` (nested ones too), one layer, or layers in the order
            of execution, all in evaluation mode where that makes a difference. Supported are
            linear layers and convolutions (also transposed), batch norm with running statistics,
            ReLU, ReLU6, Hardtanh, Threshold, the monotone activations (LeakyReLU, PReLU, ELU,
            SELU, CELU, Sigmoid, Tanh, Softplus, Softsign, LogSigmoid, Hardsigmoid), max and
            average pooling, Flatten, Unflatten, Dropout and Identity.
        low: Lower corner of the box: a number, or a tensor that broadcasts to one input's shape
            (without the batch).
        high: Upper corner, likewise.
        input_shape: Shape of one input without the batch. By default that of ``low`` and ``high``;
            for numbers, the number of features of the linear layer that comes first.
        unit_roundoff: Relative error of one operation of the model; by default half the ``eps`` of
            its coarsest parameter type, 2^-24 for float32.

    Returns:
        A :class:`Certificate`.

    Raises:
        TypeError: If a layer is not supported, or the box holds no numbers.
        ValueError: If the box is empty (low > high), not finite, or does not fit the first layer;
            if a layer is in training mode where that matters, has hooks or parameters that are
            not finite; if there is no rectifier that can be silent.
    """
    layers = list(_flat(model_or_layers))
    _check_layers(layers)
    parameters = [p for _, layer in layers for p in layer.parameters()]
    u = max((torch.finfo(p.dtype).eps / 2 for p in parameters), default=2.0**-24)
    if unit_roundoff is not None:
        if not 0 <= unit_roundoff < 1:
            raise ValueError(f"unit_roundoff is {unit_roundoff}, not between 0 and 1")
        u = max(unit_roundoff, 2.0**-53)
    limits = [torch.finfo(p.dtype) for p in parameters] or [torch.finfo(torch.float32)]
    arithmetic = _Arithmetic(u, min(f.max for f in limits), max(f.tiny for f in limits))
    shape = _box_shape(layers, low, high, input_shape)
    box = arithmetic.widen(_box(layers, low, high, shape), 1)
    sites = []
    with torch.no_grad():
        for name, layer in layers:
            if _can_be_silent(layer):
                sites.append(_site(name, layer, box, layers, u))
            try:
                box = arithmetic.apply(layer, box)
            except RuntimeError as error:
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) does not take an input of the shape "
                    f"{tuple(box.low.shape[1:])}: {error}"
                ) from error
    return Certificate(tuple(sites))


# --- what is given ----------------------------------------------------------------------------


def _flat(layers: nn.Module | Iterable[nn.Module], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and layers in the order of execution, without the containers."""
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.Sequential):
        yield prefix or type(layers).__name__.lower(), layers
        return
    if isinstance(layers, nn.Sequential):
        named: Iterable[tuple[str, Any]] = list(layers._modules.items())
    elif isinstance(layers, Iterable):
        named = [(str(i), layer) for i, layer in enumerate(layers)]
    else:
        raise TypeError(f"model_or_layers is a {type(layers).__name__}, not a module or a list")
    for name, layer in named:
        full = f"{prefix}.{name}" if prefix else name
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer {full!r} is a {type(layer).__name__}, not a torch.nn.Module")
        if _is_plain(layer, (nn.Sequential,)):
            _check_hooks(full, layer)
            yield from _flat(layer, full)
        else:
            yield full, layer


def _is_plain(module: nn.Module, kinds: Sequence[type]) -> bool:
    forward = type(module).forward
    return any(isinstance(module, k) and forward is getattr(k, "forward", None) for k in kinds)


def _check_hooks(name: str, layer: nn.Module) -> None:
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError(f"layer {name!r} has forward hooks, which may change what it computes")


def _check_layers(layers: list[tuple[str, Any]]) -> None:
    for name, layer in layers:
        if not _is_plain(layer, (*_SUPPORTED, nn.PReLU)):
            supported = sorted({k.__name__ for k in (*_SUPPORTED, nn.PReLU)})
            raise TypeError(
                f"layer {name!r} is a {type(layer).__name__}; supported are {', '.join(supported)}"
            )
        _check_hooks(name, layer)
        if isinstance(layer, _BATCH_NORMS) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"layer {name!r} normalizes by the batch's statistics, which no box bounds: call "
                "eval() (and keep running statistics)"
            )
        if isinstance(layer, _DROPOUTS) and layer.training and layer.p > 0:
            raise ValueError(f"layer {name!r} drops values at random: call eval()")
        if _is_plain(layer, _MONOTONE) and (
            getattr(layer, "negative_slope", 0) < 0
            or getattr(layer, "alpha", 1) <= 0
            or getattr(layer, "beta", 1) <= 0
        ):
            raise ValueError(f"layer {name!r} ({layer}) is not monotone")
        if isinstance(layer, nn.Flatten) and layer.start_dim == 0:
            raise ValueError(f"layer {name!r} flattens the batch too")
        if getattr(layer, "return_indices", False):
            raise ValueError(f"layer {name!r} returns indices too; no bounds are known for these")
        for kind, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"{kind!r} of layer {name!r} is not finite")
    if not any(_can_be_silent(layer) for _, layer in layers):
        raise ValueError("there is no rectifier that can be silent (ReLU, ReLU6, ...)")


def _can_be_silent(layer: Any) -> bool:
    if isinstance(layer, nn.Hardtanh):
        return layer.min_val == 0 and layer.max_val > 0
    return isinstance(layer, nn.ReLU) or (isinstance(layer, nn.Threshold) and layer.value == 0)


def _box_shape(
    layers: list[tuple[str, Any]],
    low: float | Tensor,
    high: float | Tensor,
    input_shape: Sequence[int] | None,
) -> tuple[int, ...]:
    given = [tuple(c.shape) for c in (low, high) if isinstance(c, Tensor) and c.dim()]
    first = next((layer for _, layer in layers if _is_plain(layer, _LINEAR)), None)
    if input_shape is not None:
        return tuple(input_shape)
    if isinstance(first, nn.Linear) and first is layers[0][1] and not any(given):
        return (first.in_features,)
    if not given:
        raise ValueError(
            "low and high do not tell the shape of an input: pass input_shape=, without the batch"
        )
    try:
        return tuple(torch.broadcast_shapes(*given))
    except RuntimeError:
        raise ValueError(f"low and high have the shapes {given[0]} and {given[1]}") from None


def _box(
    layers: list[tuple[str, Any]],
    low: float | Tensor,
    high: float | Tensor,
    shape: tuple[int, ...],
) -> "_Box":
    corners = []
    for name, corner in (("low", low), ("high", high)):
        if isinstance(corner, bool) or not isinstance(corner, int | float | Tensor):
            raise TypeError(f"{name} is a {type(corner).__name__}, not a number or a tensor")
        tensor = torch.as_tensor(corner).detach().to("cpu", torch.float64)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite everywhere")
        try:
            corners.append(tensor.expand(shape))
        except RuntimeError:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, an input {shape}"
            ) from None
    wrong = torch.nonzero(corners[0] > corners[1])
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise ValueError(f"low > high at {at}: {float(corners[0][at])} > {float(corners[1][at])}")
    name, first = layers[0]
    if isinstance(first, nn.Linear) and shape[-1:] != (first.in_features,):
        raise ValueError(f"an input has the shape {shape}; {name!r} takes {first.in_features}")
    if _is_plain(first, _LINEAR[1:]):
        dims = len(first.kernel_size) + 1
        if len(shape) != dims or shape[0] != first.in_channels:
            raise ValueError(
                f"an input has the shape {shape}; {name!r} takes {dims} dimensions with "
                f"{first.in_channels} channels"
            )
    return _Box(corners[0][None], corners[1][None])


def _site(
    name: str, layer: Any, box: "_Box", layers: list[tuple[str, Any]], u: float
) -> CertifiedSite:
    channels = False
    for other, before in layers:
        if other == name:
            break
        if _is_plain(before, (*_LINEAR, *_BATCH_NORMS)):
            channels = not isinstance(before, nn.Linear)
        elif isinstance(before, nn.Flatten | nn.Unflatten):
            channels = False
    dim = 1 if channels else box.high.dim() - 1
    upper = box.high.transpose(0, dim).flatten(1).amax(1)
    limit = _below(layer.threshold, u) if isinstance(layer, nn.Threshold) else 0.0
    return CertifiedSite(name, type(layer).__name__.lower(), upper <= limit, upper)


# --- interval arithmetic ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Box:
    """Bounds on what the model computes, float64, ``(1, ...)``."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())


@dataclass(frozen=True)
class _Arithmetic:
    """The model's precision: unit roundoff, largest and smallest normal number."""

    u: float
    largest: float
    tiny: float

    def error(self, n: int) -> float:
        """Relative error bound of n operations of the model and 2 n of ours, times the sum."""
        return _gamma(n, self.u) * (1 + 2.0**-20) + 4 * _gamma(n, 2.0**-53)

    def widen(
        self, box: _Box, n: int, size: Tensor | None = None, largest_factor: float = 1.0
    ) -> _Box:
        """Widen by the error of sums of n terms whose absolute values add up to ``size``.

        What underflows, factors included, adds up to n times the smallest normal number.
        """
        size = box.size if size is None else size
        margin = size * self.error(n) * (1 + _gamma(n, 2.0**-53)) + 4 * n * self.tiny * (
            1 + largest_factor
        )
        low, high = box.low - margin, box.high + margin
        low -= low.abs() * 2.0**-52
        high += high.abs() * 2.0**-52
        # Where a partial sum may overflow, the model may compute anything, NaN included.
        safe = size + margin < self.largest / 2
        unknown = torch.full_like(low, inf)
        return _Box(torch.where(safe, low, -unknown), torch.where(safe, high, unknown))

    def apply(self, layer: Any, box: _Box) -> _Box:
        if isinstance(layer, _LINEAR):
            return self.linear(layer, box)
        if isinstance(layer, _BATCH_NORMS):
            return self.batch_norm(layer, box)
        if isinstance(layer, _DROPOUTS):
            return box
        if isinstance(layer, _SELECTING):
            return _Box(layer(box.low), layer(box.high))
        if isinstance(layer, _AVERAGING):
            n = prod(box.low.shape[2:]) + 2
            averaged = _Box(layer(_finite(box.low)), layer(_finite(box.high)))
            lost = layer((~(box.size < inf)).double()) > 0
            return _lost(self.widen(averaged, n, layer(_finite(box.size))), lost)
        if isinstance(layer, nn.Threshold):
            return _threshold(layer, box, self)
        if isinstance(layer, nn.PReLU):
            return self.prelu(layer, box)
        if isinstance(layer, _RECTIFIERS):
            active = _Box(_activate(layer, box.low), _activate(layer, box.high))
            exact = isinstance(layer, nn.ReLU | nn.ReLU6)
            return active if exact else self.widen(active, 1)  # the limits may be rounded
        return self.monotone(layer, box)

    def linear(self, layer: Any, box: _Box) -> _Box:
        weight = layer.weight.detach().to("cpu", torch.float64)
        bias = None if layer.bias is None else layer.bias.detach().to("cpu", torch.float64)
        product = _product(layer)
        low, high = _finite(box.low), _finite(box.high)
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        lower = product(low, up) + product(high, down)
        upper = product(high, up) + product(low, down)
        size = product(torch.maximum(low.abs(), high.abs()), weight.abs())
        if bias is not None:
            shaped = (
                bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (lower.dim() - 2))
            )
            lower, upper, size = lower + shaped, upper + shaped, size + shaped.abs()
        lost = product((~(box.size < inf)).double(), torch.ones_like(weight)) > 0
        largest = float(weight.abs().max())
        return _lost(self.widen(_Box(lower, upper), _terms(layer) + 2, size, largest), lost)

    def batch_norm(self, layer: Any, box: _Box) -> _Box:
        shape = (1, -1, *[1] * (box.low.dim() - 2))

        def of(tensor: Tensor | None, default: float) -> Tensor:
            full = torch.full((layer.num_features,), default) if tensor is None else tensor
            return full.detach().to("cpu", torch.float64).reshape(shape)

        scale = of(layer.weight, 1.0) / (of(layer.running_var, 1.0) + layer.eps).sqrt()
        shift, mean = of(layer.bias, 0.0), of(layer.running_mean, 0.0)
        ends = [(_finite(end) - mean) * scale + shift for end in (box.low, box.high)]
        size = (_finite(box.size) + mean.abs()) * scale.abs() + shift.abs()
        exact = _Box(torch.minimum(*ends), torch.maximum(*ends))
        widened = self.widen(exact, 12, size, float(scale.abs().max()))
        return _lost(widened, ~(box.size < inf))

    def prelu(self, layer: Any, box: _Box) -> _Box:
        slope = layer.weight.detach().to("cpu", torch.float64)
        slope = slope.reshape(1, -1, *[1] * max(box.low.dim() - 2, 0))
        ends = []
        for end in (_finite(box.low), _finite(box.high)):
            ends.append(end.clamp(min=0) + slope * end.clamp(max=0))
        crosses = (box.low < 0) & (box.high > 0)
        low = torch.minimum(*ends)
        exact = _Box(torch.where(crosses, low.clamp(max=0), low), torch.maximum(*ends))
        return _lost(self.widen(exact, 3), ~(box.size < inf))

    def monotone(self, layer: Any, box: _Box) -> _Box:
        exact = _Box(_activate(layer, box.low), _activate(layer, box.high))
        # Implementations differ by some units in the last place, relative to 1 where the formula
        # subtracts 1 (elu, sigmoid by tanh); softplus jumps by exp(-threshold) at its threshold.
        scale = max(abs(getattr(layer, "alpha", 1.0)), 2.0)
        slack = 0.0
        if isinstance(layer, nn.Softplus):
            scale = 2.0 / layer.beta
            slack = float(torch.tensor(-layer.threshold).exp()) / layer.beta
        bounded = _Box(_finite(exact.low) - slack, _finite(exact.high) + slack)
        widened = self.widen(bounded, 16, bounded.size + scale)
        return _lost(widened, ~((exact.low > -inf) & (exact.high < inf)))


def _gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u) if n * u < 0.5 else inf


def _finite(tensor: Tensor) -> Tensor:
    """Zero in place of what is not finite; :func:`_lost` then marks what depends on it."""
    return torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))


def _lost(box: _Box, lost: Tensor) -> _Box:
    """No bounds where an input has none, or where they are not numbers."""
    lost = lost | box.low.isnan() | box.high.isnan()
    return _Box(box.low.masked_fill(lost, -inf), box.high.masked_fill(lost, inf))


def _activate(layer: Any, end: Tensor) -> Tensor:
    if isinstance(layer, nn.LeakyReLU):
        return F.leaky_relu(end, layer.negative_slope)
    if getattr(layer, "inplace", False):
        end = end.clone()
    return layer(end)


def _threshold(layer: nn.Threshold, box: _Box, arithmetic: _Arithmetic) -> _Box:
    t, b = -_below(-layer.threshold, arithmetic.u), _below(layer.threshold, arithmetic.u)
    passes, stops = box.high > b, box.low <= t
    value = torch.full_like(box.low, layer.value)
    low = torch.where(
        stops, torch.where(passes, box.low.clamp(min=b).minimum(value), value), box.low
    )
    high = torch.where(passes, torch.where(stops, box.high.maximum(value), box.high), value)
    return arithmetic.widen(_Box(low, high), 1)


def _below(constant: float, u: float) -> float:
    """A lower bound on a constant after rounding to the model's precision."""
    return constant - abs(constant) * u * (1 + 2.0**-20)


def _terms(layer: Any) -> int:
    """Number of products in one output, and the bias."""
    if isinstance(layer, nn.Linear):
        return layer.in_features + 1
    return layer.in_channels // layer.groups * prod(layer.kernel_size) + 1


def _product(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer's linear map for another input and another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return lambda x, weight: layer._conv_forward(x, weight, None)
    dims = len(layer.kernel_size)
    transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    return lambda x, weight: transposed(
        x,
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.output_padding,
        layer.groups,
        layer.dilation,
    )
