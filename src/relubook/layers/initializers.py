"""Initializers in the manner of torch.nn.init, for a layer's weight and bias together.

A weight has torch's shape ``(out, in, ...)``, a bias has ``(out,)``.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from relubook.layers._options import canonical, check_options, nearest, signature_of

__all__ = [
    "he_normal_", "he_uniform_", "initialize_", "initializer", "lecun_normal_", "lecun_uniform_",
    "rai_", "truncated_normal_", "uniform_",
]  # fmt: skip

Generator = torch.Generator | None

# He et al. 2015, arXiv 1502.01852. The variance is 2 / ((1 + a^2) fan), with a=0 by default.
he_normal_, he_uniform_ = nn.init.kaiming_normal_, nn.init.kaiming_uniform_


def lecun_normal_(tensor: Tensor, *, generator: Generator = None) -> Tensor:
    """Fill a weight with N(0, 1 / fan_in): LeCun et al. 1998; for SELU, arXiv 1706.02515."""
    return nn.init.kaiming_normal_(tensor, nonlinearity="linear", generator=generator)


def lecun_uniform_(tensor: Tensor, *, generator: Generator = None) -> Tensor:
    """Fill a weight with U(-b, b), b = sqrt(3 / fan_in), of variance 1 / fan_in."""
    return nn.init.kaiming_uniform_(tensor, nonlinearity="linear", generator=generator)


def uniform_(tensor: Tensor, bound: float | None = None, *, generator: Generator = None) -> Tensor:
    """Fill a weight with U(-bound, bound); ValueError unless it is positive and finite.

    By default 1 / sqrt(fan_in), as ``nn.Linear`` draws: a variance of 1 / (3 fan_in), He's / 6.
    """
    bound = 1 / math.sqrt(_fan_in(tensor)) if bound is None else _positive("bound", bound)
    return nn.init.uniform_(tensor, -bound, bound, generator)


def truncated_normal_(
    tensor: Tensor, std: float | None = None, cut: float = 2.0, *, generator: Generator = None
) -> Tensor:
    """Fill a weight with a normal draw cut off symmetrically, of exactly the stated spread.

    N(0, s^2) is cut at ``cut`` of its deviations, with s such that what remains has the deviation
    ``std``, by default He's sqrt(2 / fan_in). ValueError unless both are positive and finite.
    """
    std = math.sqrt(2 / _fan_in(tensor)) if std is None else _positive("std", std)
    density = math.exp(-(_positive("cut", cut) ** 2) / 2) / math.sqrt(2 * math.pi)
    parent = std / math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))
    return nn.init.trunc_normal_(tensor, 0.0, parent, -cut * parent, cut * parent, generator)


def rai_(weight: Tensor, bias: Tensor, generator: Generator = None) -> None:
    """Fill weight and bias by randomized asymmetric initialization.

    A unit's weights and bias are drawn from N(0, 0.6007^2 / fan_in), which keeps the second moment;
    then one of them, chosen at random, is replaced by a draw from Beta(2, 1), which is positive.

    Source: Lu, Shin, Su, Karniadakis, arXiv 1903.06733.
    """
    out, fan_in, device = len(weight), _fan_in(weight), weight.device
    values = torch.empty(out, fan_in + 1, dtype=weight.dtype, device=device)
    values.normal_(0.0, 0.6007 / math.sqrt(fan_in), generator=generator)
    place = torch.randint(fan_in + 1, (out, 1), generator=generator, device=device)
    # The largest of two uniform draws, and so the root of one, follows Beta(2, 1).
    beta = torch.rand(out, 1, generator=generator, dtype=weight.dtype, device=device).sqrt_()
    values.scatter_(1, place, beta)
    with torch.no_grad():
        weight.copy_(values[:, :-1].reshape(weight.shape))
        bias.copy_(values[:, -1])


def _torch_default_(weight: Tensor, bias: Tensor | None, generator: Generator = None) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if bias is not None:
        uniform_(bias, 1 / math.sqrt(_fan_in(weight)), generator=generator)


_TABLE: dict[str, Callable[..., Any]] = {
    "he_normal": he_normal_, "he_uniform": he_uniform_,
    "kaiming_normal": he_normal_, "kaiming_uniform": he_uniform_,
    "lecun_normal": lecun_normal_, "lecun_uniform": lecun_uniform_,
    "xavier_normal": nn.init.xavier_normal_, "xavier_uniform": nn.init.xavier_uniform_,
    "glorot_normal": nn.init.xavier_normal_, "glorot_uniform": nn.init.xavier_uniform_,
    "uniform": uniform_, "truncated_normal": truncated_normal_,
    "orthogonal": nn.init.orthogonal_, "rai": rai_, "torch": _torch_default_,
}  # fmt: skip
_KNOWN = {canonical(name): name for name in _TABLE}


def initializer(what: str | Callable[..., Any], /, **options: Any) -> Callable[..., None]:
    """Return a function ``init(weight, bias=None, generator=None)`` that fills a layer in place.

    ``init`` raises ValueError if shapes do not fit, or a function returns another tensor.

    Args:
        what: A name, with or without torch's trailing underscore (``"torch"`` draws what
            ``nn.Linear`` draws, bias included, ``"rai"`` draws weight and bias together, all others
            set the bias to zero); a function ``f(weight)`` that fills the weight in place, which
            gets ``generator=`` if it has such a parameter, else runs under a seed drawn from it; or
            a function ``f(weight, bias, generator)`` that fills both.
        **options: What else it takes, such as ``a=0.01`` for ``"he_normal"``: TypeError if one is
            unknown or missing, ValueError if one is not a finite number.
    """
    if isinstance(what, str):
        name = what if what in _TABLE else _KNOWN.get(canonical(what))
        if name is None:
            raise ValueError(f"unknown initializer {what!r}; {nearest(what, _TABLE)}")
        draw, takes_bias = _TABLE[name], name in ("rai", "torch")
    elif callable(what):
        draw, name = what, getattr(what, "__name__", repr(what))
        parameters = signature_of(what).parameters
        required = {key for key, p in parameters.items() if p.default is p.empty} - set(options)
        takes_bias = "bias" in parameters or len(required) == 3
    else:
        raise TypeError(f"an initializer must be a name or a function, not {what!r}")
    if options or draw is what:
        check_options(repr(name), draw, options, tensors=3 if takes_bias else 1)
    if draw is what and not takes_bias and "generator" not in parameters:
        draw = partial(_seeded, what)

    def init(weight: Tensor, bias: Tensor | None = None, generator: Generator = None) -> None:
        _fan_in(weight)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias must have shape ({len(weight)},), not {tuple(bias.shape)}")
        if bias is None and draw is rai_:
            raise ValueError("'rai' draws weight and bias together; bias must not be None")
        with torch.no_grad():
            # A strided view, such as one network of a stack, would be drawn in another order.
            target = weight if weight.is_contiguous() else weight.contiguous()
            if takes_bias:
                draw(target, bias, generator, **options)
            else:
                filled = draw(target, generator=generator, **options)
                if isinstance(filled, Tensor) and filled.data_ptr() != target.data_ptr():
                    raise ValueError(f"{name!r} must fill the weight in place, not return another")
                if bias is not None:
                    bias.zero_()
            if target is not weight:
                weight.copy_(target)

    return init


def initialize_(
    what: str | Callable[..., Any],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    generator: Generator = None,
    **options: Any,
) -> None:
    """Fill a layer's weight and bias in place; all else is said at :func:`initializer`."""
    initializer(what, **options)(weight, bias, generator)


def _seeded(
    draw: Callable[..., Any], weight: Tensor, *, generator: Generator = None, **options: Any
) -> Any:
    """Let the generator seed torch's global state for one draw; the state itself stays."""
    if generator is None:
        return draw(weight, **options)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(range(torch.cuda.device_count()) if weight.is_cuda else ()):
        (torch.manual_seed if weight.is_cuda else torch.default_generator.manual_seed)(seed)
        return draw(weight, **options)


def _fan_in(weight: Tensor) -> int:
    if weight.dim() < 2 or weight.numel() == 0:
        shape = tuple(weight.shape)
        raise ValueError(f"a weight must have the shape (out, in, ...), none 0, not {shape}")
    return weight[0].numel()


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, not {value!r}")
    return value
