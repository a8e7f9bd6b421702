import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from relubook.chapters.kinks import (
    Slopes,
    chosen_at_zero,
    collapses,
    constant_at_zero,
    exact_zeros,
    gradient_changes,
    kinks,
    normalized_zeros,
    slopes_at,
    structural_zeros,
    train_choices,
)
from relubook.evidence.data import dataset
from relubook.layers.activations import relu_with_derivative_at_zero
from relubook.training.recipe import Recipe

NARROW = Recipe(1, 2, 1, hidden=5)
LINE = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("function", "point", "want"),
    [
        (torch.relu, 0, (0, 1, 0)),
        (torch.relu, 1, (1, 1, 1)),
        (torch.abs, 0, (-1, 1, 0)),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), 0, (0, 1, 0.5)),
        (lambda x: x.clamp(min=0), 0, (0, 1, 1)),
        (lambda x: -3 * torch.relu(x - 2), 2, (0, -3, 0)),
    ],
)
def test_slopes(function, point, want):
    assert slopes_at(function, point) == want


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_least_is_the_shortest_number_between_the_slopes(left, right):
    least = Slopes(left, right, 0.0).least
    low, high = sorted((left, right))
    between = torch.linspace(low, high, 101, dtype=torch.float64)
    assert low <= least <= high or least == 0
    assert abs(least) <= between.abs().min() + 1e-9


def test_one_sided_and_kink():
    assert Slopes(0.0, 1.0, 1.0).is_one_sided
    assert not Slopes(0.0, 1.0, 0.5).is_one_sided
    assert not Slopes(0.0, 1.0, math.nan).is_one_sided
    assert Slopes(0.0, 1.0, 0.0).is_kink
    assert not Slopes(1.0, 1.0, 1.0).is_kink


def test_every_function_of_the_list_is_finite_at_its_point():
    for name, (function, point) in kinks().items():
        slopes = slopes_at(function, point)
        assert all(map(math.isfinite, slopes[:2])), name
        assert math.isfinite(slopes.returned) == (name != "sqrt(x * x)"), name


def test_spellings_of_relu_are_relu():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for name, (function, _) in kinks().items():
        if name.startswith(("clamp", "maximum", "where", "stack", "(x", "threshold")):
            assert torch.equal(function(x), torch.relu(x)), name


def test_zeros_by_rounding_are_counted_and_told_from_exact_ones():
    x = torch.zeros(4, 16, dtype=torch.float16)
    count = exact_zeros(x, [0, 1], one_sum=True, width=64, bias=0.0)
    assert count.share.tolist() == [1.0, 1.0]
    assert count.rounded.tolist() == [0.0, 0.0]
    x = torch.rand(300, 64, generator=torch.Generator().manual_seed(0))
    coarse = exact_zeros(x.bfloat16(), [0], one_sum=False)
    assert 0 < coarse.share < 1e-3 < coarse.rounded
    assert exact_zeros(x.double(), [0], one_sum=True).share == 0


def test_zeros_behind_normalization():
    x = torch.rand(100, 8, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(8, (16, 16), 2, normalization="batch")
    coarse = normalized_zeros(recipe, x.bfloat16(), 3)
    assert coarse.shape == (3,)
    assert (coarse > 0).all()
    assert (normalized_zeros(recipe, x.double(), 3) == 0).all()


def test_zeros_behind_silence_equal_a_count_by_hand():
    recipe, x = Recipe(2, (2, 2, 2), 1), torch.randn(50, 2, dtype=torch.float64)
    count = structural_zeros(recipe, x, [7])
    net = recipe.single(7, dtype=torch.float64)
    h, zeros = x, []
    with torch.no_grad():
        for layer in (1, 2, 3):
            z = net.get_submodule(f"linear{layer}")(h)
            zeros.append((z == 0).double().mean())
            h = torch.relu(z)
    assert count.share.item() == pytest.approx((zeros[1] + zeros[2]).item() / 2)
    assert count.rounded.nan_to_num().item() == 0


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_constant_rule_ignores_the_incoming_gradient(value):
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    at_zero = torch.tensor(value, dtype=torch.float64)
    incoming = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64)
    (wrong,) = torch.autograd.grad(constant_at_zero(x, at_zero), x, incoming)
    assert wrong.tolist() == [0.0, value, 7.0]
    (right,) = torch.autograd.grad(relu_with_derivative_at_zero(x, value), x, incoming)
    assert right.tolist() == [0.0, 5 * value, 7.0]


def test_choices_share_starts_and_differ_in_the_value_alone():
    stack = chosen_at_zero(NARROW, [4, 5], (0, 1), dtype=torch.float64)
    weights = stack.parameter_vectors()
    assert torch.equal(weights[:2], weights[2:])
    outputs = stack(LINE)
    assert torch.equal(outputs[:2], outputs[2:])


def test_gradient_changes_where_a_layer_is_silent():
    recipe = Recipe(1, 8, 1, hidden=2)
    silent = torch.zeros(4, 1, dtype=torch.float64)
    assert gradient_changes(NARROW, LINE, lambda o: ((o - 1) ** 2).sum(), 30).any()
    # With zero inputs all is 0, the outputs too, so their squares send no gradient back.
    assert not gradient_changes(recipe, silent, lambda o: (o**2).sum(), 5).any()
    assert gradient_changes(recipe, silent, lambda o: o.sum(), 5).all()


def test_trained_choices_with_zero_are_torchs_relu():
    data = dataset("digits", standardize=False)
    recipe = Recipe(64, 8, 10, hidden=1)
    settings = {"lr": 0.1, "steps": 30, "batch_size": 32}
    accuracy, differs = train_choices(recipe, data, 2, **settings)
    plain, _ = train_choices(
        recipe, data, 2, values=(0,), rule=lambda x, value: F.relu(x), **settings
    )
    assert accuracy.shape == (3, 2)
    assert torch.equal(accuracy[0], plain[0])
    assert differs.shape == (2,)
    assert accuracy.min() > 0.2


def test_collapse_is_a_constant_output():
    y = LINE.abs()
    constant = collapses(NARROW, LINE, y, 40, lr=0.01, steps=5)
    assert constant.shape == (2, 40)
    assert 0 < constant.double().mean() < 1
    assert not collapses(Recipe(1, 64, 1, hidden=1), LINE, y, 3, lr=0.01, steps=5).any()
