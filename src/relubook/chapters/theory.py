"""Closed forms and exact counts: linear regions, networks built by hand, interpolation errors.

A network is given here by its layers, ``[(weight, bias), ...]`` in torch's shapes (out, in) and
(out,), with a ReLU between them and none after the last.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Layers",
    "PlaneRegion",
    "apply_layers",
    "folding_network",
    "grid_interpolant",
    "hyperplane_regions",
    "interpolating_network",
    "interpolation_error_bound",
    "layers_of",
    "line_pieces",
    "linear_regions_lower",
    "linear_regions_upper",
    "plane_regions",
    "tent_map",
    "tent_network",
]

Layers = list[tuple[Tensor, Tensor]]
"""Weights (out, in) and biases (out,) of a plain ReLU network, first layer first."""


def layers_of(module: nn.Module) -> Layers:
    """Read the layers of a plain ReLU network in float64.

    Args:
        module: An ``nn.Sequential`` of ``nn.Linear`` and ``nn.ReLU`` in turn, linear at both ends.

    Returns:
        Detached copies of weights and biases; a missing bias counts as 0.

    Raises:
        ValueError: If the module is no such network; names the first child that does not fit.
    """
    children = list(module.children()) if isinstance(module, nn.Sequential) else []
    if len(children) % 2 == 0:
        raise ValueError(
            f"need a Sequential of Linear, ReLU, ..., Linear, not {type(module).__name__} "
            f"with {len(children)} children"
        )
    layers: Layers = []
    for place, child in enumerate(children):
        if place % 2:
            if not isinstance(child, nn.ReLU):
                raise ValueError(f"child {place} is {type(child).__name__}, not ReLU")
            continue
        if not isinstance(child, nn.Linear):
            raise ValueError(f"child {place} is {type(child).__name__}, not Linear")
        weight = child.weight.detach().double().clone()
        bias = weight.new_zeros(len(weight)) if child.bias is None else child.bias.detach().double()
        layers.append((weight, bias.clone()))
    return layers


def _checked(layers: Sequence[tuple[Tensor, Tensor]]) -> Layers:
    if not layers:
        raise ValueError("layers is empty: a network needs at least one linear map")
    before = layers[0][0].shape[-1]
    checked: Layers = []
    for place, (weight, bias) in enumerate(layers):
        if weight.dim() != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != before:
            raise ValueError(
                f"layer {place} has weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; "
                f"expected (m, {before}) and (m,)"
            )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"layer {place} holds NaN or infinity")
        before = weight.shape[0]
        checked.append((weight.detach().double(), bias.detach().double()))
    return checked


def apply_layers(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Run a network given by its layers.

    Args:
        layers: Weights and biases.
        x: Inputs, shape (..., inputs).

    Returns:
        Outputs, shape (..., outputs).
    """
    for weight, bias in layers[:-1]:
        x = torch.relu(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


def hyperplane_regions(hyperplanes: int, dimension: int) -> int:
    """Return into how many regions hyperplanes in general position cut a space.

    That is the largest number of linear regions of a network with one hidden layer, one
    hyperplane a unit.

    Args:
        hyperplanes: Number of hyperplanes, at least 0.
        dimension: Dimension of the space, at least 1.

    Returns:
        ``sum_{j <= dimension} C(hyperplanes, j)``.

    Raises:
        ValueError: If an argument is too small.

    Source:
        Zaslavsky 1975, https://doi.org/10.1090/memo/0154
    """
    if hyperplanes < 0 or dimension < 1:
        raise ValueError(
            f"need hyperplanes >= 0 and dimension >= 1, not {hyperplanes} and {dimension}"
        )
    return sum(math.comb(hyperplanes, j) for j in range(dimension + 1))


def _widths(inputs: int, widths: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(int(width) for width in widths)
    if inputs < 1 or not widths or any(width < 1 for width in widths):
        raise ValueError(f"need inputs >= 1 and hidden widths >= 1, not {inputs} and {widths}")
    return widths


def linear_regions_lower(inputs: int, widths: Sequence[int]) -> int:
    """Return a number of linear regions that the best network of these widths reaches.

    Args:
        inputs: Number of input features, n_0.
        widths: Units of each hidden layer, n_1 to n_L, none below ``inputs``.

    Returns:
        ``prod_{l < L} floor(n_l / n_0)^n_0 * sum_{j <= n_0} C(n_L, j)``. A lower bound on the
        maximum over all weights; a given network may have a single region.

    Raises:
        ValueError: If a width is below ``inputs``.

    Source:
        Montufar et al. 2014, theorem 4, https://arxiv.org/abs/1402.1869; :func:`folding_network`
        reaches it.
    """
    widths = _widths(inputs, widths)
    if min(widths) < inputs:
        raise ValueError(f"the bound needs every width >= inputs = {inputs}, not {widths}")
    folds = math.prod((width // inputs) ** inputs for width in widths[:-1])
    return folds * hyperplane_regions(widths[-1], inputs)


def linear_regions_upper(inputs: int, widths: Sequence[int]) -> int:
    """Return a number of linear regions that no network of these widths exceeds.

    Args:
        inputs: Number of input features.
        widths: Units of each hidden layer.

    Returns:
        ``prod_l sum_{j <= d_l} C(n_l, j)`` with ``d_l = min(n_0, ..., n_l)``: layer l cuts each
        region, whose image has at most d_l dimensions, at most so often.

    Source:
        Montufar 2017, Notes on the number of linear regions of deep neural networks; derived by
        applying :func:`hyperplane_regions` layer by layer.
    """
    widths = _widths(inputs, widths)
    product, dimension = 1, inputs
    for width in widths:
        dimension = min(dimension, width)
        product *= hyperplane_regions(width, dimension)
    return product


def line_pieces(
    layers: Sequence[tuple[Tensor, Tensor]],
    low: float,
    high: float,
    *,
    start: Tensor | None = None,
    direction: Tensor | None = None,
    tolerance: float = 1e-9,
) -> Tensor:
    """Return the points where a network bends along a line segment.

    Args:
        layers: Weights and biases.
        low: Where the segment begins.
        high: Where it ends, above ``low``.
        start: Point of the line at 0, shape (inputs,); the origin by default.
        direction: Step of the line, shape (inputs,); needed for more than one input.
        tolerance: Slopes that differ by no more than this share of the largest count as one.

    Returns:
        The inner breakpoints in rising order, float64, shape (pieces - 1,): the network is affine
        between two of them and bends at each.

    Raises:
        ValueError: If the segment is empty, or the line or the layers do not fit.

    Source:
        Layer by layer: on a piece on which a layer's inputs are affine, each unit's zero is the
        root of a straight line.
    """
    layers = _checked(layers)
    inputs = layers[0][0].shape[1]
    if not low < high:
        raise ValueError(f"need low < high, not {low!r} and {high!r}")
    if direction is None:
        if inputs != 1:
            raise ValueError(f"a network of {inputs} inputs needs direction= for its line")
        direction = torch.ones(1)
    start = torch.zeros(inputs) if start is None else start
    for name, vector in (("start", start), ("direction", direction)):
        if vector.shape != (inputs,):
            raise ValueError(f"{name} must have the shape ({inputs},), not {tuple(vector.shape)}")
    knots = torch.tensor([low, high], dtype=torch.float64)
    slope = direction.double().expand(1, -1)
    offset = start.double().expand(1, -1)
    for weight, bias in layers[:-1]:
        slope, offset = slope @ weight.T, offset @ weight.T + bias
        root = -offset / slope
        left, right = knots[:-1, None], knots[1:, None]
        inside = (root > left) & (root < right)
        knots = torch.cat([knots, root[inside]]).unique()
        middle = (knots[:-1] + knots[1:]) / 2
        parent = torch.searchsorted(right[:, 0].contiguous(), middle)
        slope, offset = slope[parent], offset[parent]
        fires = slope * middle[:, None] + offset > 0
        slope, offset = slope * fires, offset * fires
    slope = slope @ layers[-1][0].T
    bends = (slope[1:] - slope[:-1]).abs().amax(1) > tolerance * slope.abs().max()
    return knots[1:-1][bends]


@dataclass(frozen=True)
class PlaneRegion:
    """A polygon of the plane on which every unit of a network keeps its state.

    Attributes:
        corners: Its corners in order, shape (k, 2), float64.
        pattern: Which hidden units fire on it, shape (units,), bool.
        weight: The network there is ``weight @ x + bias``: shape (outputs, 2).
        bias: Shape (outputs,).
    """

    corners: Tensor
    pattern: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def area(self) -> float:
        """Area of the polygon."""
        x, y = self.corners.T
        return 0.5 * abs(float((x * y.roll(-1) - y * x.roll(-1)).sum()))


def plane_regions(
    layers: Sequence[tuple[Tensor, Tensor]],
    *,
    low: float = -1.0,
    high: float = 1.0,
    tolerance: float = 1e-10,
) -> list[PlaneRegion]:
    """Cut a square of the plane into the regions on which no unit of a network switches.

    Args:
        layers: Weights and biases of a network with two inputs.
        low: Lower end of the square on both axes.
        high: Upper end, above ``low``.
        tolerance: A corner this close to a unit's line (in input units) counts as on it, so that
            slivers of rounding are no regions.

    Returns:
        The regions, which fill the square. Their number is that of activation patterns on it; two
        neighbors can still share one linear map, for instance where a unit has no successor.

    Raises:
        ValueError: If the network has not two inputs or the square is empty.

    Source:
        Polygons cut by one line after another, layer by layer; exact up to ``tolerance``.
    """
    np: Any = _numpy()
    layers = _checked(layers)
    if layers[0][0].shape[1] != 2:
        raise ValueError(f"plane_regions needs two inputs, not {layers[0][0].shape[1]}")
    if not low < high:
        raise ValueError(f"need low < high, not {low!r} and {high!r}")
    square = np.array([(low, low), (high, low), (high, high), (low, high)], dtype=float)
    # A region is its corners, the affine map onto the layer's inputs, and the pattern so far.
    regions = [(square, np.eye(2), np.zeros(2), ())]
    for weight_, bias_ in layers[:-1]:
        weight, bias = weight_.numpy(), bias_.numpy()
        cut = []
        for corners, a, c, pattern in regions:
            za, zc = weight @ a, weight @ c + bias
            for polygon in _cells(np, corners, za, zc, tolerance):
                fires = za @ polygon.mean(0) + zc > 0
                cut.append((polygon, za * fires[:, None], zc * fires, (*pattern, *fires.tolist())))
        regions = cut
    weight, bias = layers[-1][0].numpy(), layers[-1][1].numpy()
    return [
        PlaneRegion(
            torch.from_numpy(corners),
            torch.tensor(pattern, dtype=torch.bool),
            torch.from_numpy(weight @ a),
            torch.from_numpy(weight @ c + bias),
        )
        for corners, a, c, pattern in regions
    ]


def _cells(np: Any, corners: Any, slopes: Any, offsets: Any, tolerance: float) -> list[Any]:
    """Cut a convex polygon along the zero lines of affine functions."""
    steep = np.hypot(slopes[:, 0], slopes[:, 1])
    steep = np.where(steep == 0, 1.0, steep)
    slopes, offsets = slopes / steep[:, None], offsets / steep
    heights = corners @ slopes.T + offsets
    crosses = (heights.min(0) < -tolerance) & (heights.max(0) > tolerance)
    cells = [corners]
    for unit in np.flatnonzero(crosses):
        pieces = []
        for cell in cells:
            pieces += _halves(np, cell, cell @ slopes[unit] + offsets[unit], tolerance)
        cells = pieces
    return cells


def _halves(np: Any, cell: Any, height: Any, tolerance: float) -> list[Any]:
    height = np.where(np.abs(height) <= tolerance, 0.0, height)
    if height.min() >= 0 or height.max() <= 0:
        return [cell]
    sides: tuple[list[Any], list[Any]] = ([], [])
    for k in range(len(cell)):
        p, q, hp, hq = cell[k - 1], cell[k], height[k - 1], height[k]
        if hp * hq < 0:
            on_line = p + hp / (hp - hq) * (q - p)
            sides[0].append(on_line)
            sides[1].append(on_line)
        if hq >= 0:
            sides[0].append(q)
        if hq <= 0:
            sides[1].append(q)
    return [np.array(side) for side in sides]


def _numpy() -> Any:
    from relubook._optional import require

    return require("numpy", "regions of the plane")


def tent_map(x: Tensor, times: int = 1) -> Tensor:
    """Fold [0, 1] in the middle, again and again: ``x -> 1 - |2x - 1|``.

    Args:
        x: Points of [0, 1], any shape.
        times: How often, at least 0.

    Returns:
        The images; the ``times``-fold map has exactly ``2 ** times`` straight pieces.

    Raises:
        ValueError: If ``times`` is negative.

    Source:
        Telgarsky 2015, https://arxiv.org/abs/1509.08101
    """
    if times < 0:
        raise ValueError(f"times must be at least 0, not {times}")
    for _ in range(times):
        x = 1 - (2 * x - 1).abs()
    return x


def tent_network(times: int) -> Layers:
    """Build the ``times``-fold tent map as a ReLU network of ``times`` layers of two units.

    Args:
        times: Number of hidden layers, at least 1.

    Returns:
        The layers, float64: one input in [0, 1], one output.

    Raises:
        ValueError: If ``times`` is below 1.

    Source:
        tent(x) = 2 relu(x) - 4 relu(x - 1/2) on [0, 1].
    """
    if times < 1:
        raise ValueError(f"times must be at least 1, not {times}")
    return folding_network(1, [2] * times, last="fold")


def folding_network(inputs: int, widths: Sequence[int], *, last: str = "cut") -> Layers:
    """Build a network whose number of linear regions is :func:`linear_regions_lower`.

    Every hidden layer but the last folds each axis of the unit cube like a paper strip, so that
    ``floor(n / inputs)`` copies of [0, 1] lie on top of each other. Whatever the last layer draws
    on the folded sheet appears on every copy.

    Args:
        inputs: Number of input features.
        widths: Units of each hidden layer, none below ``inputs``. Units left over stay silent.
        last: ``"cut"``: the last layer's hyperplanes cross the cube in general position, for one
            or two inputs. ``"fold"``: it folds like the others, and the output is the sum of the
            folded axes.

    Returns:
        The layers, float64, to be used on the unit cube [0, 1]^inputs.

    Raises:
        ValueError: If a width is below ``inputs``, ``last`` is unknown, or ``"cut"`` is asked for
            more than two inputs.

    Source:
        Montufar et al. 2014, https://arxiv.org/abs/1402.1869
    """
    widths = _widths(inputs, widths)
    if min(widths) < inputs:
        raise ValueError(f"folding needs every width >= inputs = {inputs}, not {widths}")
    if last not in ("cut", "fold"):
        raise ValueError(f"last must be 'cut' or 'fold', not {last!r}")
    if last == "cut" and inputs > 2:
        raise ValueError(f"last='cut' is built for one or two inputs, not {inputs}")
    kind: Any = {"dtype": torch.float64}
    # Reads the folded cube off the units of the layer before.
    read, shift = torch.eye(inputs, **kind), torch.zeros(inputs, **kind)
    layers: Layers = []
    folded = widths if last == "fold" else widths[:-1]
    for width in folded:
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
    if last == "fold":
        return [*layers, (read.sum(0, keepdim=True), shift.sum().expand(1))]
    normals, offsets = _general_lines(inputs, widths[-1])
    layers.append((normals @ read, normals @ shift + offsets))
    heights = torch.arange(1.0, widths[-1] + 1, **kind)[None]
    return [*layers, (heights, torch.zeros(1, **kind))]


def _general_lines(inputs: int, count: int) -> tuple[Tensor, Tensor]:
    """Return hyperplanes that cut the unit cube into as many regions as they can.

    The cell on which no unit fires lies inside the cube (if there are enough units): where it
    touched a face, the fold there would not show.
    """
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if inputs == 1:
        normals = torch.ones(count, 1, dtype=torch.float64)
        normals[0] = -1.0
        return normals, -normals[:, 0] * place
    # Tangents of a circle about the center, no two of them parallel and no three through a point;
    # two of them meet at most radius / sin(pi / 2m) = 0.45 from the center.
    m = count if count % 2 else count + 1
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / m + 0.1
    normals = torch.stack([angle.cos(), angle.sin()], 1)
    return normals, -normals.sum(1) / 2 - 0.45 * math.sin(math.pi / (2 * m))


def interpolating_network(knots: Tensor, values: Tensor) -> Layers:
    """Build the ReLU network with one hidden layer that joins points by straight lines.

    Args:
        knots: Places in rising order, shape (n,), n >= 2.
        values: Heights there, shape (n,).

    Returns:
        The layers, float64: one input, ``n - 1`` hidden units, one output. Right of the last knot
        the last line goes on; left of the first the network is constant.

    Raises:
        ValueError: If the shapes do not fit, the knots do not rise, or a number is not finite.

    Example:
        >>> layers = interpolating_network(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1, 0]))
        >>> apply_layers(layers, torch.tensor([[0.5], [1.0], [1.5]], dtype=torch.float64)).T
        tensor([[0.5000, 1.0000, 0.5000]], dtype=torch.float64)
    """
    knots, values = knots.double(), values.double()
    if knots.dim() != 1 or len(knots) < 2 or knots.shape != values.shape:
        raise ValueError(
            f"need knots and values of one shape (n,), n >= 2, not {tuple(knots.shape)} and "
            f"{tuple(values.shape)}"
        )
    if not (knots.isfinite().all() and values.isfinite().all()):
        raise ValueError("knots and values must be finite")
    if not (knots[1:] > knots[:-1]).all():
        raise ValueError("knots must rise strictly")
    slope = (values[1:] - values[:-1]) / (knots[1:] - knots[:-1])
    bend = torch.cat([slope[:1], slope[1:] - slope[:-1]])
    return [(torch.ones(len(bend), 1).double(), -knots[:-1]), (bend[None], values[:1])]


def grid_interpolant(
    function: Callable[[Tensor], Tensor], cells: int, dimension: int
) -> Callable[[Tensor], Tensor]:
    """Interpolate a function of several variables on a grid of the unit cube, by ReLUs alone.

    Each cube of the grid is cut into simplices (Kuhn's triangulation). The hat function of a grid
    point, 1 there and 0 at all others, is ``relu(1 + min(0, u) - max(0, u))`` with u the
    distances to it in grid steps; minimum and maximum of two numbers are
    ``a - relu(a - b)`` and ``b + relu(a - b)``.

    Args:
        function: Maps (n, dimension) to (n,).
        cells: Cubes along each axis, at least 1.
        dimension: Number of variables, at least 1.

    Returns:
        The interpolant, which maps (n, dimension) in [0, 1] to (n,).

    Raises:
        ValueError: If ``cells`` or ``dimension`` is below 1.
    """
    if cells < 1 or dimension < 1:
        raise ValueError(f"need cells >= 1 and dimension >= 1, not {cells} and {dimension}")
    axis = torch.arange(cells + 1, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * dimension).view(-1, dimension)
    values = function(points / cells)

    def interpolant(x: Tensor) -> Tensor:
        u = (x.double() * cells)[:, None, :] - points
        least = greatest = torch.zeros_like(u[..., 0])
        for k in range(dimension):
            least = least - torch.relu(least - u[..., k])
            greatest = greatest + torch.relu(u[..., k] - greatest)
        return torch.relu(1 + least - greatest) @ values

    return interpolant


def interpolation_error_bound(curvature: float, spacing: float, dimension: int = 1) -> float:
    """Return how far a function can be from its piecewise-linear interpolant.

    Args:
        curvature: Largest second derivative in size (in any direction).
        spacing: Distance of neighboring knots, or of grid points along an axis.
        dimension: Number of variables.

    Returns:
        ``curvature * dimension * spacing^2 / 8``.

    Raises:
        ValueError: If an argument is negative or not finite, or ``dimension`` is below 1.

    Source:
        Let c be the center and R the radius of a ball about a simplex and M the curvature. Then
        ``error + M/2 |x - c|^2`` is convex and at most M/2 R^2 at the corners, hence everywhere. A
        grid cube fits into a ball of R = spacing sqrt(dimension) / 2.
    """
    if not (0 <= curvature < math.inf and 0 <= spacing < math.inf) or dimension < 1:
        raise ValueError(
            "need finite curvature >= 0 and spacing >= 0 and dimension >= 1, not "
            f"{curvature!r}, {spacing!r} and {dimension}"
        )
    return curvature * dimension * spacing**2 / 8
