import copy
import os
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relubook.units.diagnosis import diagnose
from relubook.units.reviver import Reviver


def mlp(width=16):
    return nn.Sequential(OrderedDict(
        one=nn.Linear(4, width), relu=nn.ReLU(), two=nn.Linear(width, 8), relu2=nn.ReLU(),
        head=nn.Linear(8, 2),
    ))  # fmt: skip


def trained(every, steps, **options):
    """A run in which units die at step 5, and what was done to them at which step."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reviver = Reviver(model, optimizer, every=every, generator=torch.Generator(), **options)
    done = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 5:
            with torch.no_grad():
                model.one.bias[:6] = -100.0
        done.append(reviver.step((x, x[:, 0])))
    return model, optimizer, x, reviver, done


def redo(model, x, tau):
    """The dormant units of a network of two hidden layers, as ReDo's paper defines them."""
    with torch.no_grad():
        h = [F.relu(model.one(x))]
        h.append(F.relu(model.two(h[0])))
    means = [a.abs().mean(0) for a in h]
    return [(mean / mean.mean() <= tau).nonzero().flatten().tolist() for mean in means]


def test_units_are_revived_at_every_so_many_steps_and_nowhere_else():
    _, _, _, reviver, done = trained(4, 11)
    assert [k + 1 for k, revival in enumerate(done) if revival is not None] == [4, 8]
    assert [step for step, _ in reviver.history] == [4, 8]
    assert reviver.history[1][1] is done[7]
    assert done[7].changes[0].units.tolist()[:6] == list(range(6))
    assert reviver.steps == 11


def test_dead_units_are_revived_without_a_change_of_the_function():
    model, optimizer, x, reviver, _ = trained(100, 6)
    before, report = model(x), diagnose(model, [x])
    assert report["relu"].dead[:6].all()
    reviver.steps = 99
    model.train()
    revival = reviver.step(x)
    assert torch.equal(model(x), before)
    assert revival.total == sum(int(site.dead.sum()) for site in report)
    assert not any(site.dead.any() for site in diagnose(model, [x]))
    assert all(module.training for module in model.modules())
    assert bool((optimizer.state[model.two.weight]["exp_avg"][:, :6] == 0).all())


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_dormant_units_are_those_of_redo(tau):
    model, _, x, reviver, _ = trained(100, 6, what="dormant", tau=tau)
    expected = redo(model, x, tau)
    reviver.steps = 99
    revival = reviver.step(x)
    assert [c.units.tolist() for c in revival.changes] == [units for units in expected if units]
    living = [unit for unit in range(8) if unit not in expected[1]]  # the others' rows are fresh
    assert bool((model.two.weight[living][:, expected[0]] == 0).all())
    assert bool((model.head.weight[:, expected[1]] == 0).all())


def test_a_policy_keeps_the_units_alive_where_training_kills_them():
    """Each step kills a unit; every 5 steps all are alive again."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(256, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reviver, dead = Reviver(model, optimizer, every=5), []
    for step in range(20):
        with torch.no_grad():
            model.one.bias[step % 16] = -100.0
        reviver.step(x)
        dead.append(int(diagnose(model, [x])["relu"].dead.sum()))
    assert dead[4::5] == [0, 0, 0, 0]
    assert all(count > 0 for k, count in enumerate(dead) if k % 5 != 4)


def test_the_verdict_is_that_of_evaluation_mode():
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model, x = nn.Sequential(*layers), torch.randn(64, 4)
    model[1].running_mean[2] = 1e3  # fires in training mode, where the batch has its own mean
    buffers = copy.deepcopy(dict(model.named_buffers()))
    assert not diagnose(model, [x])["2"].dead.any()
    revival = Reviver(model, None, every=1).step(x)
    assert revival.changes[0].units.tolist() == [2]
    assert revival.silent == 0
    unchanged = {name for name, b in model.named_buffers() if torch.equal(b, buffers[name])}
    assert unchanged == {"1.num_batches_tracked"}
    assert torch.equal(model[1].running_var[3:], buffers["1.running_var"][3:])


def test_options_go_to_diagnose():
    class Ambiguous(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.next = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.next(torch.relu(self.fc(x)))

    model, x = Ambiguous(), torch.randn(8, 4)
    with torch.no_grad():
        model.fc.bias[0] = -100.0
    generator = torch.Generator()
    reviver = Reviver(model, None, every=1, generator=generator, unit_dim={"relu()": 1})
    assert reviver.step(x).total >= 1
    assert not torch.equal(generator.get_state(), torch.Generator().get_state())
    with pytest.raises(ValueError, match="unit_dim names"):
        Reviver(model, None, every=1, unit_dim={"other": 1}).step(x)


def test_own_activations_are_known_to_both():
    class Jump(nn.Module):
        def forward(self, x):
            return x * (x > 0.1)

    model, x = nn.Sequential(nn.Linear(4, 6), Jump(), nn.Linear(6, 2)), torch.randn(64, 4)
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    before = model(x)
    revival = Reviver(model, None, every=1, activations={"1": "silent where 0"}).step(x)
    assert [(c.site, c.units.tolist(), c.silent) for c in revival.changes] == [("1", [0, 1], 0)]
    assert torch.equal(model(x), before)


def test_bad_input_raises_before_the_first_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for args, options, error, message in (
        ((lambda x: x, optimizer), {}, TypeError, "model is a function"),
        ((model, "adam"), {}, TypeError, "optimizer is a str"),
        ((model, [optimizer, 3]), {}, TypeError, "optimizer is a int"),
        ((model, torch.optim.LBFGS(model.parameters())), {}, ValueError, "L-BFGS"),
        ((model, optimizer), {"every": 0}, ValueError, "every must be .* not 0"),
        ((model, optimizer), {"every": 2.5}, ValueError, "every must be .* not 2.5"),
        ((model, optimizer), {"what": "rare"}, ValueError, "what='rare'"),
        ((model, optimizer), {"tau": -1.0}, ValueError, "tau=-1.0"),
        ((model, optimizer), {"unit_dims": 1}, TypeError, "unit_dims"),
    ):
        with pytest.raises(error, match=message):
            Reviver(*args, **options)


def test_a_step_that_raises_leaves_all_as_it_was():
    model, x = mlp(), torch.randn(64, 4)
    with torch.no_grad():
        model.one.bias[0] = -100.0
    partial = torch.optim.SGD(model.head.parameters(), lr=0.1)
    reviver, before = Reviver(model, partial, every=1), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not hold 'one.bias'"):
        reviver.step(x)
    with pytest.raises(ValueError, match="NaN"):
        reviver.step(x * float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert reviver.history == []


def one_process(rank, results):
    """Train on data of its own under DistributedDataParallel, and store the state."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(mlp())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reviver = Reviver(model, optimizer, every=2)
    torch.manual_seed(rank)
    for step in range(5):
        x = torch.randn(32, 4)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if not step:
            with torch.no_grad():
                model.module.one.bias[:6] = -100.0
        reviver.step(x)
    units = [[c.units.tolist() for c in revival.changes] for _, revival in reviver.history]
    torch.save((model.module.state_dict(), optimizer.state_dict(), units), results.format(rank))


@pytest.mark.slow
def test_processes_stay_alike(tmp_path, two_processes):
    results = os.fspath(tmp_path / "{}.pt")
    two_processes(one_process, results)
    (one, first, units), (other, second, others) = (torch.load(results.format(k)) for k in (0, 1))
    assert units[0][0][:6] == list(range(6))
    assert units == others
    assert all(torch.equal(one[name], other[name]) for name in one)
    for k, state in first["state"].items():
        for key, value in state.items():
            assert torch.equal(value, second["state"][k][key])
