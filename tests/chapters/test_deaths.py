"""Following units through their deaths: against single networks, and cases worked by hand."""

import math

import pytest
import torch

from relubook.chapters.deaths import (
    History,
    autopsy,
    dates,
    fires,
    gets_gradient,
    half_squared_error,
    lost_units,
    network_shares,
    outlier_trial,
    plant_dead_,
    rebuilt_variance,
    revived_after,
    sigmoid_recovery,
)
from relubook.training.recipe import Recipe
from relubook.training.stack import batch_order
from relubook.training.train import train


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    return x, x.abs().sum(1, keepdim=True)


RECIPE = Recipe(3, (8, 6), 1, bias=(-1.0, 0.5))


def stack(recipe=RECIPE, seeds=range(3)):
    return recipe.stack(seeds, dtype=torch.float64)


def test_fires_means_positive_once(data):
    network = stack()
    few = data[0][:2]
    for (pre, _), fire in zip(network.hidden(few), fires(network, few), strict=True):
        assert torch.equal(fire, (pre > 0).any(1))
        assert 0 < fire.sum() < fire.numel()


class TestLostUnits:
    def test_lost_relus_are_the_dead(self, data):
        network = stack()
        plant_dead_(network, 0.5, layers=[1])
        for lost, fire in zip(lost_units(network, data[0]), fires(network, data[0]), strict=True):
            assert torch.equal(lost, ~fire)

    @pytest.mark.parametrize(("kind", "limit"), [("sigmoid", 17.5), ("tanh", 9.5)])
    def test_saturated_units_are_lost_beyond_their_limit(self, kind, limit):
        network = Recipe(1, (2,), 1, activation=kind).stack(1)
        with torch.no_grad():
            network.linear1.weight.zero_()
            network.linear1.bias.copy_(torch.tensor([[limit, limit - 2]]))
        assert lost_units(network, torch.ones(4, 1))[0].tolist() == [[True, False]]

    def test_leaky_units_are_never_lost(self, data):
        network = stack(Recipe(3, (8,), 1, activation="leaky_relu", bias=-9.0))
        assert not lost_units(network, data[0])[0].any()


class TestHistory:
    def test_looks_when_it_should(self, data):
        network, few = stack(), data[0][:2]
        before = fires(network, few)
        history = History(network, few, every=3)
        train(network, *data, steps=6, lr=0.1, optimizer="sgd", each_step=history)
        assert history.steps == [0, 3, 6]
        assert torch.equal(history.layer(1)[0], before[0])
        assert torch.equal(history.layer(2)[-1], fires(network, few)[1])
        assert not torch.equal(history.layer(1)[0], history.layer(1)[-1])


def a_history(*rows):
    history = History(stack(), torch.zeros(1, 3, dtype=torch.float64))
    history.steps = [10 * k for k in range(len(rows))]
    history.looks = [[torch.tensor([row], dtype=torch.bool)] for row in rows]
    return history


class TestDates:
    # Units: lives; dies at 20; dies at 10 and is back at 30; born dead for ever; born dead, back,
    # dies at 30.
    HISTORY = a_history([1, 1, 1, 0, 0], [1, 1, 0, 0, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 0])

    def test_death_and_revival(self):
        found = dates(self.HISTORY, 1)
        assert found.death.tolist() == [[-1, 20, 10, -1, 30]]
        assert found.revival.tolist() == [[-1, -1, 30, -1, -1]]

    def test_census(self):
        dead, wait = revived_after(self.HISTORY, 1, 20)
        assert dead.tolist() == [[False, True, True, False, False]]
        assert wait.tolist() == [[-1, -1, 10, -1, -1]]


class TestAutopsy:
    def test_bias_and_weights_by_hand(self):
        start, now = (Recipe(1, (3,), 1, bias=0.5).stack(1) for _ in range(2))
        x = torch.tensor([[1.0], [2.0]])
        with torch.no_grad():
            start.linear1.weight.fill_(1.0)
            # Killed by the bias; by the weights; and one that lives.
            now.linear1.weight.copy_(torch.tensor([[[1.0, -1.0, 1.0]]]))
            now.linear1.bias.copy_(torch.tensor([[-5.0, -0.5, 0.5]]))
        found = autopsy(now, start, x, 1)
        assert found.died.tolist() == [[True, True, False]]
        assert found.negative_bias.tolist() == [[True, True, False]]
        assert found.without_bias.tolist() == [[True, False, True]]
        assert found.with_first_weights.tolist() == [[False, True, True]]
        torch.testing.assert_close(found.bias_share, torch.tensor([[5 / 6.5, 0.25, 0.25]]))

    def test_second_layer_sees_the_first(self, data):
        network = stack()
        found = autopsy(network, network, data[0], 2)
        alive = fires(network, data[0])[1]
        assert torch.equal(found.with_first_weights, alive)
        assert not found.died.any()


class TestPlanting:
    def test_the_dead_stay_dead_and_frozen(self, data):
        network = stack()
        chosen = plant_dead_(network, 0.5, layers=[1, 2])
        assert [mask.sum(1).tolist() for mask in chosen] == [[4, 4, 4], [3, 3, 3]]
        train(network, *data, steps=20, lr=0.1)
        for layer, mask in enumerate(chosen, 1):
            linear = network.get_submodule(f"linear{layer}")
            assert (linear.bias[mask] == -1).all()
            assert not linear.weight.mT[mask].any()
            assert not (fires(network, 100 * data[0])[layer - 1] & mask).any()

    def test_members_differ_and_repeat(self):
        one, two = (plant_dead_(stack(), 0.5, layers=[1])[0] for _ in range(2))
        assert torch.equal(one, two)
        assert not torch.equal(one[0], one[1])


class TestOutlierTrial:
    def test_ordinary_example_does_nothing_more_than_its_twin(self, data):
        network = stack()
        before = network.parameter_vectors().clone()
        found = outlier_trial(network, *data, size=1, kind="input", lr=0.01, after=3)
        assert torch.equal(network.parameter_vectors(), before)
        assert torch.equal(found.harm, torch.ones(3, dtype=torch.float64))
        assert torch.equal(found.lasting_harm, found.harm)
        assert not found.overflowed.any()

    def test_huge_outlier_silences_and_overflows(self, data):
        x, y = data[0].abs(), data[1]
        found = outlier_trial(stack(), x, y, size=1e4, kind="input", lr=0.5, after=20)
        assert (found.lost.nan_to_num(1) > 0).any()
        assert (found.harm > 10).all()
        assert (found.lasting_harm[found.overflowed] == math.inf).all()

    def test_one_layer_by_hand(self):
        """A unit w = 1, b = 0.25 behind a linear output of 1: the step of the book's first cell."""
        network = Recipe(1, (1,), 1).stack(1, dtype=torch.float64)
        with torch.no_grad():
            network.linear1.weight.fill_(1.0)
            network.linear1.bias.fill_(0.25)
            network.linear2.weight.fill_(1.0)
            network.linear2.bias.zero_()
        x = torch.tensor([[1.0]], dtype=torch.float64)
        found = outlier_trial(network, x, x, size=8, kind="input", lr=0.1, batch_size=1)
        assert found.lost.tolist() == [[1.0]]
        # The old bias does not wake it, the old weight does not either: 1 - 0.475 > 0 does.
        assert found.by_bias.tolist() == [0.0]
        assert found.by_weights.tolist() == [1.0]

    def test_each_member_steps_on_its_own_batch(self, data):
        x, y = data
        found = outlier_trial(stack(), x, y, size=3, kind="target", lr=0.05)
        for i in range(3):
            losses = []
            for less in (3, 0):
                member = stack().member(i)
                (index,) = batch_order(i + 10**6, 40, 8, 1)
                wanted = y[index].clone()
                wanted[0] -= less
                half_squared_error(member(x[index]), wanted).backward()
                with torch.no_grad():
                    for parameter in member.parameters():
                        parameter -= 0.05 * parameter.grad
                    losses.append(half_squared_error(member(x), y))
            torch.testing.assert_close(found.harm[i], losses[0] / losses[1])


class TestGradients:
    def test_a_unit_gets_one_if_and_only_if_it_fires(self, data):
        network = stack()
        for moved, fire in zip(
            gets_gradient(network, data[0][:1], data[1][:1]),
            fires(network, data[0][:1]),
            strict=True,
        ):
            assert torch.equal(moved, fire)
            assert 0 < fire.sum() < fire.numel()


class TestShares:
    def test_networks_without_such_units_are_left_out(self):
        what = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
        among = torch.tensor([[True, True, True], [False, False, False], [True, True, False]])
        torch.testing.assert_close(network_shares(what, among), torch.tensor([2 / 3, 1 / 2]))


class TestRebuilding:
    def test_a_layer_that_copies_keeps_everything(self, data):
        x = data[0].float()
        network = Recipe(3, (6,), 1).stack(1)
        with torch.no_grad():
            network.linear1.weight.copy_(torch.cat([torch.eye(3), -torch.eye(3)], 1)[None])
        share, rank = rebuilt_variance(network, x, x)
        assert share.item() > 0.999
        assert rank.item() == 6
        plant_dead_(network, 1.0, layers=[1])
        share, rank = rebuilt_variance(network, x, x)
        assert abs(share.item()) < 0.01
        assert rank.item() == 0


class TestSigmoidRecovery:
    def test_against_autograd(self):
        z = torch.tensor([4.0], requires_grad=True)
        sgd = torch.optim.SGD([z], lr=1.0)
        steps = 0
        while z.item() > 2:
            sgd.zero_grad()
            (torch.sigmoid(z) ** 2 / 2).sum().backward()
            sgd.step()
            steps += 1
        back, moved = sigmoid_recovery([4.0, 2.0], 100)
        assert back.tolist() == [steps, 1]
        assert moved.all()

    def test_too_far_out(self):
        back, moved = sigmoid_recovery([13.0, 16.0], 10)
        assert back.tolist() == [-1, -1]
        assert moved.tolist() == [True, False]
