"""Born dead: closed forms against each other, against exact cases and against simulation."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from relubook.chapters.born_dead import (
    CASES,
    DEPTHS,
    born_dead,
    collapse,
    dead_shares,
    death_layers,
    lower_bound,
    two_wide,
    upper_bound,
    width_needed,
)
from relubook.training.recipe import Recipe

HALF_LINES = torch.tensor([[1.0], [-1.0]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(2, 10_000))
def test_bounds_are_ordered_probabilities(width, depth):
    low, high = lower_bound(width, depth), upper_bound(width, depth)
    assert 0 <= low <= high + 1e-12 <= 1 + 1e-12


@given(st.integers(1, 30), st.integers(2, 1000))
def test_bounds_grow_with_depth_and_fall_with_width(width, depth):
    for bound in (lower_bound, upper_bound):
        assert bound(width, depth + 1) >= bound(width, depth) - 1e-12
        assert bound(width + 1, depth) <= bound(width, depth) + 1e-12


@given(st.integers(1, 30))
def test_upper_bound_is_the_geometric_law(width):
    for depth in (2, 3, 10, 50):
        law = stats.geom.cdf(depth - 1, 2.0**-width)
        assert upper_bound(width, depth) == pytest.approx(law, rel=1e-9)


@pytest.mark.parametrize("width", range(1, 12))
def test_lower_bound_is_exact_for_depths_two_and_three(width):
    q = 2.0**-width
    assert lower_bound(width, 2) == pytest.approx(0, abs=1e-12)
    # Both half-lines, disjoint units: independent fair coins in the second layer.
    exact = 2 * q * q + (1 - 2 * q) * q * q
    assert lower_bound(width, 3) == pytest.approx(exact, rel=1e-6)


def test_lower_bound_is_the_published_formula():
    for width in (2, 3, 5, 10):
        for depth in (2, 3, 5, 10, 50):
            a1 = 1 - 2**-width
            a2 = 1 - 2 ** (1 - width) - (width - 1) * 4**-width
            share = (1 - 2 ** (1 - width)) * (1 - 2**-width) / (1 + (width - 1) * 2**-width)
            published = 1 - a1 ** (depth - 2) + share * (a2 ** (depth - 2) - a1 ** (depth - 2))
            assert lower_bound(width, depth) == pytest.approx(published, abs=1e-12)


def test_width_one_is_exact():
    for depth in (2, 3, 7):
        assert lower_bound(1, depth) == pytest.approx(1 - 0.5 ** (depth - 2))


def test_two_wide_has_its_closed_values():
    # Depth 4: the nine living pairs of patterns behind the second layer, each 1/16.
    def mean(density):
        return integrate.quad(lambda t: (0.5 - t / 4) ** 2 * density(t), 0, 1)[0]

    pairs = 2 / 4 + 2 / 16 + 4 * mean(lambda t: 1) + mean(lambda t: 2 * (1 - t))
    both = 0.5 * (0.75**2 * 0.5 + pairs / 16)
    exact = 1 - 2 * 0.75**3 + both
    values = two_wide([2, 3, 4])
    assert values.tolist() == pytest.approx([0, 5 / 32, exact], abs=5e-5)


def test_two_wide_lies_between_the_bounds_and_does_not_hang_on_the_grid():
    depths = [2, 3, 4, 6, 10, 20, 50]
    values = two_wide(depths)
    for depth, value in zip(depths, values.tolist(), strict=True):
        assert lower_bound(2, depth) - 1e-6 <= value <= upper_bound(2, depth) + 1e-6
    torch.testing.assert_close(values, two_wide(depths, nodes=65, points=16), atol=2e-4, rtol=0)


def test_simulation_agrees_with_the_exact_values():
    n, depths = 20_000, [3, 4, 6, 10]
    first, each = death_layers(HALF_LINES, 2, 9, n, generator=generator())
    for depth, exact in zip(depths, two_wide(depths).tolist(), strict=True):
        dead = int(((first > 0) & (first < depth)).sum())
        assert stats.binomtest(dead, n, exact).pvalue > 1e-4
        ray = int(((each[:, 1] > 0) & (each[:, 1] < depth)).sum())
        assert stats.binomtest(ray, n, upper_bound(2, depth)).pvalue > 1e-4


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 4), st.integers(0, 1000))
def test_the_network_dies_with_its_last_input(width, layers, features, seed):
    x = torch.randn(5, features, generator=generator(seed))
    first, each = death_layers(x, width, layers, 40, generator=generator(seed))
    last = torch.where((each == 0).any(1), 0, each.max(1).values)
    assert torch.equal(first, last)


def test_with_biases_a_silent_input_comes_back_but_a_dead_layer_counts():
    x = torch.linspace(-1.7, 1.7, 33)[:, None]
    first, each = death_layers(x, 2, 30, 2000, bias=1.0, generator=generator())
    for depth in (2, 5, 31):
        dead = int(((first > 0) & (first < depth)).sum())
        assert dead / 2000 <= upper_bound(2, depth) + 0.03
        one = int(((each[:, 0] > 0) & (each[:, 0] < depth)).sum())
        assert stats.binomtest(one, 2000, upper_bound(2, depth)).pvalue > 1e-4


def test_a_bias_as_large_as_the_weights_kills_a_sixth_of_the_first_layer():
    x = torch.tensor([[-math.sqrt(3)], [math.sqrt(3)]])
    first, _ = death_layers(x, 1, 1, 20_000, bias=1.0, generator=generator())
    assert stats.binomtest(int((first == 1).sum()), 20_000, 1 / 6).pvalue > 1e-4


@pytest.mark.parametrize("depth", [2, 5, 50])
def test_width_needed_is_the_first_that_does(depth):
    for bound in (upper_bound, lower_bound):
        width = width_needed(depth, 0.01, bound=bound)
        assert bound(width, depth) <= 0.01
        assert width == 1 or bound(width - 1, depth) > 0.01


def test_dead_shares_are_those_of_the_single_networks():
    stack = Recipe(3, 6, 2, hidden=3, initializer="torch").stack([4, 9])
    x = torch.randn(20, 3, generator=generator())
    dead = dead_shares(stack, x)
    assert dead.shape == (2, 3)
    assert dead.any()
    for member in range(2):
        net, h = stack.member(member), x
        for layer in range(1, 4):
            h = getattr(net, f"linear{layer}")(h).relu()
            assert dead[member, layer - 1] == (h == 0).all(0).float().mean()


def test_overflow_is_not_death():
    recipe = Recipe(2, 4, 1, hidden=2, initializer="uniform", initializer_options={"bound": 1e30})
    dead = dead_shares(recipe.stack(3), torch.ones(2, 2))
    assert dead[:, 0].isfinite().all()
    assert dead[:, 1].isnan().all()


def test_the_stored_table_counts_blocks():
    counts = born_dead.measure((2,), [0, 1])
    assert set(counts) == {f"{name} {depth}" for name in ("both", "ray") for depth in DEPTHS}
    assert counts["both 2"] == [0, 0]
    assert all(140 < count < 175 for count in counts["both 3"])
    for a, b in itertools.pairwise(DEPTHS):
        assert counts[f"both {a}"][0] <= counts[f"both {b}"][0] <= counts[f"ray {b}"][0]


@pytest.mark.slow
def test_a_network_born_dead_stays_dead():
    case = next(iter(CASES))
    result = collapse.measure((case, 0.01), range(20))
    born, end = (torch.tensor(result[name]).bool() for name in ("born", "collapsed"))
    assert born.any()
    assert (end | ~born).all()
