"""Dead before the first step: how likely a random network is born constant, and what comes of it.

A network of depth L has L - 1 ReLU layers and one linear map behind them. It is *born dead* on a
set of inputs when one of its layers is silent on all of them at initialization.
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

__all__ = ["born_dead", "collapse", "dead_shares", "lower_bound", "two_wide", "upper_bound"]
__all__ += ["width_needed"]

# Of the stored table; a seed stands for a block of networks.
WIDTHS = tuple(range(2, 11))
DEPTHS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50)
BLOCK = 1000


def upper_bound(width: int, depth: int) -> float:
    """Return 1 - (1 - 2^-N)^(L - 1) for width N and depth L: an input is silenced, exactly.

    A bound on being born dead (Lu et al. 2019, https://arxiv.org/abs/1903.06733).
    """
    return -math.expm1((depth - 1) * math.log1p(-(2.0**-width)))


def lower_bound(width: int, depth: int) -> float:
    """Return Lu et al.'s lower bound for one input feature and no biases; exact for L <= 3."""
    q = 2.0**-width
    a, b, steps = 1 - q, 1 - 2 * q - (width - 1) * q * q, depth - 2
    # From two half-lines with nothing in common (open) to two in one direction (merged).
    share = (1 - 2 * q) * (1 - q) / (1 + (width - 1) * q)
    both = share * b**steps + (1 - 2 * q - share) * a**steps
    return max(0.0, 1 - 2 * a ** (depth - 1) + both)


def width_needed(
    depth: int, probability: float = 0.01, *, bound: Callable[[int, int], float] = upper_bound
) -> int:
    """Return the smallest width at which a bound allows no more than a probability."""
    width = 1
    while bound(width, depth) > probability:
        width += 1
    return width


def two_wide(depths: Sequence[int], *, nodes: int = 129, points: int = 24) -> Tensor:
    """Return the probability of being born dead for width 2, normal weights, one input, no biases.

    The angle between what the half-lines send into a layer is a Markov chain; its transitions are
    integrals, computed by quadrature. Shape (depths,), float64, errors of about 1e-4 or less.
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
    """Draw networks with He's normal weights and note where they die on inputs (n, features).

    ``bias`` is the biases' standard deviation, in units of the weights'. Returns the first layer,
    from 1, silent on all inputs, 0 for none, (networks,); and the same by input, (networks, n).
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
    """Return the shares of units with output 0 on all inputs, (members, layers), or NaN."""
    shares = []
    for pre, post in network.hidden(x):
        share = (post == 0).all(1).to(x.dtype).mean(1)
        shares.append(share.where(pre.isfinite().all((1, 2)), math.nan))
    return torch.stack(shares, 1)


@computation("born-dead", grid={"width": list(WIDTHS)}, seeds=40)
def born_dead(seeds: Sequence[int], *, width: int) -> Mapping[str, list[int]]:
    """Count networks born dead by depth on inputs -1 and 1; a seed is a block of ``BLOCK``.

    ``both L`` counts those of depth L dead on both half-lines, ``ray L`` those silent on 1.
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


# Target, width and depth.
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


@computation("collapse", grid={"case": list(CASES), "lr": [0.001, 0.01]}, seeds=500)
def collapse(seeds: Iterable[int], *, case: str, lr: float) -> Mapping[str, list[float]]:
    """Train deep, narrow networks: in which is a layer dead, at the start and at the end?"""
    name, width, depth = CASES[case]
    wanted = target(name)
    data = wanted.sample(1000, generator=torch.Generator().manual_seed(0))
    stack = Recipe(wanted.inputs, width, wanted.outputs, hidden=depth - 1).stack(seeds)
    run = train(stack, data.x, data.y, steps=2000, lr=lr, batch_size=64, record=[])
    constant = (run.dead == 1).any(2).double()
    constant[-1][run.diverged >= 0] = math.nan
    return {"born": constant[0].tolist(), "collapsed": constant[-1].tolist()}
