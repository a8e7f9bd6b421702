"""The first steps of fresh networks against a loop, and inputs of a given cosine."""

import math

import pytest
import torch

from relubook.chapters.born_dead import dead_shares
from relubook.chapters.fresh import correlated, first_steps, mean_cosine
from relubook.training.recipe import Recipe
from relubook.training.stack import batch_order


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.randn(20, 3, generator=generator(1))
Y = torch.randint(4, (20,), generator=generator(2))
RECIPE = Recipe(3, 5, 4, hidden=2)


def test_first_steps_are_those_of_plain_training():
    fates = first_steps(
        RECIPE, X, Y, seeds=[4, 9], rates=[0.1, 0.2], optimizer="sgd", steps=3, batch_size=8
    )
    assert list(fates) == [0.1, 0.2]
    for rate, fate in fates.items():
        stack = RECIPE.stack([4, 9])
        torch.testing.assert_close(fate.born, dead_shares(stack, X).mean(1))
        for place, seed in enumerate([4, 9]):
            net = RECIPE.stack([seed]).member(0)
            start = torch.cat([p.detach().flatten() for p in net.parameters()])
            optimizer = torch.optim.SGD(net.parameters(), rate)
            for step, batch in enumerate(batch_order(seed, 20, 8, 3)):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(X[batch]), Y[batch]).backward()
                if step == 0:
                    norm = math.sqrt(sum(p.grad.square().sum().item() for p in net.parameters()))
                    assert fate.gradient[place].item() == pytest.approx(norm, rel=1e-5)
                optimizer.step()
            end = torch.cat([p.detach().flatten() for p in net.parameters()])
            moved = ((end - start).norm() / start.norm()).item()
            assert fate.moved[place].item() == pytest.approx(moved, rel=1e-4)
            right = (net(X).argmax(1) == Y).float().mean().item()
            assert fate.accuracy[place].item() == pytest.approx(right)
        assert not fate.diverged.any()


def test_what_one_step_leaves_is_that_of_the_first_step():
    one, many = (
        first_steps(RECIPE, X, Y, seeds=3, rates=[0.5], optimizer="sgd", steps=n, batch_size=8)[0.5]
        for n in (1, 7)
    )
    torch.testing.assert_close(one.stepped, many.stepped)
    assert (one.moved != many.moved).any()


def test_overflow_is_not_death():
    wild = Recipe(3, 5, 4, hidden=2, initializer="uniform", initializer_options={"bound": 1e6})
    fate = first_steps(wild, X, Y, seeds=4, rates=[1e30], optimizer="sgd", steps=5, batch_size=8)[
        1e30
    ]
    assert fate.diverged.all()
    assert fate.accuracy.isnan().all()


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 1.0])
def test_correlated_inputs_have_their_cosine(cosine):
    x = correlated(400, 2000, cosine, generator=generator())
    assert x.shape == (400, 2000)
    assert mean_cosine(x) == pytest.approx(cosine, abs=0.02)
    assert x.square().mean().item() == pytest.approx(1, abs=0.1)


def test_correlated_inputs_share_their_parts_between_cosines():
    own = correlated(5, 3, 0.0, generator=generator())
    shared = correlated(5, 3, 1.0, generator=generator())
    mixed = correlated(5, 3, 0.25, generator=generator())
    torch.testing.assert_close(mixed, 0.5 * shared + math.sqrt(0.75) * own)


def test_mean_cosine_is_that_of_the_pairs():
    x = torch.randn(7, 3, generator=generator(3))
    x[2] = 0
    pairs = [
        torch.nn.functional.cosine_similarity(x[i], x[j], dim=0).item()
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    assert mean_cosine(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
