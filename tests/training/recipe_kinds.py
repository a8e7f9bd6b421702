"""One recipe for each kind of network that can be stacked, and the loop that is their oracle."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from relubook.training.modules import stream
from relubook.training.recipe import RESIDUALS, Recipe
from relubook.training.stack import batch_order
from relubook.training.train import train

SEEDS = [3, 11, 4]


class Shifted(nn.Module):
    """An activation with a buffer, a parameter and an own place in the gradient."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("shift", torch.tensor(0.2))

    def forward(self, x):
        return torch.maximum(x - self.shift, self.slope * x)


KINDS = {
    "plain": {},
    "linear": {"widths": ()},
    "maxout": {"activation": "maxout", "activation_options": {"pieces": 3}},
    "prelu": {"activation": "prelu"},
    "prelu, one slope a unit": {
        "activation": "prelu",
        "activation_options": {"num_parameters": 6, "init": 0.1},
    },
    "rrelu": {"activation": "rrelu"},
    "function": {"activation": lambda x: x.abs().sqrt() * x.sign()},
    "module": {"activation": Shifted()},
    "class": {"activation": nn.Softplus, "activation_options": {"beta": 2.0}},
    "rai": {"initializer": "rai"},
    "torch": {"initializer": "torch"},
    "orthogonal": {"initializer": nn.init.orthogonal_, "initializer_options": {"gain": 1.5}},
    "drawn bias": {"bias": (0.0, 0.2)},
    "no bias": {"bias": False},
    "batch": {"normalization": "batch"},
    "layer": {"normalization": "layer"},
    "batch with a momentum": {"normalization": partial(nn.BatchNorm1d, momentum=0.5)},
    "batch without state": {
        "normalization": partial(nn.BatchNorm1d, affine=False, track_running_stats=False)
    },
    "RMS": {"normalization": nn.RMSNorm},
    "dropout": {"dropout": 0.3},
    **{form: {"residual": form} for form in RESIDUALS[1:]},
    "all": {
        "residual": "pre-activation",
        "normalization": "batch",
        "dropout": 0.2,
        "activation": "prelu",
    },
    "maxout block": {"residual": "pre-activation", "activation": "maxout"},
}


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**changes):
    return Recipe(**{"inputs": 3, "widths": (6, 6, 6), "outputs": 4} | changes)


def examples(recipe, n=40, dtype=torch.float64, regression=None):
    x = torch.randn(n, recipe.inputs, generator=gen(0), dtype=dtype)
    if regression or (regression is None and recipe.outputs == 1):
        return x, torch.randn(n, recipe.outputs, generator=gen(1), dtype=dtype)
    return x, torch.randint(recipe.outputs, (n,), generator=gen(1))


def train_many(recipe, x, y, *, seeds, **settings):
    return train(recipe.stack(seeds, dtype=x.dtype), x, y, **settings)


class Drawn(nn.Module):
    """Dropout or randomized slopes from the member's own stream, one network at a time."""

    def __init__(self, module, seed, site):
        super().__init__()
        self.module, self.generator = module, gen(stream(seed, site))

    def forward(self, x):
        if not self.training:
            return self.module(x)
        u = torch.empty_like(x)
        if isinstance(self.module, nn.Dropout):
            kept = u.uniform_(0, 1, generator=self.generator) >= self.module.p
            return x * kept / (1 - self.module.p)
        u.uniform_(self.module.lower, self.module.upper, generator=self.generator)
        return torch.where(x > 0, x, u * x)


def drawing(net, seed):
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Dropout | nn.RReLU):
            kind = "dropout" if isinstance(module, nn.Dropout) else "rrelu"
            layer = "".join(filter(str.isdigit, name))
            setattr(net, name, Drawn(module, seed, f"{kind} {layer}"))
    return net


def fit(
    net, x, y, *, seed, steps, lr, optimizer=torch.optim.Adam, batch_size=None, clip=None,
    scheduler=None, loss=None, **options,
):  # fmt: skip
    """Train one plain network with torch's own layers, autograd and optimizer."""
    opt = optimizer(net.parameters(), lr=lr, **options)
    schedule = None if scheduler is None else scheduler(opt)
    order = None if batch_size is None else batch_order(seed, len(x), batch_size, steps)
    compare = loss or (F.mse_loss if y.is_floating_point() else F.cross_entropy)
    norms = []
    for t in range(steps):
        xb, yb = (x, y) if order is None else (x[order[t]], y[order[t]])
        opt.zero_grad()
        compare(net(xb), yb).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), math.inf if clip is None else clip)
        norms.append(norm.item())
        opt.step()
        if schedule is not None:
            schedule.step()
    return net.eval(), norms


def loop(recipe, x, y, seed, steps, lr, *, order_seed=None, **settings):
    net = drawing(recipe.single(seed, dtype=x.dtype), seed)
    order = seed if order_seed is None else order_seed
    return fit(net, x, y, seed=order, steps=steps, lr=lr, **settings)


def assert_same(run, nets, tolerance=1e-9, without=()):
    """Compare whole parameter vectors, but for the parameters named in ``without``."""
    for i, net in enumerate(nets):
        ours, theirs = run.member(i).state_dict(), dict(net.named_parameters())
        names = [name for name in theirs if name not in without]
        got, want = (torch.cat([d[n].detach().flatten() for n in names]) for d in (ours, theirs))
        if not without:
            assert torch.equal(got, run.network.parameter_vectors()[i])
        assert (got - want).norm() / want.norm() < tolerance, i
