"""Linear regions of ReLU networks: closed forms, an exact count, and a network that has most.

A network is given here by its layers, ``[(weight, bias), ...]`` in torch's shapes (out, in) and
(out,), with a ReLU between them and none after the last.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relubook._optional import require
from relubook.training.stack import Stack

Layers = list[tuple[Tensor, Tensor]]


def layers_of(module: nn.Module) -> Layers:
    """Copy the layers of a Sequential of Linear, ReLU, ..., Linear in float64.

    ValueError names the first child that does not fit; a missing bias counts as 0.
    """
    children = list(module.children())
    for place, child in enumerate(children):
        if not isinstance(child, kind := nn.ReLU if place % 2 else nn.Linear):
            raise ValueError(f"child {place} is {type(child).__name__}, not {kind.__name__}")
    layers: Layers = []
    for linear in children[::2]:
        weight = linear.get_parameter("weight").detach().double().clone()
        bias = weight.new_zeros(len(weight))
        if linear.bias is not None:
            bias += linear.get_parameter("bias").detach()
        layers.append((weight, bias))
    return layers


def hyperplane_regions(hyperplanes: int, dimension: int) -> int:
    """Return into how many regions hyperplanes in general position cut a space.

    That is the largest number of linear regions of a network with one hidden layer, one
    hyperplane a unit. Zaslavsky 1975, https://doi.org/10.1090/memo/0154
    """
    return sum(math.comb(hyperplanes, j) for j in range(dimension + 1))


def linear_regions_lower(inputs: int, widths: Sequence[int]) -> int:
    """Return a number of linear regions that the best network of these hidden widths reaches.

    No width may be below ``inputs``; ``folding_network`` reaches the number.
    Montufar et al. 2014, theorem 4, https://arxiv.org/abs/1402.1869
    """
    folds = math.prod((width // inputs) ** inputs for width in widths[:-1])
    return folds * hyperplane_regions(widths[-1], inputs)


CLOSE = 1e-10
"""A corner this close to a unit's line counts as on it, so that slivers are no regions."""


def plane_regions(layers: Layers, *, low: float = -1.0, high: float = 1.0) -> list[Tensor]:
    """Cut a square of the plane into the polygons on which no unit of a network switches.

    They are cut by one line after another, layer by layer, and fill the square. Two neighbors can
    still share one linear map, for instance where a unit has no successor.

    Returns the corners of each in order, (k, 2), float64.
    """
    np: Any = require("numpy", "regions of the plane")
    square = np.array([(low, low), (high, low), (high, high), (low, high)], dtype=float)
    # A region is its corners, and the affine map onto the layer's inputs.
    regions = [(square, np.eye(2), np.zeros(2))]
    for weight, bias in ((w.double().numpy(), b.double().numpy()) for w, b in layers[:-1]):
        cut = []
        for corners, a, c in regions:
            za, zc = weight @ a, weight @ c + bias
            for polygon in _cells(np, corners, za, zc):
                fires = za @ polygon.mean(0) + zc > 0
                cut.append((polygon, za * fires[:, None], zc * fires))
        regions = cut
    return [torch.from_numpy(corners) for corners, _, _ in regions]


def _cells(np: Any, corners: Any, slopes: Any, offsets: Any) -> list[Any]:
    """Cut a convex polygon along the zero lines of affine functions."""
    steep = np.hypot(slopes[:, 0], slopes[:, 1])
    steep = np.where(steep == 0, 1.0, steep)
    slopes, offsets = slopes / steep[:, None], offsets / steep
    heights = corners @ slopes.T + offsets
    cells = [corners]
    for unit in np.flatnonzero((heights.min(0) < -CLOSE) & (heights.max(0) > CLOSE)):
        line = slopes[unit], offsets[unit]
        cells = [half for cell in cells for half in _halves(np, cell, cell @ line[0] + line[1])]
    return cells


def _halves(np: Any, cell: Any, height: Any) -> list[Any]:
    height = np.where(np.abs(height) <= CLOSE, 0.0, height)
    if height.min() >= 0 or height.max() <= 0:
        return [cell]
    above, below = [], []
    for k in range(len(cell)):
        p, q, hp, hq = cell[k - 1], cell[k], height[k - 1], height[k]
        met = [p + hp / (hp - hq) * (q - p)] if hp * hq < 0 else []
        above += [*met, q] if hq >= 0 else met
        below += [*met, q] if hq <= 0 else met
    return [np.array(above), np.array(below)]


def folding_network(inputs: int, widths: Sequence[int]) -> Layers:
    """Build a network on [0, 1]^inputs whose number of linear regions is ``linear_regions_lower``.

    Every hidden layer but the last folds each axis of the unit cube like a paper strip, so that
    ``floor(n / inputs)`` copies of [0, 1] lie on top of each other; units left over stay silent.
    Whatever the last layer draws on the folded sheet appears on every copy: hyperplanes in general
    position (for one or two inputs). Montufar et al. 2014, https://arxiv.org/abs/1402.1869
    """
    kind: Any = {"dtype": torch.float64}
    # Reads the folded cube off the units of the layer before.
    read, shift = torch.eye(inputs, **kind), torch.zeros(inputs, **kind)
    layers: Layers = []
    for width in widths[:-1]:
        p = width // inputs
        rows = torch.zeros(width, inputs, **kind)
        bias = torch.zeros(width, **kind)
        bias[inputs * p :] = -1.0
        heights = torch.zeros(inputs, width, **kind)
        for axis, j in itertools.product(range(inputs), range(p)):
            rows[axis * p + j, axis] = 1.0
            bias[axis * p + j] = -j / p
            heights[axis, axis * p + j] = (-1) ** j * (2.0 if j else 1.0) * p
        layers.append((rows @ read, rows @ shift + bias))
        read, shift = heights, torch.zeros(inputs, **kind)
    normals, offsets = _general_lines(inputs, widths[-1])
    layers.append((normals @ read, normals @ shift + offsets))
    heights = torch.arange(1.0, widths[-1] + 1, **kind)[None]
    return [*layers, (heights, torch.zeros(1, **kind))]


def _general_lines(inputs: int, count: int) -> tuple[Tensor, Tensor]:
    """Return hyperplanes that cut the unit cube into as many regions as they can.

    The cell on which no unit fires lies inside the cube (if there are enough units): where it
    touched a face, the fold there would not show.
    """
    place = torch.arange(count, dtype=torch.float64)
    if inputs == 1:
        normals = torch.ones(count, 1, dtype=torch.float64)
        normals[0] = -1.0
        return normals, -normals[:, 0] * (place + 0.5) / count
    # Tangents of a circle about the center, no two of them parallel and no three through a point;
    # two of them meet at most radius / sin(pi / 2m) = 0.45 from the center.
    m = count if count % 2 else count + 1
    angle = 2 * math.pi * place / m + 0.1
    normals = torch.stack([angle.cos(), angle.sin()], 1)
    return normals, -normals.sum(1) / 2 - 0.45 * math.sin(math.pi / (2 * m))


def region_counts(network: Stack, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Count the linear regions of a stack's plain ReLU networks of 2 inputs: float64 (members,)."""
    members = (layers_of(network.member(m)) for m in range(len(network)))
    counts = [len(plane_regions(layers, low=low, high=high)) for layers in members]
    return torch.tensor(counts, dtype=torch.float64)
