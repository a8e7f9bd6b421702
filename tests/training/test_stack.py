import contextlib
import copy
import pickle
from functools import partial

import pytest
import torch
from recipe_kinds import KINDS, SEEDS, Shifted, assert_same, fit, gen, make
from torch import nn
from torch.nn.utils import parameters_to_vector

from relubook.training.stack import Stack, batch_order, kept_modes, member_seeds, stack_of
from relubook.training.train import train

RECIPES = KINDS | {
    "narrow": {"widths": 2, "hidden": 9},
    "constant bias": {"bias": 0.1},
    "square": {"inputs": 6, "outputs": 6},
}


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(4 * 6 * 6, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


def images(n):
    x = torch.randn(n, 1, 8, 8, generator=gen(0))
    return x, torch.randint(3, (n,), generator=gen(1))


@pytest.mark.parametrize("name", RECIPES)
def test_member_equals_the_single_network_of_its_seed(name):
    made = make(**RECIPES[name])
    seeds = [3, 0, 2**40 + 1]
    stack = made.stack(seeds, dtype=torch.float64)
    x = torch.randn(9, made.inputs, generator=gen(0), dtype=torch.float64)
    stack.eval()
    out = stack(x)
    for i, seed in enumerate(seeds):
        single = made.single(seed, dtype=torch.float64).eval()
        taken = stack.member(i)
        assert not taken.training
        assert list(single.state_dict()) == list(taken.state_dict())
        for key, value in single.state_dict().items():
            assert torch.equal(value, taken.state_dict()[key]), key
        vector = parameters_to_vector(single.parameters())
        assert torch.equal(vector, stack.parameter_vectors()[i])
        assert len(vector) == made.parameter_count
        torch.testing.assert_close(out[i], single(x), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(taken(x), single(x), rtol=0, atol=0)
    each = torch.stack([x, x + 1, -x])
    torch.testing.assert_close(stack(each)[1], stack.member(1)(x + 1), rtol=1e-12, atol=1e-14)


def _keep(seen, module, args, out):
    seen.append((args[0], out))


@pytest.mark.parametrize("name", RECIPES)
def test_hidden_equals_hooks_on_the_members(name):
    made = make(**RECIPES[name])
    stack = made.stack(SEEDS, dtype=torch.float64).eval()
    x = torch.randn(9, made.inputs, generator=gen(0), dtype=torch.float64)
    pairs = stack.hidden(x)
    assert len(pairs) == made.hidden
    for i in range(len(SEEDS)):
        member, seen = stack.member(i), []
        for key, module in member.named_children():
            if key.startswith("act"):
                module.register_forward_hook(partial(_keep, seen))
        member(x)
        for ours, theirs in zip(pairs, seen, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-13)


def test_stack_is_differentiable_and_members_are_apart():
    stack = make().stack(3)
    stack(torch.ones(2, 3))[1].sum().backward()
    grad = stack.linear1.weight.grad
    assert grad[1].abs().sum() > 0
    assert grad[0].abs().sum() == grad[2].abs().sum() == 0
    taken = stack.member(1)
    taken.linear1.weight.data.zero_()
    assert stack.linear1.weight[1].abs().sum() > 0


@pytest.mark.parametrize("name", ["plain", "all", "rrelu", "module"])
def test_ranges_and_joins(name):
    made = make(**KINDS[name])
    stack = made.stack(range(5))
    x = torch.randn(8, 3, generator=gen(0))
    stack(x)  # moves the generators and the running statistics
    parts = [stack.range(0, 2), stack.range(2, 5)]
    assert parts[1].seeds == (2, 3, 4)
    assert str(parts[1].linear1).startswith("StackedLinear(members=3,")
    joined = Stack.join(parts)
    assert joined.seeds == stack.seeds
    for key, value in stack.state_dict().items():
        assert torch.equal(value, joined.state_dict()[key]), key
        assert value.data_ptr() != joined.state_dict()[key].data_ptr()
    want = stack(x)
    torch.testing.assert_close(joined(x), want)
    torch.testing.assert_close(torch.cat([part(x) for part in parts]), want)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_as_the_stack_does(again):
    before = torch.get_rng_state()
    made = make(normalization="batch", dropout=0.5, activation="rrelu")
    stack = made.stack(2)
    made.single(0)
    x = torch.randn(8, 3, generator=gen(0))
    stack(x)
    copied = again(stack)
    assert torch.equal(copied.parameter_vectors(), stack.parameter_vectors())
    assert copied.recipe == made
    assert torch.equal(copied(x), stack(x))
    assert torch.equal(before, torch.get_rng_state())
    conv = stack_of(conv_net, 2).eval()
    assert torch.equal(again(conv)(images(4)[0]), conv(images(4)[0]))


def test_stack_of_equals_its_members():
    before = torch.get_rng_state()
    stack = stack_of(conv_net, SEEDS)
    assert torch.equal(before, torch.get_rng_state())
    x, y = images(12)
    train(stack, x, y, steps=3, lr=0.01)
    stack.eval()
    pairs = stack.hidden(x)
    own = torch.stack([x, x + 1, -x])
    for i in range(3):
        member = stack.member(i)
        assert torch.equal(parameters_to_vector(member.parameters()), stack.parameter_vectors()[i])
        torch.testing.assert_close(stack(x)[i], member(x))
        torch.testing.assert_close(stack(own)[i], member(own[i]))
        pre = member[1](member[0](x))
        torch.testing.assert_close(pairs[0][0][i], pre)
        torch.testing.assert_close(pairs[0][1][i], pre.relu())
        pre = member[5](pre.relu().flatten(1))
        torch.testing.assert_close(pairs[1][0][i], pre)
        torch.testing.assert_close(pairs[1][1][i], pre.tanh())
    assert len(pairs) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.modules())


def test_a_stack_of_conv_nets_trains_as_each_alone():
    """Dropout at p = 0, since its draws there come from the global generator."""

    def build():
        net = conv_net().double()
        net[3].p = 0.0
        return net

    x, y = images(30)
    x = x.double()
    settings = {"steps": 12, "lr": 0.01, "batch_size": 10, "clip": 1.0}
    run = train(stack_of(build, SEEDS), x, y, optimizer=torch.optim.SGD, momentum=0.9, **settings)
    nets = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        nets.append(
            fit(build(), x, y, seed=seed, optimizer=torch.optim.SGD, momentum=0.9, **settings)[0]
        )
    assert_same(run, nets)
    for i, net in enumerate(nets):
        for (key, ours), theirs in zip(
            run.member(i).state_dict().items(), net.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=key)
        relu = net[2](net[1](net[0](x)))
        assert torch.equal((relu == 0).all(0).all(-1).all(-1), run.died[0][i] >= 0)


def test_dropout_of_a_stack_of_modules_differs_between_members():
    stack = stack_of(lambda: nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)), [1, 1])
    out = stack(torch.ones(50, 1))
    assert 0.2 < (out[0] == out[1]).double().mean() < 0.8


def test_dims_tell_own_inputs_from_shared_ones():
    x = torch.randn(2, 7, 3, generator=gen(0))
    build = lambda: nn.Sequential(nn.Linear(3, 4))  # noqa: E731
    assert stack_of(build, 2)(x).shape == (2, 7, 4)
    assert stack_of(build, 2, dims=3)(x).shape == (2, 2, 7, 4)
    assert stack_of(Shifted, 2)(x).shape == (2, 2, 7, 3)


def test_batches_are_permutations():
    order = batch_order(5, 10, 3, 7)
    assert order.shape == (7, 3)
    for epoch in (order[:3], order[3:6]):
        assert len(epoch.unique()) == 9
    assert batch_order(5, 10, 3, 0).shape == (0, 3)
    assert not torch.equal(order, batch_order(6, 10, 3, 7))


def test_modes_are_kept_module_by_module():
    net = conv_net()
    net[1].eval()
    with contextlib.suppress(KeyError), kept_modes(net):
        net.eval()
        raise KeyError
    assert [m.training for m in net] == [True, False, *[True] * 6]


@pytest.mark.parametrize("seeds", [[1.5], "3", True, None, [0, "1"], 2.0])
def test_seeds_must_be_integers(seeds):
    with pytest.raises(TypeError, match="must be.*integer"):
        make().stack(seeds)


def test_bad_stacks():
    assert member_seeds(torch.tensor([3, 4])) == (3, 4)
    for none in (0, [], -1):
        with pytest.raises(ValueError, match="at least one member"):
            make().stack(none)
    stack = make().stack(2)
    for shape in ((5, 4), (3,), (3, 5, 3)):
        with pytest.raises(ValueError, match=r"\(batch, 3\) or \(2, batch, 3\)"):
            stack(torch.ones(shape))
    with pytest.raises(TypeError, match="floating point, not torch.int64"):
        stack(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(IndexError, match="no member 2"):
        stack.member(2)
    with pytest.raises(TypeError, match="build must return a module, not 3"):
        stack_of(lambda: 3, 2)
    widths = iter((3, 4))
    with pytest.raises(ValueError, match="same shapes"):
        stack_of(lambda: nn.Linear(2, next(widths)), 2)
    with pytest.raises(ValueError, match=r"\(2, batch, ...\), not \(3, 5, 1, 8, 8\)"):
        stack_of(conv_net, 2)(torch.ones(3, 5, 1, 8, 8))

    class Tied(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2), nn.Linear(2, 2))
            self[1].weight = self[0].weight

    with pytest.raises(ValueError, match="no parameter may be shared"):
        stack_of(Tied, 2)
