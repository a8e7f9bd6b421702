import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from relubook.chapters import sparsity
from relubook.chapters.sparsity import (
    UnitNetworks,
    break_even,
    features_found,
    hidden_outputs,
    k_winners,
    kernel_speeds,
    mean_correlation,
    skip_zeros,
    sparse_mixtures,
    train_units,
    tune_units,
    unit_kinds,
    with_zeros,
)
from relubook.evidence.data import dataset
from relubook.evidence.statistics import Estimate
from relubook.training.stack import Recipe
from relubook.training.train import train_many

RECIPE = Recipe(4, (6,), 3)
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
PLAIN = {"seeds": 2, "lr": 0.01, "steps": 10, "batch_size": 10}


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


def test_hidden_outputs_want_plain_networks():
    for option, name in (
        ({"normalization": "batch"}, "normalization 'batch'"),
        ({"dropout": 0.5}, "dropout 0.5"),
    ):
        with pytest.raises(ValueError, match=name):
            hidden_outputs(Recipe(4, (6,), 3, **option).stack(2), X)


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


def test_kinds_refuse_what_has_none():
    with pytest.raises(ValueError, match=r"not \(5,\)"):
        unit_kinds(torch.ones(5))
    with pytest.raises(ValueError, match=r"not \(0, 5\)"):
        unit_kinds(torch.ones(0, 5))
    with pytest.raises(ValueError, match="1 non-finite"):
        unit_kinds(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="not 1.5"):
        unit_kinds(torch.ones(2, 2), rare=1.5)


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
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        k_winners(0)
    with pytest.raises(ValueError, match="7 winners.* has 6"):
        k_winners(7)(z)


@pytest.mark.parametrize(
    ("name", "unit"),
    [("relu", torch.relu), ("tanh", torch.tanh), ("leaky_relu", F.leaky_relu)],
)
def test_trained_units_are_those_of_the_books_trainer(name, unit):
    digits = dataset("digits")
    x, y = digits.train.x[:300], digits.train.y[:300]
    recipe = Recipe(64, (32,), 10, activation=name)
    setting = {"seeds": [3, 8], "lr": 0.01, "steps": 20, "batch_size": 50}
    ours = train_units(unit, recipe, x, y, **setting)
    run = train_many(recipe, x, y, **setting)
    torch.testing.assert_close(
        ours.network.parameter_vectors(), run.network.parameter_vectors(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        ours.accuracy(x, y).float(), run.accuracy[-1].float(), atol=0.01, rtol=0
    )
    assert ours.lr == 0.01
    assert ours.learned is None


def test_trained_units_on_targets_are_those_of_the_books_trainer():
    targets = X[:, :3].square()
    ours = train_units(torch.relu, RECIPE, X, targets, **PLAIN)
    run = train_many(RECIPE, X, targets, **PLAIN)
    torch.testing.assert_close(
        ours.network.parameter_vectors(), run.network.parameter_vectors(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(ours.squared_error(X, targets), run.loss[-1].float())
    assert torch.equal(ours.score(X, targets), -ours.squared_error(X, targets))


def test_a_units_own_backward_pass_is_used():
    blind = train_units(lambda z: torch.relu(z).detach(), RECIPE, X, Y, **PLAIN)
    start = RECIPE.stack(2)
    assert torch.equal(blind.network.linear1.weight, start.linear1.weight)
    assert not torch.equal(blind.network.linear2.weight, start.linear2.weight)


def test_learned_is_the_first_look_that_found_it():
    easy = (X[:, 0] > 0).long()
    setting = {"seeds": 3, "lr": 0.03, "batch_size": 10}
    long = train_units(
        torch.relu, RECIPE, X, easy, steps=60, learned_at=0.9, look_every=10, **setting
    )
    for place, step in enumerate(long.learned.int().tolist()):
        assert 10 <= step < 60
        for steps in range(10, step + 1, 10):
            short = train_units(torch.relu, RECIPE, X, easy, steps=steps, **setting)
            assert (short.accuracy(X, easy)[place] >= 0.9) == (steps == step)
    never = train_units(torch.relu, RECIPE, X, Y, learned_at=1.0, **PLAIN)
    assert never.learned.tolist() == [10, 10]


def test_taught_are_the_units_that_get_a_gradient():
    networks = UnitNetworks(RECIPE.stack(2), torch.relu)
    taught = networks.taught(X, Y)
    for member in range(2):
        net = networks.network.member(member)
        for row in range(5):
            z = net[0](X[row : row + 1]).detach().requires_grad_()
            F.cross_entropy(net[1:](z), Y[row : row + 1]).backward()
            assert torch.equal(taught[member, row], z.grad[0] != 0)
    assert not (taught & (networks.hidden(X) == 0)).any()
    through = UnitNetworks(networks.network, lambda z: z + (torch.relu(z) - z).detach())
    assert through.taught(X, Y).all()
    assert torch.equal(through.hidden(X) > 0, networks.hidden(X) > 0)


def test_networks_with_a_unit_of_ones_own_have_one_plain_layer():
    with pytest.raises(ValueError, match="has 2"):
        UnitNetworks(Recipe(4, (6, 6), 3).stack(1), torch.relu)
    with pytest.raises(ValueError, match="normalization 'layer'"):
        UnitNetworks(Recipe(4, (6,), 3, normalization="layer").stack(1), torch.relu)
    with pytest.raises(ValueError, match=r"keep the shape \(1, 1, 6\).*\(1, 1\)"):
        UnitNetworks(RECIPE.stack(1), lambda z: z.sum(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[:, :3]}, r"x must have the shape \(n, 4\), not \(40, 3\)"),
        ({"y": Y[:5]}, r"y must have the shape \(40,\), not \(5,\)"),
        ({"y": X}, r"y must have the shape \(40, 3\), not \(40, 4\)"),
        ({"y": Y + 1}, "labels of y must be in 0..2"),
        ({"x": X / 0}, "x has 160 non-finite"),
        ({"lr": 0.0}, "lr must be .* not 0.0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"look_every": 0}, "look_every must be at least 1, not 0"),
        ({"batch_size": 41}, r"batch_size must be in 1..40, not 41"),
        ({"learned_at": 1.5}, "not 1.5"),
        ({"y": X[:, :3], "learned_at": 0.5}, "learned_at .* not 0.5"),
        ({"seeds": 0}, "at least one"),
    ],
)
def test_bad_training_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        train_units(torch.relu, RECIPE, **({"x": X, "y": Y} | PLAIN | change))


def test_tuning_takes_the_best_rate_and_trains_anew():
    targets = X[:, :3].abs()
    setting = {"steps": 30, "batch_size": 10}
    rates = (1e-5, 1e-3, 0.02, 1.0, 30.0)
    tuned = tune_units(
        torch.relu, RECIPE, X, targets, rates,
        validation=(X, targets), tuning_seeds=[7, 8], seeds=2, **setting,
    )  # fmt: skip
    scores = [
        train_units(torch.relu, RECIPE, X, targets, seeds=[7, 8], lr=lr, **setting)
        .score(X, targets)
        .mean()
        for lr in rates
    ]
    assert tuned.lr == rates[torch.stack(scores).argmax()]
    again = train_units(torch.relu, RECIPE, X, targets, seeds=2, lr=tuned.lr, **setting)
    assert torch.equal(tuned.network.parameter_vectors(), again.network.parameter_vectors())


def test_tuning_seeds_choose_and_the_others_are_kept(monkeypatch):
    calls = []

    def spy(*args, seeds, lr, **settings):
        calls.append((tuple(seeds), lr))
        return train_units(*args, seeds=seeds, lr=lr, **settings)

    monkeypatch.setattr(sparsity, "train_units", spy)
    rates = (1e-6, 0.02, 1e3)
    tune_units(
        torch.relu, RECIPE, X, X[:, :3].abs(), rates,
        validation=(X, X[:, :3].abs()), tuning_seeds=[7, 8], seeds=2, steps=20, batch_size=10,
    )  # fmt: skip
    assert calls == [((7, 8), lr) for lr in rates] + [((0, 1), 0.02)]


def test_bad_tuning_is_named():
    common = {"validation": (X, Y), "seeds": 2, "steps": 5, "batch_size": 10}
    with pytest.raises(ValueError, match="ascending"):
        tune_units(torch.relu, RECIPE, X, Y, (0.1, 0.01, 1), tuning_seeds=[5], **common)
    with pytest.raises(ValueError, match=r"share \[1\]"):
        tune_units(torch.relu, RECIPE, X, Y, (0.01, 0.1, 1), tuning_seeds=[1, 5], **common)
    with pytest.raises(ValueError, match="edge of the grid"):
        tune_units(torch.relu, RECIPE, X, Y, (1e-9, 1e-8, 0.02), tuning_seeds=[5], **common)


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
    with pytest.raises(ValueError, match="probability .* not 0"):
        sparse_mixtures(5, features=2, inputs=2, probability=0, seed=0)
    with pytest.raises(ValueError, match="features must be at least 1"):
        sparse_mixtures(5, features=0, inputs=2, probability=0.1, seed=0)


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


def test_features_that_cannot_be_found_are_named():
    with pytest.raises(ValueError, match="feature 1 "):
        features_found(torch.rand(5, 2), torch.tensor([[1.0, 0.0]]) * torch.arange(5.0)[:, None])
    with pytest.raises(ValueError, match=r"\(5, features\), not \(4, 2\)"):
        features_found(torch.rand(5, 2), torch.rand(4, 2))


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
    with pytest.raises(ValueError, match="not -0.1"):
        with_zeros(3, 5, -0.1, generator)


def test_kernels_are_timed_against_the_ordinary_one():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    speeds = kernel_speeds(weight, 0.9, rows=4, repeats=3, generator=generator)
    assert all(0 < speed.value < math.inf for speed in speeds)
    assert {speed.n for speed in speeds} == {3}
    with pytest.raises(ValueError, match="not 1"):
        kernel_speeds(weight, 1, rows=4, repeats=3, generator=generator)
    with pytest.raises(ValueError, match="repeats must be at least 2, not 1"):
        kernel_speeds(weight, 0.5, rows=4, repeats=1, generator=generator)


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
    with pytest.raises(ValueError, match=r"not \[0.5\]"):
        break_even({0.5: at(1.0)})
    with pytest.raises(ValueError, match=r"not \[0.5, 1\]"):
        break_even({0.5: at(1.0), 1: at(2.0)})
