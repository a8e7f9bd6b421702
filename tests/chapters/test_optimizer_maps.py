"""The settings of the maps against plain loops, and what the stored maps declare."""

import pytest
import torch
from torch.nn import functional as F

from relubook.chapters.optimizer_maps import (
    MAP_OPTIMIZERS,
    MAP_RATES,
    matched_rate,
    optimizer_map,
    target_scale,
    test_accuracy,
    train_diabetes,
    train_digits,
    train_single_relu,
)
from relubook.evidence.data import dataset
from relubook.training.recipe import Recipe
from relubook.training.stack import batch_order
from relubook.training.train import train


def test_ten_times_a_rate_is_a_rate():
    assert list(MAP_RATES) == sorted(set(MAP_RATES))
    for rate in MAP_RATES[:-4]:
        assert min(abs(other / (10 * rate) - 1) for other in MAP_RATES) < 1e-9


@pytest.mark.parametrize("optimizer", MAP_OPTIMIZERS)
def test_digits_are_trained_as_by_a_plain_loop(optimizer):
    run = train_digits([3], optimizer=optimizer, lr=0.01, steps=5, record=[])
    seen = dataset("digits").train
    net = Recipe(64, 32, 10, hidden=2).single(3)
    made = {
        "SGD": lambda p: torch.optim.SGD(p, 0.01),
        "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        "Nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
        "Adam": lambda p: torch.optim.Adam(p, 0.01),
        "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    }[optimizer](net.parameters())
    for rows in batch_order(3, len(seen), 64, 5):
        made.zero_grad()
        F.cross_entropy(net(seen.x[rows]), seen.y[rows]).backward()
        made.step()
    with torch.no_grad():
        torch.testing.assert_close(run.member(0)(seen.x), net(seen.x), rtol=1e-3, atol=1e-3)


def test_targets_are_scaled_and_shifted():
    plain = train_diabetes([0], optimizer="SGD", lr=0.0, steps=0)
    y = dataset("diabetes").train.y
    out = plain.network(dataset("diabetes").train.x)[0]
    scaled = train_diabetes([0], optimizer="SGD", lr=0.0, steps=0, target_sd=0.1, target_mean=2.0)
    expected = (out - (2 + 0.1 * y)).square().mean()
    assert scaled.loss[0, 0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain.dead_share().shape == (1,)


def test_single_relu_is_trained_as_by_a_plain_loop():
    run, dead = train_single_relu([5], optimizer="momentum", lr=0.01, target_sd=0.1, steps=20)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 10, generator=generator)
    y = (x @ torch.randn(10, 1, generator=generator)).relu()
    y = 0.1 * y / y.std()
    layer = Recipe(10, (), 1).single(5)
    made = torch.optim.SGD(layer.parameters(), 0.01, momentum=0.9)
    for _ in range(20):
        made.zero_grad()
        F.mse_loss(layer(x).relu(), y).backward()
        made.step()
    with torch.no_grad():
        torch.testing.assert_close(run.network(x)[0], layer(x), rtol=1e-4, atol=1e-5)
    assert dead.shape == (1,)
    assert not dead.any()


def test_single_relu_dies_where_no_input_makes_it_fire():
    """A target that is far below 0 pushes the pre-activation below 0 on every input."""
    _, dead = train_single_relu(
        range(3), optimizer="SGD", lr=0.05, target_mean=-20.0, inputs=1, n=16, steps=200
    )
    assert dead.all()


def test_matched_rates():
    assert matched_rate("SGD", 0.3) == 0.3
    for name in ("momentum", "Nesterov", "Adam"):
        assert matched_rate(name, 0.3) == pytest.approx(0.03)


def test_momentum_moves_ten_times_as_far_in_the_long_run():
    """The derivation behind the match: a constant gradient, 400 steps, one weight."""
    x, y = torch.ones(4, 1), torch.zeros(4, 1)
    moved = {}
    for name in ("SGD", "momentum"):
        run = train(
            Recipe(1, (), 1, bias=False).stack(1), x, y, steps=400,
            optimizer=MAP_OPTIMIZERS[name], lr=matched_rate(name, 0.01),
            loss=lambda out, _: out.mean(),
        )  # fmt: skip
        moved[name] = float(run.network.member(0).linear1.weight.detach()) - float(
            Recipe(1, (), 1).single(0).linear1.weight.detach()
        )
    assert moved["momentum"] / moved["SGD"] == pytest.approx(1, abs=0.03)


def test_dead_share_weighs_layers_by_their_units():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    run = train(Recipe(3, (6, 2), 1).stack(2), x, x[:, :1], steps=0, lr=0.1)
    run.dead[-1] = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    assert run.dead_share().tolist() == pytest.approx([3 / 8, 2 / 8])


def test_accuracy_of_a_broken_network_is_guessing():
    split = dataset("digits").test
    network = Recipe(64, 8, 10, hidden=1).stack([0, 1])
    with torch.no_grad():
        next(network.parameters())[0] = float("nan")
    accuracy = test_accuracy(network, split)
    assert accuracy[0].item() == pytest.approx((split.y == 0).double().mean().item())
    member = network.member(1)
    with torch.no_grad():
        right = (member(split.x).argmax(1) == split.y).double().mean()
    assert accuracy[1].item() == pytest.approx(right.item())


def test_diverged_networks_have_no_dead_share():
    cell = optimizer_map.measure(("SGD", 10, 10.0), [0, 1])
    assert cell["diverged"] == [True, True]
    assert all(share != share for share in cell["dead"])
    assert cell["constant"] == [False, False]


@pytest.mark.parametrize("model", ["single", "network"])
def test_target_scale_measures_every_seed(model):
    cell = target_scale.measure((model, "Adam", 0.01, 0.1, 0.0), [0, 1])
    assert {len(values) for values in cell.values()} == {2}
    assert set(cell) == {"dead", "error", "diverged"}
