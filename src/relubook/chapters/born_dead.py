"""Dead before the first step: how likely a random network is born constant, and what comes of it.

A network of depth L has L - 1 ReLU layers and one linear map behind them. It is *born dead* on a
set of inputs when one of its layers is silent on all of them at initialization: it is then a
constant there. Without biases, one input feature and symmetric weights the set that counts is any
that holds a positive and a negative number: on each of the two half-lines the network is a multiple
of the input.

>>> round(upper_bound(2, 10), 3), round(lower_bound(2, 10), 3)
(0.925, 0.87)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from relubook._optional import require
from relubook.evidence.data import target
from relubook.evidence.results import computation
from relubook.training.recipe import Recipe
from relubook.training.stack import Stack
from relubook.training.train import train

__all__ = [
    "born_dead",
    "collapse",
    "dead_shares",
    "lower_bound",
    "two_wide",
    "upper_bound",
    "width_needed",
]

WIDTHS = tuple(range(2, 11))
"""Widths of the stored table."""

DEPTHS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50)
"""Depths of the stored table."""

BLOCK = 1000
"""Networks behind one seed of the stored table."""


def upper_bound(width: int, depth: int) -> float:
    """Return the probability that one given input is silenced: a bound on being born dead.

    It is ``1 - (1 - 2^-N)^(L - 1)`` for N units in each of L - 1 ReLU layers: exact for one input
    other than 0 (one ray, if there are no biases), whatever the number of input features.

    Source: Lu et al. 2019, https://arxiv.org/abs/1903.06733; derived in the chapter.
    """
    return -math.expm1((depth - 1) * math.log1p(-(2.0**-width)))


def lower_bound(width: int, depth: int) -> float:
    """Return a lower bound of the probability of being born dead: one input feature, no biases.

    Exact for depths L of 2 and 3, and for width 1. It holds for weights that are independent,
    symmetric and continuous: ``1 - 2 a^m + s_m`` with ``a = 1 - 2^-N``, ``m = L - 1`` and the least
    probability ``s_m`` that both half-lines are alive behind m layers.

    Source: Lu et al. 2019, https://arxiv.org/abs/1903.06733; derived in the chapter.
    """
    q = 2.0**-width
    a, b, steps = 1 - q, 1 - 2 * q - (width - 1) * q * q, depth - 2
    # From two half-lines with nothing in common (open) to two in one direction (merged).
    share = (1 - 2 * q) * (1 - q) / (1 + (width - 1) * q)
    both = share * b**steps + (1 - 2 * q - share) * a**steps
    return max(0.0, 1 - 2 * a ** (depth - 1) + both)


def width_needed(
    depth: int,
    probability: float = 0.01,
    *,
    bound: Callable[[int, int], float] = upper_bound,
) -> int:
    """Return the smallest width at which a bound allows no more than a probability, in (0, 1).

    With :func:`upper_bound` that width is enough, for any inputs; with :func:`lower_bound` no
    smaller one is, for one input feature without biases.
    """
    width = 1
    while bound(width, depth) > probability:
        width += 1
    return width


def two_wide(depths: Sequence[int], *, nodes: int = 129, points: int = 24) -> Tensor:
    """Return the probability of being born dead for width 2, normal weights, one input, no biases.

    What the two half-lines send into a layer are two vectors, and for normal weights all that
    matters of them is the angle between them: it is a Markov chain, whose transitions for two
    units are integrals over three variables, here by Gauss-Legendre quadrature with ``points`` of
    each, on a grid of ``nodes`` angles. Returns shape (depths,), float64, with an error of about
    1e-4 or less; each depth must be at least 2.
    """
    np: Any = require("numpy", "quadrature")
    x, w = np.polynomial.legendre.leggauss(points)
    x, w = torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
    grid = torch.linspace(0, math.pi / 2, nodes, dtype=torch.float64)
    one, two, ratio = (part.flatten() for part in torch.meshgrid(x, x, x, indexing="ij"))
    weight = (w[:, None, None] * w[:, None] * w).flatten()
    ratio = (ratio / (1 - ratio)).sqrt()
    kernel = torch.zeros(nodes, nodes, dtype=torch.float64)
    merged = torch.zeros(nodes, dtype=torch.float64)

    def add(row: int, share: float, angle: Tensor) -> None:
        place = (angle * (2 / math.pi) * (nodes - 1)).clamp(0, nodes - 1)
        left = place.floor().long().clamp(max=nodes - 2)
        part = place - left
        kernel[row].index_add_(0, left, share * weight * (1 - part))
        kernel[row].index_add_(0, left + 1, share * weight * part)

    for row, theta in enumerate(grid.tolist()):
        same, apart = 0.5 - theta / (2 * math.pi), theta / (2 * math.pi)
        # The direction of a unit's weights in the plane of the two vectors, given what it does.
        fires_on_both = theta - math.pi / 2 + (math.pi - theta) * torch.stack([one, two])
        fires_on_first = -math.pi / 2 + theta * two
        first = ratio * fires_on_both[1].cos() / fires_on_both[0].cos()
        second = ratio * (fires_on_both[1] - theta).cos() / (fires_on_both[0] - theta).cos()
        add(row, same**2, (first.atan() - second.atan()).abs())
        third = ratio * fires_on_first.cos() / fires_on_both[0].cos()
        add(row, 4 * same * apart, third.atan())
        kernel[row, -1] += 2 * apart**2
        merged[row] = 2 * same**2
    both = [torch.ones(nodes, dtype=torch.float64)]
    for step in range(max(depths) - 2):
        both.append(kernel @ both[-1] + merged * 0.75**step)
    # The first layer's two images have no unit in common; both are alive in half of all networks.
    alive = torch.stack([0.5 * both[depth - 2][-1] for depth in depths])
    one_ray = 0.75 ** (torch.tensor(list(depths), dtype=torch.float64) - 1)
    return 1 - 2 * one_ray + alive


def death_layers(
    x: Tensor,
    width: int,
    layers: int,
    networks: int,
    *,
    bias: float = 0.0,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw networks layer by layer and note where they die on a set of inputs, shape (n, features).

    Weights are normal with He's variance 2 / fan_in; ``bias`` is the standard deviation of the
    biases in units of that of the layer's weights.

    Returns:
        For each network the first of its ReLU layers, from 1, that is silent on all inputs (it is
        born dead there for every depth beyond), 0 for none; shape (networks,), int64. And the
        same for each input alone, shape (networks, n).
    """
    h = x.double().expand(networks, *x.shape)
    first = torch.zeros(networks, dtype=torch.int64)
    each = torch.zeros(networks, len(x), dtype=torch.int64)
    for layer in range(1, layers + 1):
        fan_in = h.shape[-1]
        scale = math.sqrt(2 / fan_in)
        z = h @ (scale * torch.randn(networks, fan_in, width, generator=generator).double())
        if bias:
            z = z + bias * scale * torch.randn(networks, 1, width, generator=generator).double()
        h = z.relu()
        silent = h.amax(2) == 0
        each[(each == 0) & silent] = layer
        first[(first == 0) & silent.all(1)] = layer
        if not bias:
            # The scale of what passes has no influence; kept near 1 it cannot underflow.
            largest = h.amax((1, 2), keepdim=True)
            h = h / torch.where(largest > 0, largest, torch.ones_like(largest))
    return first, each


@torch.no_grad()
def dead_shares(network: Stack, x: Tensor) -> Tensor:
    """Return the shares of units whose output is 0 on all inputs (n, features).

    Shape (members, layers); NaN where a layer's pre-activations are not finite.
    """
    shares = []
    for pre, post in network.hidden(x):
        share = (post == 0).all(1).to(x.dtype).mean(1)
        shares.append(share.where(pre.isfinite().all((1, 2)), math.nan))
    return torch.stack(shares, 1)


@computation("born-dead", grid={"width": list(WIDTHS)}, seeds=40)
def born_dead(seeds: Sequence[int], *, width: int) -> Mapping[str, list[int]]:
    """Count networks born dead by depth: a seed stands for a block of :data:`BLOCK` networks.

    One input feature, no biases, normal weights, inputs -1 and 1. ``both L`` counts the networks
    of depth L that are dead on both half-lines, ``ray L`` those that are silent on 1.
    """
    inputs = torch.tensor([[1.0], [-1.0]])
    counts: dict[str, list[int]] = {
        f"{name} {depth}": [] for name in ("both", "ray") for depth in DEPTHS
    }
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 * seed + width)
        first, each = death_layers(inputs, width, DEPTHS[-1] - 1, BLOCK, generator=generator)
        for name, layer in (("both", first), ("ray", each[:, 0])):
            for depth in DEPTHS:
                counts[f"{name} {depth}"].append(int(((layer > 0) & (layer < depth)).sum()))
    return counts


CASES: Mapping[str, tuple[str, int, int]] = MappingProxyType(
    {
        "|x|": ("absolute", 2, 10),
        "x sin 5x": ("x_sine", 2, 10),
        "step + sine": ("step_sine", 2, 10),
        "pair": ("absolute_pair", 2, 10),
        "pair, width 4": ("absolute_pair", 4, 10),
        "pair, width 4, depth 20": ("absolute_pair", 4, 20),
    }
)
"""Target, width and depth of each case of :func:`collapse`."""


@computation("collapse", grid={"case": list(CASES), "lr": [0.001, 0.01]}, seeds=500)
def collapse(seeds: Iterable[int], *, case: str, lr: float) -> Mapping[str, list[float]]:
    """Train deep, narrow networks from He's normal draw with zero biases; see what collapses.

    1000 inputs drawn uniformly with variance 1, squared error, Adam, batches of 64, 2000 steps.
    ``born``: a layer is dead on the inputs at the start. ``collapsed``: one is at the end.
    """
    name, width, depth = CASES[case]
    wanted = target(name)
    data = wanted.sample(1000, generator=torch.Generator().manual_seed(0))
    stack = Recipe(wanted.inputs, width, wanted.outputs, hidden=depth - 1).stack(seeds)
    run = train(stack, data.x, data.y, steps=2000, lr=lr, batch_size=64, record=[])
    constant = (run.dead == 1).any(2).double()
    constant[-1][run.diverged >= 0] = math.nan
    return {"born": constant[0].tolist(), "collapsed": constant[-1].tolist()}
