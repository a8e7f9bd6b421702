"""What a run refuses, and that nothing has changed then."""

import math
import os
import signal

import pytest
import torch
from recipe_kinds import gen, make
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from relubook.training.train import train

X, Y = torch.randn(40, 3, generator=gen(0)), torch.randint(4, (40,), generator=gen(1))


class Untouched:
    """A stack, and whether anything about it or around it has changed."""

    def __init__(self, **changes):
        self.stack = make(**changes).stack(2)
        self.stack.eval()
        self.stack.act1.train()
        self.before = self.state()

    def state(self):
        numbers = [value.clone() for value in self.stack.state_dict().values()]
        modes = [module.training for module in self.stack.modules()]
        places = [(p.is_contiguous(), p.grad) for p in self.stack.parameters()]
        return numbers, modes, places, torch.get_rng_state(), signal.getsignal(signal.SIGINT)

    def check(self):
        numbers, modes, places, rng, handler = self.state()
        assert all(map(torch.equal, numbers, self.before[0]))
        assert (modes, places, handler) == (self.before[1], self.before[2], self.before[4])
        assert torch.equal(rng, self.before[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(40, 2)}, r"\(batch, 3\)"),
        ({"x": torch.randn(40)}, r"\(batch, 3\)"),
        ({"x": torch.randn(3, 40, 3)}, r"\(2, batch, 3\)"),
        ({"x": torch.randn(0, 3)}, r"x must hold examples, but has shape \(0, 3\)"),
        ({"x": torch.randn(40, 3, device="meta")}, "x must hold numbers, but it is a meta tensor"),
        ({"x": X.index_fill(0, torch.tensor([1]), math.nan)}, "x must be finite, but has 3"),
        ({"y": Y + 1}, r"labels of y must be in 0\.\.3, not 1\.\.4"),
        ({"y": Y - 1}, r"labels of y must be in 0\.\.3, not -1\.\.2"),
        ({"y": Y + 1, "loss": nn.CrossEntropyLoss}, r"labels of y must be in 0\.\.3, not 1\.\.4"),
        ({"y": Y[:-1]}, r"y must have one target for each of 40 inputs.*not \(39,\)"),
        ({"y": Y[:, None]}, r"y must have labels of shape \(\)"),
        ({"y": Y.float()}, r"y must have targets of shape \(4,\)"),
        ({"y": torch.full((40, 4), math.inf)}, "y must be finite, but has 160"),
        ({"y": Y.float(), "loss": "cross_entropy"}, r"y must have targets of shape \(4,\)"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"loss": "relu"}, "unknown loss 'relu'"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "'mean', not 'sum'"),
        ({"loss": lambda out, y: out.mean(1)}, "loss must return one number"),
        ({"lr": [0.1, 0.1, 0.1]}, r"one a member \(2\).*\(3,\)"),
        ({"lr": [0.1, -0.1]}, "member 1 has -0.1"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"steps": -1}, "steps must be.*-1"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'; known: adam"),
        ({"optimizer": "sgd", "nesterov": True}, "[Nn]esterov"),
        ({"betas": (0.9, 1.0)}, "beta"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"optimizer": torch.optim.LBFGS}, "must not be LBFGS"),
        ({"optimizer": lambda groups: torch.optim.SparseAdam(groups)}, "must not be SparseAdam"),
        ({"batch_size": 41}, "batch_size must be at most 40"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"clip": 0.0}, "clip must be"),
        ({"clip": math.nan}, "clip must be"),
        ({"clip": "much"}, "clip must be"),
        ({"record": 0}, "record must be at least 1"),
        ({"record": [0, 9]}, r"record must name steps in 0\.\.5, not 9"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"jobs": 2, "each_step": print}, "each_step must be None"),
        ({"jobs": 2, "record": [9]}, "record must name"),
        ({"validation": (X, Y + 9)}, "labels of validation y"),
        ({"validation": (X[:, :2], Y)}, r"\(batch, 3\)"),
        ({"scheduler": lr_scheduler.ReduceLROnPlateau}, "scheduler must go by the step"),
    ],
)
def test_bad_input(changes, message):
    given = Untouched()
    arguments = {"x": X, "y": Y, "steps": 5, "lr": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        train(given.stack, arguments.pop("x"), arguments.pop("y"), **arguments)
    given.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": make()}, "stack must come from recipe.stack.*not Recipe"),
        ({"stack": nn.Linear(3, 4)}, "stack must come from recipe.stack.*not Linear"),
        ({"x": X.numpy()}, "x must be a tensor, not ndarray"),
        ({"y": Y.tolist()}, "y must be a tensor, not list"),
        ({"validation": (X.numpy(), Y)}, "validation x must be a tensor"),
        ({"validation": X}, r"validation must be a pair \(x, y\), not Tensor"),
        ({"x": X.long()}, "must be floating point"),
        ({"loss": "mse"}, "y must hold floating-point targets, not torch.int64"),
        ({"loss": 3}, "loss must be a name or a function, not 3"),
        ({"momentum": 0.9}, "momentum"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "not an instance"),
        ({"optimizer": 3}, "optimizer must be a name, a class or a function, not 3"),
        ({"optimizer": lambda groups: 3}, "optimizer must make a torch.optim.Optimizer, not 3"),
        ({"lr": "fast"}, "lr must be a number or one number a member, not 'fast'"),
        ({"lr": None}, "lr must be a number"),
        ({"steps": 2.5}, "steps must be an integer, not 2.5"),
        ({"batch_size": 8.0}, "batch_size must be an integer"),
        ({"batch_seed": "a"}, "batch_seed must be an integer"),
        ({"record": "often"}, "record must be an integer, not 'often'"),
        ({"record": [1.5]}, "every step of record must be an integer, not 1.5"),
        ({"jobs": 1.5}, "jobs must be an integer"),
        ({"each_step": 3}, "each_step must be a function, not 3"),
        ({"scheduler": "cosine"}, "scheduler must be a function, not 'cosine'"),
        ({"scheduler": lambda optimizer: 3}, "scheduler must make.*not 3"),
    ],
)
def test_bad_types(changes, message):
    given = Untouched()
    arguments = {"stack": given.stack, "x": X, "y": Y, "steps": 5, "lr": 0.1} | changes
    with pytest.raises(TypeError, match=message):
        train(**arguments)
    given.check()


def test_errors_under_way_leave_a_sound_stack(monkeypatch):
    given = Untouched(normalization="batch")
    with pytest.raises(ValueError, match="batch_size must be at least 2 for batch normalization"):
        train(given.stack, X, Y, steps=5, lr=0.1, batch_size=1)
    given.check()
    monkeypatch.setenv("RELUBOOK_PROGRESS", "yes")
    with pytest.raises(ValueError, match="RELUBOOK_PROGRESS must be 0 or 1, not 'yes'"):
        train(given.stack, X, Y, steps=5, lr=0.1)
    given.check()
    del os.environ["RELUBOOK_PROGRESS"]

    def fail(step, stack, optimizer):
        raise KeyError(step)

    with pytest.raises(KeyError, match="1"):
        train(given.stack, X, Y, steps=5, lr=0.1, each_step=fail)
    assert all(p.is_contiguous() and p.grad is None for p in given.stack.parameters())
    assert len({p.untyped_storage().data_ptr() for p in given.stack.parameters()}) == len(
        [*given.stack.parameters()]
    )
    frozen = make().stack(2).requires_grad_(False)
    with pytest.raises(ValueError, match="trained parameters"):
        train(frozen, X, Y, steps=5, lr=0.1)


def test_frozen_parameters_stay():
    stack = make().stack(2)
    stack.linear1.requires_grad_(False)
    before = stack.linear1.weight.clone(), stack.linear2.weight.clone()
    train(stack, X, Y, steps=3, lr=0.1)
    assert torch.equal(before[0], stack.linear1.weight)
    assert not torch.equal(before[1], stack.linear2.weight)


def test_own_and_shared_targets_are_told_apart_by_the_outputs():
    """Where there are as many members as examples, both readings would fit."""
    stack = make(widths=4, outputs=3).stack(3)
    x = X[:3]
    shared = torch.randn(3, 3, generator=gen(2))
    run = train(stack, x, shared, steps=0, lr=0.1)
    torch.testing.assert_close(run.loss[0, 1], F.mse_loss(stack.member(1)(x), shared).detach())
    labels = torch.randint(3, (3, 3), generator=gen(3))
    run = train(stack, x, labels, steps=0, lr=0.1)
    want = F.cross_entropy(stack.member(1)(x), labels[1]).detach()
    torch.testing.assert_close(run.loss[0, 1], want)
    single = make(widths=4, outputs=1).stack(3)
    for y in (shared[0], shared):  # (n,), and (members, n)
        run = train(single, x, y, steps=0, lr=0.1)
        mine = y if y.dim() == 1 else y[2]
        want = F.mse_loss(single.member(2)(x)[:, 0], mine).detach()
        torch.testing.assert_close(run.loss[0, 2], want)
