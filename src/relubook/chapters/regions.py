"""Linear regions of ReLU networks: closed forms and an exact count.

A network is given here by its layers, ``[(weight, bias), ...]`` in torch's shapes (out, in) and
(out,), with a ReLU between them and none after the last.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relubook._optional import require

Layers = list[tuple[Tensor, Tensor]]


def hyperplane_regions(hyperplanes: int, dimension: int) -> int:
    """Return into how many regions hyperplanes in general position cut a space.

    That is the largest number of linear regions of a network with one hidden layer, one
    hyperplane a unit. Zaslavsky 1975, https://doi.org/10.1090/memo/0154
    """
    return sum(math.comb(hyperplanes, j) for j in range(dimension + 1))


def linear_regions_lower(inputs: int, widths: Sequence[int]) -> int:
    """Return a number of linear regions that the best network of these hidden widths reaches.

    No width may be below ``inputs``; it folds its input in every hidden layer but the last.
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
