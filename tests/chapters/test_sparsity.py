import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from relubook.chapters.sparsity import (
    Learned,
    accuracy,
    break_even,
    features_found,
    hidden_outputs,
    k_winners,
    kernel_speeds,
    mean_correlation,
    skip_zeros,
    sparse_mixtures,
    taught,
    train_at_best_rate,
    unit_kinds,
    with_zeros,
)
from relubook.evidence.statistics import Estimate
from relubook.training.recipe import Recipe
from relubook.training.train import train

RECIPE = Recipe(4, (6,), 3)
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["relu", "sigmoid", "leaky_relu"])
def test_hidden_outputs_are_those_of_the_members(name):
    stack = Recipe(4, (6, 5), 3, activation=name).stack(3)
    outputs = hidden_outputs(stack, X)
    assert outputs.shape == (3, 40, 11)
    assert not outputs.requires_grad
    for place in range(3):
        net = stack.member(place)
        first = net[:2](X)
        both = torch.cat([first, net[2:4](first)], 1)
        torch.testing.assert_close(outputs[place], both)


def test_kinds_of_units_by_hand():
    h = torch.zeros(200, 4)
    h[0, 1] = 1  # rare
    h[:100, 2] = 1  # ordinary
    h[:, 3] = 1  # always on
    kinds = unit_kinds(torch.stack([h, torch.ones_like(h)]))
    assert kinds.silent.tolist() == pytest.approx([1 - 301 / 800, 0])
    assert kinds.dead.tolist() == [0.25, 0]
    assert kinds.rare.tolist() == [0.25, 0]
    assert kinds.always_on.tolist() == [0.25, 1]
    assert kinds.least_on.tolist() == [0.25, 1]
    assert kinds.most_on.tolist() == [0.75, 1]
    assert unit_kinds(h, rare=0.0).rare == 0
    assert unit_kinds(h, rare=0.6).rare == 0.5


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=30)
def test_kinds_are_consistent(n, units, seed):
    h = torch.randn(n, units, generator=torch.Generator().manual_seed(seed)).relu()
    kinds = unit_kinds(h, rare=0.5)
    assert kinds.dead + kinds.rare + kinds.always_on <= 1 + 1e-12
    assert kinds.dead <= kinds.silent + 1e-12
    assert kinds.silent <= 1 - kinds.always_on + 1e-12
    assert kinds.least_on <= 1 - kinds.silent + 1e-12
    assert 1 - kinds.silent <= kinds.most_on + 1e-12
    mirrored = unit_kinds(h.flip(0).flip(1), rare=0.5)
    torch.testing.assert_close(torch.stack(list(mirrored)), torch.stack(list(kinds)))


def test_kinds_refuse_networks_that_overflowed():
    with pytest.raises(ValueError, match="1 non-finite"):
        unit_kinds(torch.tensor([[1.0, math.nan]]))


def test_correlation_is_that_of_corrcoef():
    h = torch.randn(2, 50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean_correlation(h)
    for place in range(2):
        matrix = torch.corrcoef(h[place].T).abs()
        assert found[place].item() == pytest.approx((matrix.sum() - 5).item() / 20)
    # A constant unit counts for nothing, scale and sign neither.
    more = torch.cat([-3 * h, torch.ones(2, 50, 1, dtype=torch.float64)], 2)
    torch.testing.assert_close(mean_correlation(more), found)
    assert mean_correlation(torch.ones(10, 3)).isnan()


@given(st.integers(1, 8), st.integers(0, 2**32))
@settings(max_examples=30)
def test_winners_are_the_largest(k, seed):
    z = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z.requires_grad_()
    h = k_winners(k)(z)
    want = torch.zeros_like(h)
    for row, out in zip(z, want, strict=True):
        for place in sorted(range(8), key=lambda i: -row[i].item())[:k]:
            out[place] = max(0.0, row[place].item())
    assert torch.equal(h, want)
    h.sum().backward()
    assert torch.equal(z.grad, (want > 0).double())


def test_all_winners_are_relu():
    z = torch.linspace(-1, 1, 6).repeat(3, 1)
    assert torch.equal(k_winners(6)(z), torch.relu(z))


def test_learned_is_the_first_look_that_found_it():
    easy = (X[:, 0] > 0).long()
    looks = Learned(X, easy, 0.9, every=10)
    train(RECIPE.stack(3), X, easy, lr=0.03, batch_size=10, steps=60, each_step=looks)
    for place, step in enumerate(looks.steps.int().tolist()):
        assert 10 <= step < 60
        for steps in range(10, step + 1, 10):
            short = RECIPE.stack(3)
            train(short, X, easy, lr=0.03, batch_size=10, steps=steps)
            assert (accuracy(short, X, easy)[place] >= 0.9) == (steps == step)
    never = Learned(X, Y, 1.0)
    train(RECIPE.stack(2), X, Y, lr=0.01, steps=10, each_step=never)
    assert never.steps.isnan().all()


def test_taught_are_the_units_that_get_a_gradient():
    stack = RECIPE.stack(2)
    found = taught(stack, X, Y)
    for member in range(2):
        net = stack.member(member)
        for row in range(5):
            z = net[0](X[row : row + 1]).detach().requires_grad_()
            F.cross_entropy(net[1:](z), Y[row : row + 1]).backward()
            assert torch.equal(found[member, row], z.grad[0] != 0)
    assert not (found & (hidden_outputs(stack, X) == 0)).any()
    straight = Recipe(4, 6, 3, activation=lambda z: z + (torch.relu(z) - z).detach()).stack(2)
    assert taught(straight, X, Y).all()
    assert torch.equal(hidden_outputs(straight, X) > 0, hidden_outputs(stack, X) > 0)


def test_the_best_rate_trains_anew():
    targets = X[:, :3].abs()
    setting = {"steps": 30, "batch_size": 10}
    rates = (1e-5, 1e-3, 0.02, 1.0, 30.0)
    run = train_at_best_rate(
        RECIPE, X, targets, rates, validation=(X, targets), tuning_seeds=[7, 8], seeds=2, **setting
    )
    again = RECIPE.stack(2)
    train(again, X, targets, lr=run.lr[0].item(), **setting)
    torch.testing.assert_close(run.network.parameter_vectors(), again.parameter_vectors())
    losses = []
    for lr in rates:
        loss = train(RECIPE.stack([7, 8]), X, targets, lr=lr, **setting).loss[-1].mean()
        losses.append(loss.nan_to_num(math.inf))
    assert run.lr[0] == rates[torch.stack(losses).argmin()]


def test_mixtures_are_sums_of_their_features():
    x, strength = sparse_mixtures(500, features=12, inputs=5, probability=0.2, seed=3)
    assert x.shape == (500, 5)
    assert strength.shape == (500, 12)
    assert x.std().item() == pytest.approx(1)
    assert (strength > 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    directions = torch.linalg.lstsq(strength, x).solution
    torch.testing.assert_close(strength @ directions, x, atol=1e-4, rtol=0)
    norms = directions.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(12))
    again, _ = sparse_mixtures(500, features=12, inputs=5, probability=0.2, seed=3)
    assert torch.equal(again, x)


def test_features_are_found_where_units_hold_them():
    _, strength = sparse_mixtures(400, features=6, inputs=4, probability=0.3, seed=0)
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    shuffled = -2 * strength.flip(1) + 1
    found = features_found(torch.stack([shuffled, noise]), strength)
    assert found[0].item() == pytest.approx(1, abs=1e-5)
    assert found[1] < 0.2
    half = torch.cat([strength[:, :3], torch.ones(400, 1)], 1)
    want = [torch.corrcoef(torch.cat([half[:, :3], s[:, None]], 1).T) for s in strength.T]
    best = torch.stack([c[3, :3].abs().amax() for c in want]).mean()
    torch.testing.assert_close(features_found(half, strength), best)


@given(st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=30)
def test_skipping_zeros_changes_nothing(share, seed):
    generator = torch.Generator().manual_seed(seed)
    h = with_zeros(1, 20, share, generator)[0].double()
    weight = torch.randn(20, 7, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(skip_zeros(h, weight), h @ weight)


def test_zeros_come_in_the_share_asked_for():
    generator = torch.Generator().manual_seed(0)
    assert with_zeros(3, 5, 1, generator).eq(0).all()
    assert with_zeros(3, 5, 0, generator).shape == (3, 5)
    assert with_zeros(100, 100, 0.8, generator).eq(0).float().mean() == pytest.approx(0.8, abs=0.02)


def test_kernels_are_timed_against_the_ordinary_one():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    speeds = kernel_speeds(weight, 0.9, rows=4, repeats=6, generator=generator)
    assert all(0 < speed.value < math.inf for speed in speeds)
    assert {speed.n for speed in speeds} == {6}


def at(value):
    return Estimate(value, value, value, 30, 0.95)


@given(st.floats(0.01, 0.98), st.floats(0.5, 3))
def test_break_even_of_a_power_law(even, power):
    """Speed ((1 - even) / (1 - share))^power is a straight line on these axes."""
    shares = (0.0, 0.5, 0.9, 0.99)
    speeds = {s: at(((1 - even) / (1 - s)) ** power) for s in shares}
    assert break_even(speeds) == pytest.approx(even, abs=1e-6)


def test_break_even_needs_a_crossing():
    assert math.isnan(break_even({0.1: at(0.5), 0.9: at(0.8)}))
    assert math.isnan(break_even({0.1: at(1.5), 0.9: at(2.8)}))
