import math

import matplotlib.pyplot as plt
import pytest
import torch

from relubook.chapters.theory import (
    apply_layers,
    draw_regions,
    hyperplane_regions,
    interpolation_error_bound,
    interpolation_misses,
    layers_of,
    linear_regions_upper,
    member_regions,
    plane_regions,
    region_counts,
)
from relubook.training.recipe import Recipe


@pytest.mark.parametrize("units", [1, 2, 7, 64])
def test_a_parabola_is_missed_by_its_bound(units):
    """Its second derivative is 2 everywhere, so the error in the middles is the bound."""
    misses = interpolation_misses(lambda x: (x - 0.3) ** 2, -1, 2, units)
    assert misses.between == pytest.approx(interpolation_error_bound(2, 3 / units))
    assert misses.knots < 1e-13


def test_a_straight_line_is_not_missed():
    misses = interpolation_misses(lambda x: 3 * x - 1, -2, 5, 9)
    assert max(misses) < 1e-13


def test_misses_between_knots_are_seen_at_the_points_asked_for():
    # One point inside is the middle; two are at thirds, where x^2 is off by (1/3) (2/3).
    assert interpolation_misses(torch.square, 0, 1, 1, inside=1).between == pytest.approx(1 / 4)
    assert interpolation_misses(torch.square, 0, 1, 1, inside=2).between == pytest.approx(2 / 9)


def test_regions_of_a_member_are_those_of_the_single_network():
    recipe = Recipe(2, (5, 4), 1, initializer="torch")
    stack = recipe.stack([3, 11], dtype=torch.float64)
    counts = region_counts(stack, low=-20, high=20)
    for place, seed in enumerate((3, 11)):
        layers = layers_of(recipe.single(seed, dtype=torch.float64))
        want = plane_regions(layers, low=-20, high=20)
        found = member_regions(stack, place, low=-20, high=20)
        assert len(want) == len(found) == counts[place].item()
        for region, other in zip(want, found, strict=True):
            assert torch.equal(region.corners, other.corners)
            middle = region.corners.mean(0)
            torch.testing.assert_close(
                other.weight @ middle + other.bias, apply_layers(layers, middle)
            )
        assert sum(region.area for region in found) == pytest.approx(1600)


def test_counts_stay_below_what_is_possible():
    for widths in ((6,), (4, 4)):
        counts = region_counts(Recipe(2, widths, 1, initializer="torch").stack(5), low=-9, high=9)
        assert counts.dtype == torch.float64
        assert (counts >= 1).all()
        assert counts.max() <= linear_regions_upper(2, widths)
    lines = region_counts(Recipe(2, (6,), 1, initializer="torch").stack(5), low=-1e4, high=1e4)
    # Six lines in general position that all cross inside the square.
    assert lines.max() == hyperplane_regions(6, 2)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="Tanh"):
        region_counts(Recipe(2, (4,), 1, activation="tanh").stack(2))


def test_drawing_shows_every_region_and_the_whole_square():
    regions = member_regions(Recipe(2, (12,), 1, initializer="torch").stack(1), 0, low=-2, high=1)
    figure, axes = plt.subplots()
    draw_regions(axes, regions)
    (collection,) = axes.collections
    assert len(collection.get_paths()) == len(regions) > 9
    assert axes.get_xlim() == axes.get_ylim() == (-2, 1)
    assert list(axes.get_xticks()) == [-2, -0.5, 1]
    colors = {tuple(color) for color in collection.get_facecolors()}
    assert len(colors) == 9
    assert math.isclose(axes.get_aspect(), 1)
    plt.close(figure)
