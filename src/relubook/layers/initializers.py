"""Initializers in the manner of torch.nn.init, for plain and for stacked weights.

A plain weight has torch's shape ``(out, in, ...)``. A stacked weight holds many networks at once
and has the shape ``(members, in, out)``; its bias has the shape ``(members, out)``. With
``stacked=True`` every member is drawn as the plain tensor ``(out, in)`` would be, one after the
other, so that a member equals the single layer drawn from the same generator:

>>> import torch
>>> from relubook.layers.initializers import he_normal_
>>> stack = he_normal_(torch.empty(2, 3, 4), stacked=True,
...                    generator=[torch.Generator().manual_seed(s) for s in (5, 6)])
>>> plain = he_normal_(torch.empty(4, 3), generator=torch.Generator().manual_seed(6))
>>> bool((stack[1].T == plain).all())
True
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "he_normal_",
    "he_uniform_",
    "initialize_",
    "initializer_names",
    "lecun_normal_",
    "lecun_uniform_",
    "positive_bias_",
    "rai_",
    "truncated_normal_",
    "uniform_",
]

Generators = torch.Generator | Sequence[torch.Generator] | None

RAI_SCALE = 0.6007
"""Standard deviation of :func:`rai_`'s normal draws times sqrt(fan_in), as published."""


def he_normal_(
    tensor: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    *,
    generator: Generators = None,
    stacked: bool = False,
) -> Tensor:
    """Fill a weight with N(0, 2 / ((1 + a^2) fan)), which keeps a rectifier's second moment.

    Args:
        tensor: Weight, ``(out, in, ...)``, or ``(members, in, out)`` with ``stacked``.
        a: Slope of the activation for negative inputs; 0 for ReLU.
        mode: ``"fan_in"`` keeps the size of the forward pass, ``"fan_out"`` of the backward pass.
        generator: Source of the randomness. With ``stacked`` also a sequence, one per member.
        stacked: Whether ``tensor`` holds members.

    Returns:
        ``tensor``, filled in place.

    Raises:
        ValueError: If the tensor has no fan, or the generators do not match the members.

    Source: He et al. 2015, arXiv 1502.01852.
    """
    return _fill(
        tensor,
        lambda t, g: nn.init.kaiming_normal_(t, a, _mode(mode), "leaky_relu", generator=g),
        generator,
        stacked,
    )


def he_uniform_(
    tensor: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    *,
    generator: Generators = None,
    stacked: bool = False,
) -> Tensor:
    """Fill a weight with U(-b, b) of variance 2 / ((1 + a^2) fan); see :func:`he_normal_`."""
    return _fill(
        tensor,
        lambda t, g: nn.init.kaiming_uniform_(t, a, _mode(mode), "leaky_relu", generator=g),
        generator,
        stacked,
    )


def lecun_normal_(tensor: Tensor, *, generator: Generators = None, stacked: bool = False) -> Tensor:
    """Fill a weight with N(0, 1 / fan_in), the start that SELU asks for.

    Args:
        tensor: Weight, ``(out, in, ...)``, or ``(members, in, out)`` with ``stacked``.
        generator: Source of the randomness. With ``stacked`` also a sequence, one per member.
        stacked: Whether ``tensor`` holds members.

    Returns:
        ``tensor``, filled in place.

    Raises:
        ValueError: If the tensor has no fan, or the generators do not match the members.

    Source: LeCun et al. 1998, Efficient BackProp; Klambauer et al. 2017, arXiv 1706.02515.
    """
    return _fill(
        tensor,
        lambda t, g: nn.init.kaiming_normal_(t, nonlinearity="linear", generator=g),
        generator,
        stacked,
    )


def lecun_uniform_(
    tensor: Tensor, *, generator: Generators = None, stacked: bool = False
) -> Tensor:
    """Fill a weight with U(-b, b), b = sqrt(3 / fan_in), of variance 1 / fan_in."""
    return _fill(
        tensor,
        lambda t, g: nn.init.kaiming_uniform_(t, nonlinearity="linear", generator=g),
        generator,
        stacked,
    )


def uniform_(
    tensor: Tensor,
    bound: float | None = None,
    *,
    generator: Generators = None,
    stacked: bool = False,
) -> Tensor:
    """Fill a weight with U(-bound, bound).

    Args:
        tensor: Weight, ``(out, in, ...)``, or ``(members, in, out)`` with ``stacked``.
        bound: Largest absolute value; 1 / sqrt(fan_in) by default, which is what ``nn.Linear``
            draws: a variance of 1 / (3 fan_in), a sixth of He's.
        generator: Source of the randomness. With ``stacked`` also a sequence, one per member.
        stacked: Whether ``tensor`` holds members.

    Returns:
        ``tensor``, filled in place.

    Raises:
        ValueError: If ``bound`` is not positive and finite, or the tensor has no fan.
    """
    if bound is not None and not (bound > 0 and math.isfinite(bound)):
        raise ValueError(f"bound must be a positive finite number, got {bound!r}")

    def draw(t: Tensor, g: torch.Generator | None) -> None:
        b = 1 / math.sqrt(_fan_in(t)) if bound is None else bound
        t.uniform_(-b, b, generator=g)

    return _fill(tensor, draw, generator, stacked)


def truncated_normal_(
    tensor: Tensor,
    std: float | None = None,
    cut: float = 2.0,
    *,
    generator: Generators = None,
    stacked: bool = False,
) -> Tensor:
    """Fill a weight with a normal draw cut off symmetrically, of exactly the stated spread.

    Cutting N(0, s^2) at ``cut`` deviations takes away some of its variance; the parent's s is
    enlarged so that what remains has the standard deviation ``std`` (at cut 2 by 1 / 0.8796).

    Args:
        tensor: Weight, ``(out, in, ...)``, or ``(members, in, out)`` with ``stacked``.
        std: Standard deviation of the result; He's sqrt(2 / fan_in) by default.
        cut: Where the parent is cut off, in its own standard deviations.
        generator: Source of the randomness. With ``stacked`` also a sequence, one per member.
        stacked: Whether ``tensor`` holds members.

    Returns:
        ``tensor``, filled in place.

    Raises:
        ValueError: If ``std`` or ``cut`` is not positive and finite, or the tensor has no fan.
    """
    for name, value in (("std", std), ("cut", cut)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    kept = math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))

    def draw(t: Tensor, g: torch.Generator | None) -> None:
        parent = (math.sqrt(2 / _fan_in(t)) if std is None else std) / kept
        nn.init.trunc_normal_(t, 0.0, parent, -cut * parent, cut * parent, generator=g)

    return _fill(tensor, draw, generator, stacked)


def positive_bias_(
    bias: Tensor,
    value: float = 0.1,
    high: float | None = None,
    *,
    generator: Generators = None,
    stacked: bool = False,
) -> Tensor:
    """Fill a bias with a small positive number, so that more units fire at the start.

    Args:
        bias: Bias, ``(out,)``, or ``(members, out)`` with ``stacked``.
        value: The constant, or the lower end of the draw.
        high: Upper end; the entries are then drawn from U(value, high).
        generator: Source of the randomness when ``high`` is given.
        stacked: Whether ``bias`` holds members.

    Returns:
        ``bias``, filled in place.

    Raises:
        ValueError: If ``value`` is not positive and finite, or ``high`` is not above it.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"value must be a positive finite number, got {value!r}")
    if high is not None and not (high > value and math.isfinite(high)):
        raise ValueError(f"high must be a finite number above value={value}, got {high!r}")
    if bias.dim() != (2 if stacked else 1):
        wanted = "(members, out)" if stacked else "(out,)"
        raise ValueError(f"a bias has the shape {wanted}, got {tuple(bias.shape)}")
    with torch.no_grad():
        if high is None:
            return bias.fill_(value)
        if not stacked:
            return bias.uniform_(value, high, generator=_one(generator))
        for row, g in zip(bias, _per_member(generator, len(bias)), strict=True):
            row.copy_(torch.empty_like(row).uniform_(value, high, generator=g))
    return bias


def rai_(
    weight: Tensor,
    bias: Tensor,
    *,
    generator: Generators = None,
    stacked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fill weight and bias by randomized asymmetric initialization.

    For every unit the fan_in weights and the bias are drawn from N(0, 0.6007^2 / fan_in); then
    one of these fan_in + 1 numbers, chosen at random, is replaced by a draw from Beta(2, 1). The
    positive draw makes it likelier than 1/2 that the unit fires on positive inputs; 0.6007 keeps
    the second moment of the layer's output.

    Args:
        weight: ``(out, in, ...)``, or ``(members, in, out)`` with ``stacked``.
        bias: ``(out,)``, or ``(members, out)`` with ``stacked``.
        generator: Source of the randomness. With ``stacked`` also a sequence, one per member.
        stacked: Whether the tensors hold members.

    Returns:
        ``(weight, bias)``, filled in place.

    Raises:
        ValueError: If the shapes do not belong together.

    Source: Lu, Shin, Su, Karniadakis, arXiv 1903.06733.
    """
    out = weight.shape[-1] if stacked else weight.shape[0]
    wanted = (len(weight), out) if stacked else (out,)
    if tuple(bias.shape) != wanted:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} wants a bias of shape {wanted}, "
            f"got {tuple(bias.shape)}"
        )
    biases = bias if stacked else bias.unsqueeze(0)
    drawn = torch.empty(biases.shape, dtype=bias.dtype, device=bias.device)
    rows = iter(drawn)

    def draw(t: Tensor, g: torch.Generator | None) -> None:
        fan_in = _fan_in(t)
        values = torch.empty(out, fan_in + 1, dtype=t.dtype, device=t.device)
        values.normal_(0.0, RAI_SCALE / math.sqrt(fan_in), generator=g)
        place = torch.randint(fan_in + 1, (out, 1), generator=g, device=t.device)
        # The largest of two uniform draws, and so the root of one, follows Beta(2, 1).
        beta = torch.rand(out, 1, generator=g, dtype=t.dtype, device=t.device).sqrt_()
        values.scatter_(1, place, beta)
        t.copy_(values[:, :-1].reshape(t.shape))
        next(rows).copy_(values[:, -1])

    _fill(weight, draw, generator, stacked)
    with torch.no_grad():
        biases.copy_(drawn)
    return weight, bias


_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "he_normal": he_normal_,
    "he_uniform": he_uniform_,
    "lecun_normal": lecun_normal_,
    "lecun_uniform": lecun_uniform_,
    "uniform": uniform_,
    "truncated_normal": truncated_normal_,
}


def initializer_names() -> list[str]:
    """Return the names that :func:`initialize_` takes."""
    return [*_WEIGHTS, "xavier_normal", "xavier_uniform", "orthogonal", "rai", "torch"]


def initialize_(
    name: str,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    generator: Generators = None,
    stacked: bool = False,
    **options: float,
) -> None:
    """Fill a layer's weight and bias by the initializer of that name.

    Args:
        name: One of :func:`initializer_names`, with or without torch's trailing underscore.
            ``"torch"`` draws what ``nn.Linear`` draws, bias included; ``"rai"`` draws weight and
            bias together; all others set the bias to zero.
        weight: ``(out, in, ...)``, or ``(members, in, out)`` with ``stacked``.
        bias: ``(out,)``, or ``(members, out)`` with ``stacked``; None for a layer without.
        generator: Source of the randomness. With ``stacked`` also a sequence, one per member.
        stacked: Whether the tensors hold members.
        **options: What else the initializer takes, such as ``a=0.01`` for ``he_normal``.

    Raises:
        ValueError: If the name is unknown, the shapes do not fit, or ``"rai"`` is asked for a layer
            without a bias.
    """
    name = name.removesuffix("_")
    if name not in initializer_names():
        raise ValueError(
            f"unknown initializer {name!r}; known are {', '.join(initializer_names())}"
        )
    if bias is not None:
        nn.init.zeros_(bias)
    if name == "rai":
        if bias is None:
            raise ValueError("the initializer 'rai' draws weight and bias together; bias is None")
        rai_(weight, bias, generator=generator, stacked=stacked, **options)
    elif name == "torch":
        _torch_default_(weight, bias, generator, stacked)
    elif name in _WEIGHTS:
        _WEIGHTS[name](weight, generator=generator, stacked=stacked, **options)
    else:
        draw = getattr(nn.init, name + "_")
        _fill(weight, lambda t, g: draw(t, generator=g, **options), generator, stacked)


def _torch_default_(
    weight: Tensor, bias: Tensor | None, generator: Generators, stacked: bool
) -> None:
    """Draw the weight, then the bias, member by member, as ``nn.Linear`` does."""
    rows = iter(() if bias is None else bias if stacked else bias.unsqueeze(0))

    def draw(t: Tensor, g: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=g)
        if bias is not None:
            row = next(rows)
            bound = 1 / math.sqrt(_fan_in(t))
            row.copy_(torch.empty_like(row).uniform_(-bound, bound, generator=g))

    _fill(weight, draw, generator, stacked)


def _fill(
    tensor: Tensor,
    draw: Callable[[Tensor, torch.Generator | None], object],
    generator: Generators,
    stacked: bool,
) -> Tensor:
    """Draw a plain tensor in place, or every member of a stack as its own plain tensor."""
    if not stacked:
        _fan_in(tensor)
        with torch.no_grad():
            draw(tensor, _one(generator))
        return tensor
    if tensor.dim() != 3 or 0 in tensor.shape:
        raise ValueError(
            "a stacked weight has the shape (members, in, out), none of them 0, "
            f"got {tuple(tensor.shape)}"
        )
    members, fan_in, out = tensor.shape
    plain = torch.empty(members, out, fan_in, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        for one, g in zip(plain, _per_member(generator, members), strict=True):
            draw(one, g)
        return tensor.copy_(plain.mT)


def _mode(mode: str) -> Literal["fan_in", "fan_out"]:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', got {mode!r}")
    return "fan_in" if mode == "fan_in" else "fan_out"


def _fan_in(tensor: Tensor) -> int:
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise ValueError(
            f"a weight has the shape (out, in, ...), none of them 0, got {tuple(tensor.shape)}"
        )
    return tensor[0].numel()


def _one(generator: Generators) -> torch.Generator | None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError("a plain tensor takes one generator; pass stacked=True for several")
    return generator


def _per_member(generator: Generators, members: int) -> Sequence[torch.Generator | None]:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * members
    if len(generator) != members:
        raise ValueError(f"{members} members want {members} generators, got {len(generator)}")
    return generator
