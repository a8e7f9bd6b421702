"""Counts against brute force and closed forms, constructions against what they promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relubook.chapters.theory import (
    apply_layers,
    folding_network,
    grid_interpolant,
    hyperplane_regions,
    interpolating_network,
    interpolation_error_bound,
    layers_of,
    line_pieces,
    linear_regions_lower,
    linear_regions_upper,
    plane_regions,
    tent_network,
)
from relubook.training.recipe import Recipe

SEEDS = range(6)


def random_network(seed, inputs=2, widths=(6, 5), outputs=1):
    return Recipe(inputs, widths, outputs, bias=(-1.0, 1.0)).single(seed, dtype=torch.float64)


def tent_map(x, times):
    for _ in range(times):
        x = 1 - (2 * x - 1).abs()
    return x


def patterns(layers, x):
    fires = []
    for weight, bias in layers[:-1]:
        z = x @ weight.T + bias
        fires.append(z > 0)
        x = torch.relu(z)
    return torch.cat(fires, dim=-1)


class TestLayers:
    def test_layers_compute_what_the_module_computes(self):
        module = random_network(0)
        x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)).double()
        torch.testing.assert_close(apply_layers(layers_of(module), x), module(x))

    def test_missing_bias_is_zero(self):
        module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
        assert torch.equal(layers_of(module)[0][1], torch.zeros(3).double())

    def test_copies_are_independent(self):
        module = random_network(0)
        layers_of(module)[0][0].zero_()
        assert module[0].weight.abs().sum() > 0

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), "child 1 is Tanh"),
            (nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(2, 1)), "child 0 is ReLU"),
        ],
    )
    def test_other_modules_are_refused(self, module, message):
        with pytest.raises(ValueError, match=message):
            layers_of(module)


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


class TestLinePieces:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_affine_between_breakpoints_and_bent_at_each(self, seed):
        layers = layers_of(random_network(seed, inputs=1, widths=(7, 6, 5)))
        knots = line_pieces(layers, -3.0, 3.0)
        ends = torch.cat([torch.tensor([-3.0]).double(), knots, torch.tensor([3.0]).double()])
        values = apply_layers(layers, ends[:, None])
        middle = (ends[:-1] + ends[1:]) / 2
        expected = (values[:-1] + values[1:]) / 2
        torch.testing.assert_close(apply_layers(layers, middle[:, None]), expected)
        slope = (values[1:] - values[:-1]).squeeze(1) / (ends[1:] - ends[:-1])
        assert ((slope[1:] - slope[:-1]).abs() > 1e-9).all()
        assert len(knots) > 3

    @pytest.mark.parametrize("seed", SEEDS)
    def test_finds_every_bend_that_a_fine_grid_shows(self, seed):
        layers = layers_of(random_network(seed, inputs=1, widths=(5, 4)))
        knots = line_pieces(layers, -2.0, 2.0)
        t = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
        fires = patterns(layers, t[:, None])
        switches = (t[:-1] + t[1:])[(fires[1:] != fires[:-1]).any(1)] / 2
        assert all((switches - knot).abs().min() < 2e-4 for knot in knots)

    def test_a_dead_unit_bends_nothing(self):
        layers = [(torch.ones(2, 1), torch.tensor([0.0, -9.0])), (torch.ones(1, 2), torch.zeros(1))]
        assert line_pieces(layers, -1.0, 1.0).tolist() == [0.0]

    def test_a_unit_without_successor_bends_nothing(self):
        layers = [(torch.ones(1, 1), torch.zeros(1)), (torch.zeros(1, 1), torch.zeros(1))]
        assert len(line_pieces(layers, -1.0, 1.0)) == 0


class TestPlaneRegions:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_regions_fill_the_square_and_hold_one_pattern_and_one_map(self, seed):
        layers = layers_of(random_network(seed, outputs=2))
        regions = plane_regions(layers, low=-2.0, high=2.0)
        assert sum(r.area for r in regions) == pytest.approx(16)
        for r in regions:
            center = r.corners.mean(0)
            inner = 0.999 * r.corners + 0.001 * center
            assert (patterns(layers, inner) == r.pattern).all()
            torch.testing.assert_close(inner @ r.weight.T + r.bias, apply_layers(layers, inner))
        assert len({tuple(r.pattern.tolist()) for r in regions}) <= len(regions)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_finds_every_pattern_that_a_fine_grid_shows(self, seed):
        layers = layers_of(random_network(seed))
        t = torch.linspace(-2, 2, 301, dtype=torch.float64)
        seen = patterns(layers, torch.cartesian_prod(t, t)).unique(dim=0)
        found = torch.stack([r.pattern for r in plane_regions(layers, low=-2.0, high=2.0)])
        assert len(found.unique(dim=0)) >= len(seen)
        both = torch.cat([found, seen]).unique(dim=0)
        assert len(both) == len(found.unique(dim=0))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_one_layer_in_a_large_square_reaches_the_closed_form(self, seed):
        layers = layers_of(random_network(seed, widths=(7,)))
        assert len(plane_regions(layers, low=-1e6, high=1e6)) == hyperplane_regions(7, 2)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_no_network_exceeds_the_upper_bound(self, seed):
        regions = plane_regions(layers_of(random_network(seed)), low=-20.0, high=20.0)
        assert len(regions) <= linear_regions_upper(2, (6, 5))

    def test_lines_through_corners_make_no_slivers(self):
        layers = [
            (torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.zeros(2)),
            (torch.ones(1, 2),) * 2,
        ]
        layers[1] = (torch.ones(1, 2), torch.zeros(1))
        assert [r.area for r in plane_regions(layers)] == pytest.approx([1.0] * 4)


class TestFolding:
    @pytest.mark.parametrize("times", [1, 2, 7, 12])
    def test_tent_network_is_the_tent_map_with_2_to_the_k_pieces(self, times):
        x = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)).double()
        layers = tent_network(times)
        torch.testing.assert_close(apply_layers(layers, x), tent_map(x, times))
        knots = line_pieces(layers, 0.0, 1.0)
        assert torch.equal(knots, torch.arange(1, 2**times).double() / 2**times)

    @pytest.mark.parametrize("widths", [(1,), (4,), (3, 5), (2, 3, 4), (3, 4, 5)])
    def test_lower_bound_is_reached_on_a_line(self, widths):
        pieces = len(line_pieces(folding_network(1, widths), 0.0, 1.0)) + 1
        if widths[-1] > 1:
            assert pieces == linear_regions_lower(1, widths)

    @pytest.mark.parametrize("widths", [(3,), (8,), (11,), (4, 3), (4, 4), (7, 5), (4, 5, 3)])
    def test_lower_bound_is_reached_in_the_plane(self, widths):
        regions = plane_regions(folding_network(2, widths), low=0.0, high=1.0)
        expected = linear_regions_lower(2, widths)
        assert len(regions) == expected
        # Different linear maps, but for the cell of each copy on which no unit fires.
        maps = {tuple(torch.cat([r.weight[0], r.bias]).mul(1e6).round().tolist()) for r in regions}
        copies = math.prod((w // 2) ** 2 for w in widths[:-1])
        assert len(maps) == expected - copies + 1

    def test_folding_works_in_three_dimensions(self):
        x = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)).double()
        got = apply_layers(folding_network(3, (6, 6), last="fold"), x)
        torch.testing.assert_close(got, tent_map(x, 2).sum(1, keepdim=True))


class TestInterpolation:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(-10, 10), min_size=2, max_size=12), st.integers(0, 5))
    def test_equals_the_values_at_the_knots_and_lines_between(self, values, seed):
        generator = torch.Generator().manual_seed(seed)
        knots = torch.cumsum(0.1 + torch.rand(len(values), generator=generator), 0).double()
        values = torch.tensor(values, dtype=torch.float64)
        layers = interpolating_network(knots, values)
        got = apply_layers(layers, knots[:, None])[:, 0]
        torch.testing.assert_close(got, values, atol=1e-10, rtol=1e-10)
        middle = (knots[:-1] + knots[1:]) / 2
        got = apply_layers(layers, middle[:, None])[:, 0]
        torch.testing.assert_close(got, (values[:-1] + values[1:]) / 2, atol=1e-10, rtol=1e-10)

    @pytest.mark.parametrize("dimension", [1, 2, 3])
    def test_grid_interpolant_is_exact_at_grid_points_and_keeps_its_bound(self, dimension):
        # Second derivatives in any direction lie between -1 and 1 (a sum of squares, halved).
        def f(x):
            return 0.5 * (x * x).sum(1)

        cells = 4
        interpolant = grid_interpolant(f, cells, dimension)
        axis = torch.arange(cells + 1, dtype=torch.float64) / cells
        points = torch.cartesian_prod(*[axis] * dimension).view(-1, dimension)
        torch.testing.assert_close(interpolant(points), f(points))
        bound = interpolation_error_bound(1.0, 1 / cells, dimension)
        center = torch.full((1, dimension), 0.5 / cells, dtype=torch.float64)
        assert float((interpolant(center) - f(center)).abs()) == pytest.approx(bound)
        x = torch.rand(500, dimension, generator=torch.Generator().manual_seed(0)).double()
        assert (interpolant(x) - f(x)).abs().max() <= bound * (1 + 1e-12)

    def test_grid_interpolant_reproduces_linear_functions(self):
        x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).double()

        def f(x):
            return 2 * x[:, 0] - 3 * x[:, 1] + 1

        torch.testing.assert_close(grid_interpolant(f, 3, 2)(x), f(x))

    @pytest.mark.parametrize("cells", [5, 50])
    def test_a_parabola_reaches_the_bound(self, cells):
        knots = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        layers = interpolating_network(knots, knots**2)
        middle = (knots[:-1] + knots[1:]) / 2
        error = (apply_layers(layers, middle[:, None])[:, 0] - middle**2).abs().max()
        assert float(error) == pytest.approx(interpolation_error_bound(2.0, 1 / cells), rel=1e-6)
