"""What corners do: how far an interpolating network is off, and regions counted and drawn.

The networks themselves, built by hand or read off, come from :mod:`relubook.chapters.theory`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relubook._optional import require
from relubook.chapters.theory import (
    PlaneRegion,
    apply_layers,
    interpolating_network,
    layers_of,
    plane_regions,
)
from relubook.training.stack import Stack


class Misses(NamedTuple):
    """Largest errors of an interpolating network at its knots (rounding alone), and between."""

    knots: float
    between: float


def interpolation_misses(
    function: Callable[[Tensor], Tensor], low: float, high: float, units: int, *, inside: int = 15
) -> Misses:
    """Join ``units + 1`` equidistant points of a function by a network; measure its error.

    Every interval is looked at in ``inside`` equidistant points; an odd number has the middle.

    >>> interpolation_misses(torch.square, 0.0, 1.0, 4)
    Misses(knots=0.0, between=0.015625)
    """
    knots = torch.linspace(low, high, units + 1, dtype=torch.float64)
    steps = torch.arange(1, inside + 1, dtype=torch.float64) / (inside + 1)
    between = (knots[:-1, None] + steps * ((high - low) / units)).flatten()
    layers = interpolating_network(knots, function(knots))

    def miss(x: Tensor) -> float:
        return (apply_layers(layers, x[:, None])[:, 0] - function(x)).abs().max().item()

    return Misses(miss(knots), miss(between))


def member_regions(
    network: Stack, member: int, *, low: float = -1.0, high: float = 1.0
) -> list[PlaneRegion]:
    """Cut a square into the linear regions of one plain ReLU network of two inputs in a stack."""
    return plane_regions(layers_of(network.member(member)), low=low, high=high)


def region_counts(network: Stack, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Count the linear regions of each network of a stack in a square, float64 (members,)."""
    counts = [len(member_regions(network, m, low=low, high=high)) for m in range(len(network))]
    return torch.tensor(counts, dtype=torch.float64)


def draw_regions(axes: Any, regions: Sequence[PlaneRegion]) -> None:
    """Draw regions as polygons in pale colors on matplotlib's axes, and fit the axes to them."""
    polygons = [region.corners for region in regions]
    palette = require("matplotlib", "figures").colormaps["Pastel1"]
    colors = palette([place % palette.N for place in range(len(polygons))])
    collection = require("matplotlib.collections", "figures").PolyCollection
    axes.add_collection(collection(polygons, facecolors=colors, edgecolors="gray"))
    corners = torch.cat(polygons)
    low, high = corners.min().item(), corners.max().item()
    ticks = (low, (low + high) / 2, high)
    axes.set(xlim=(low, high), ylim=(low, high), xticks=ticks, yticks=ticks, aspect="equal")
    axes.set(xlabel="$x_1$", ylabel="$x_2$")
    axes.grid(False)
