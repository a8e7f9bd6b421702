"""How likely a random ReLU network is born constant: two bounds, and the exact value at width 2.

A network of depth L has L - 1 ReLU layers and one linear map behind them, all of one width N. It is
*born dead* when one of its layers is silent on all inputs before training. Weights are drawn
independently and symmetrically about 0. Here it has one input and no biases.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relubook._optional import require

__all__ = ["lower_bound", "silenced", "two_wide", "upper_bound"]


def silenced(width: int, depth: int) -> float:
    """Return 1 - (1 - 2^-N)^(L - 1): the probability that one given input is silenced, exactly.

    It bounds that for all inputs and symmetric biases (Lu et al. 2019, arXiv 1903.06733).
    """
    return -math.expm1((depth - 1) * math.log1p(-(2.0**-width)))


def upper_bound(width: int, depth: int) -> float:
    """Return 1 - (1 + 2q)(1 - q)^(L - 1), q = 2^-N, and 0 for L = 2; exact for L = 3.

    The first layer keeps one of the two half-lines alive, and after two layers the share of
    networks that keep both is known; from there on both live at most as often as one.
    """
    if depth <= 2:
        return 0.0
    q = 2.0**-width
    return -math.expm1((depth - 1) * math.log1p(-q) + math.log1p(2 * q))


def lower_bound(width: int, depth: int) -> float:
    """Return Lu et al.'s lower bound; exact for L <= 3."""
    q = 2.0**-width
    a, b, steps = 1 - q, 1 - 2 * q - (width - 1) * q * q, depth - 2
    # From two half-lines with nothing in common (open) to two in one direction (merged).
    share = (1 - 2 * q) * (1 - q) / (1 + (width - 1) * q)
    both = share * b**steps + (1 - 2 * q - share) * a**steps
    return max(0.0, 1 - 2 * a ** (depth - 1) + both)


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
