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

__all__ = ["Misses", "draw_regions", "interpolation_misses", "member_regions", "region_counts"]


class Misses(NamedTuple):
    """Largest errors of an interpolating network.

    Attributes:
        knots: At the knots, where there is none but rounding.
        between: Between them.
    """

    knots: float
    between: float


def interpolation_misses(
    function: Callable[[Tensor], Tensor], low: float, high: float, units: int, *, inside: int = 15
) -> Misses:
    """Build the ReLU network that joins points of a function by straight lines; measure its error.

    Args:
        function: Maps float64 of shape (n,) elementwise.
        low: The first knot.
        high: The last knot, above ``low``.
        units: Hidden units: as many as there are intervals between the ``units + 1`` knots, which
            stand at equal distances.
        inside: Points at which each interval is looked at, at equal distances; an odd number has
            the middle among them.

    Returns:
        The largest absolute errors.

    Raises:
        ValueError: If the interval is empty, or ``units`` or ``inside`` is below 1.

    Example:
        >>> interpolation_misses(torch.square, 0.0, 1.0, 4)
        Misses(knots=0.0, between=0.015625)
    """
    if not low < high:
        raise ValueError(f"need low < high, not {low!r} and {high!r}")
    if units < 1 or inside < 1:
        raise ValueError(f"units and inside must be at least 1, not {units} and {inside}")
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
    """Cut a square into the linear regions of one network of a stack.

    Args:
        network: A stack of plain ReLU networks with two inputs.
        member: Its place in the stack.
        low: Lower end of the square on both axes.
        high: Upper end, above ``low``.

    Returns:
        The regions, see :func:`relubook.chapters.theory.plane_regions`.

    Raises:
        ValueError: If the networks have not two inputs or are not plain, or the square is empty.
        IndexError: If there is no such member.
    """
    return plane_regions(layers_of(network.member(member)), low=low, high=high)


def region_counts(network: Stack, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Count the linear regions of each network of a stack in a square.

    Args:
        network: A stack of plain ReLU networks with two inputs.
        low: Lower end of the square on both axes.
        high: Upper end, above ``low``.

    Returns:
        Whole numbers, float64, shape (members,).

    Raises:
        ValueError: As :func:`member_regions`.
    """
    counts = [len(member_regions(network, m, low=low, high=high)) for m in range(len(network))]
    return torch.tensor(counts, dtype=torch.float64)


def draw_regions(axes: Any, regions: Sequence[PlaneRegion]) -> None:
    """Draw regions as polygons in pale colors, and fit the axes to them.

    Args:
        axes: ``matplotlib.axes.Axes`` to draw on.
        regions: What :func:`member_regions` returns.

    Raises:
        ValueError: If there is no region.
        ImportError: If matplotlib is not installed.
    """
    if not regions:
        raise ValueError("regions is empty: there is nothing to draw")
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
