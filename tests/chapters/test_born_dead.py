"""Born dead: bounds against each other, against exact cases and against simulation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from relubook.chapters.born_dead import lower_bound, upper_bound


def first_dead(width, layers, networks):
    """Draw networks of one input; in which layer die they, and in which falls the ray of 1?"""
    h = torch.tensor([[1.0], [-1.0]]).expand(networks, 2, 1)
    draw = torch.Generator().manual_seed(0)
    found = torch.zeros(2, networks, dtype=torch.int64)
    for layer in range(1, layers + 1):
        h = (h @ torch.randn(networks, h.shape[2], width, generator=draw)).relu()
        silent = h.amax(2) == 0
        for place, now in enumerate((silent.all(1), silent[:, 0])):
            found[place][(found[place] == 0) & now] = layer
    return found


@given(st.integers(1, 40), st.integers(2, 10_000))
def test_bounds_are_ordered_probabilities(width, depth):
    bounds = [bound(width, depth) for bound in (lower_bound, upper_bound)]
    q = 2.0**-width
    # The first layer keeps one of the rays; and the published bound.
    bounds += [1 - (1 - q) ** (depth - 2), 1 - (1 - q) ** (depth - 1)]
    for low, high in zip([0.0, *bounds], [*bounds, 1.0], strict=True):
        assert low <= high + 1e-12


@given(st.integers(1, 30), st.integers(2, 1000))
def test_bounds_grow_with_depth_and_fall_with_width(width, depth):
    for bound in (lower_bound, upper_bound):
        assert bound(width, depth + 1) >= bound(width, depth) - 1e-12
        assert bound(width + 1, depth) <= bound(width, depth) + 1e-12


@pytest.mark.parametrize("width", range(1, 12))
def test_bounds_are_exact_for_depths_two_and_three(width):
    q = 2.0**-width
    # Both half-lines, disjoint units: independent fair coins in the second layer.
    exact = 2 * q * q + (1 - 2 * q) * q * q
    for bound in (lower_bound, upper_bound):
        assert bound(width, 2) == pytest.approx(0, abs=1e-12)
        assert bound(width, 3) == pytest.approx(exact, rel=1e-6)


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
        for bound in (lower_bound, upper_bound):
            assert bound(1, depth) == pytest.approx(1 - 0.5 ** (depth - 2))


def test_simulation_agrees_with_the_exact_values_and_the_bounds():
    n = 20_000
    for width in (2, 4):
        dead, ray = first_dead(width, 9, n)
        for depth in (3, 4, 6, 10):
            gone = int(((dead > 0) & (dead < depth)).sum())
            lost = int(((ray > 0) & (ray < depth)).sum())
            assert stats.binomtest(lost, n, 1 - (1 - 2.0**-width) ** (depth - 1)).pvalue > 1e-4
            assert stats.binomtest(gone, n, lower_bound(width, depth), "less").pvalue > 1e-4
            assert stats.binomtest(gone, n, upper_bound(width, depth), "greater").pvalue > 1e-4
