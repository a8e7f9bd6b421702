"""Counts of regions against brute force and closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relubook.chapters.regions import hyperplane_regions, linear_regions_lower, plane_regions
from relubook.training.recipe import Recipe

SEEDS = range(6)


def random_network(seed, widths=(6, 5), outputs=1):
    module = Recipe(2, widths, outputs, bias=(-1.0, 1.0)).single(seed, dtype=torch.float64)
    linears = [layer for layer in module if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach(), layer.bias.detach()) for layer in linears]


def folding_network(widths):
    """Fold [0, 1] layer by layer into ``width`` copies, and cut what the last layer gets."""
    layers, read = [], torch.ones(1, 1).double()
    for k, width in enumerate(widths, 1):
        place = torch.arange(width).double() + 0.5 * (k == len(widths))
        layers.append((read.expand(width, -1), -place / width))
        read = (width * (-1) ** place * (2 - (place == 0).double()))[None]
    return [*layers, (read, torch.zeros(1).double())]


def patterns(layers, x):
    fires = []
    for weight, bias in layers[:-1]:
        z = x @ weight.T + bias
        fires.append(z > 0)
        x = torch.relu(z)
    return torch.cat(fires, dim=-1)


def apply_layers(layers, x):
    for weight, bias in layers[:-1]:
        x = torch.relu(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


def area(corners):
    x, y = corners.T
    return 0.5 * float((x * y.roll(-1) - y * x.roll(-1)).sum().abs())


def map_on(layers, corners):
    """Return the weight and bias of the network's linear map on a region."""
    weight, bias = torch.eye(2).double(), torch.zeros(2).double()
    center = corners.mean(0)
    for w, b in layers[:-1]:
        fires = (w @ (weight @ center + bias) + b > 0).double()
        weight, bias = fires[:, None] * (w @ weight), fires * (w @ bias + b)
    w, b = layers[-1]
    return w @ weight, w @ bias + b


def linear_regions_upper(inputs, widths):
    """No network exceeds it: Montufar 2017, Notes on the number of linear regions."""
    product, dimension = 1, inputs
    for width in widths:
        dimension = min(dimension, width)
        product *= hyperplane_regions(width, dimension)
    return product


class TestBounds:
    @pytest.mark.parametrize(
        ("n", "d", "expected"), [(0, 2, 1), (1, 2, 2), (3, 2, 7), (4, 2, 11), (5, 1, 6), (3, 5, 8)]
    )
    def test_hyperplane_regions(self, n, d, expected):
        assert hyperplane_regions(n, d) == expected

    @given(st.integers(1, 30), st.integers(1, 6))
    def test_one_more_hyperplane_adds_the_regions_of_its_own_space(self, n, d):
        lower = hyperplane_regions(n, d - 1) if d > 1 else 1
        assert hyperplane_regions(n + 1, d) == hyperplane_regions(n, d) + lower

    @given(st.integers(1, 3), st.lists(st.integers(3, 9), min_size=1, max_size=4))
    def test_bounds_are_in_order(self, inputs, widths):
        low, high = linear_regions_lower(inputs, widths), linear_regions_upper(inputs, widths)
        assert low <= high <= 2 ** sum(widths)
        assert (low == high) >= (len(widths) == 1)

    def test_a_narrow_layer_narrows_what_follows(self):
        assert linear_regions_upper(3, (1, 4)) == 2 * 5


class TestPlaneRegions:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_regions_fill_the_square_and_hold_one_pattern_and_one_map(self, seed):
        layers = random_network(seed, outputs=2)
        regions = plane_regions(layers, low=-2.0, high=2.0)
        assert sum(map(area, regions)) == pytest.approx(16)
        for corners in regions:
            center = corners.mean(0)
            inner = 0.999 * corners + 0.001 * center
            assert (patterns(layers, inner) == patterns(layers, center)).all()
            weight, bias = map_on(layers, corners)
            torch.testing.assert_close(inner @ weight.T + bias, apply_layers(layers, inner))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_finds_every_pattern_that_a_fine_grid_shows(self, seed):
        layers = random_network(seed)
        t = torch.linspace(-2, 2, 301, dtype=torch.float64)
        seen = patterns(layers, torch.cartesian_prod(t, t)).unique(dim=0)
        regions = plane_regions(layers, low=-2.0, high=2.0)
        found = torch.stack([patterns(layers, corners.mean(0)) for corners in regions])
        assert len(found.unique(dim=0)) >= len(seen)
        both = torch.cat([found, seen]).unique(dim=0)
        assert len(both) == len(found.unique(dim=0))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_one_layer_in_a_large_square_reaches_the_closed_form(self, seed):
        layers = random_network(seed, widths=(7,))
        assert len(plane_regions(layers, low=-1e6, high=1e6)) == hyperplane_regions(7, 2)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_no_network_exceeds_the_upper_bound(self, seed):
        regions = plane_regions(random_network(seed), low=-20.0, high=20.0)
        assert len(regions) <= linear_regions_upper(2, (6, 5))

    def test_lines_through_corners_make_no_slivers(self):
        layers = [
            (torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.zeros(2)),
            (torch.ones(1, 2),) * 2,
        ]
        layers[1] = (torch.ones(1, 2), torch.zeros(1))
        assert list(map(area, plane_regions(layers))) == pytest.approx([1.0] * 4)

    @pytest.mark.parametrize("widths", [(4, 4), (4, 5, 3)])
    def test_a_folded_line_reaches_the_lower_bound(self, widths):
        (weight, bias), *rest = folding_network(widths)
        across = torch.hstack([weight, torch.zeros_like(weight)])
        strips = plane_regions([(across, bias), *rest], low=0.0, high=1.0)
        assert len(strips) == linear_regions_lower(1, widths)
