from functools import partial

import pytest
import torch
from recipe_kinds import KINDS, SEEDS, assert_same, examples, fit, loop, make, train_many
from torch import nn
from torch.optim import lr_scheduler

from relubook.training.optimizers import ELEMENTWISE, NAMED, REFUSED
from relubook.training.stack import stack_of
from relubook.training.train import train

CASES = {
    "SGD": {},
    "SGD momentum": {"momentum": 0.9, "weight_decay": 1e-3},
    "SGD nesterov": {"momentum": 0.8, "nesterov": True},
    "Adam": {"betas": (0.8, 0.99), "weight_decay": 1e-3},
    "Adam amsgrad": {"amsgrad": True, "foreach": True},
    "AdamW": {"weight_decay": 0.1, "eps": 1e-6},
    "Adamax": {"weight_decay": 1e-3},
    "NAdam": {"momentum_decay": 0.01, "decoupled_weight_decay": True},
    "RAdam": {"weight_decay": 1e-3},
    "Adadelta": {"rho": 0.8, "weight_decay": 1e-3},
    "Adagrad": {"lr_decay": 0.01},
    "ASGD": {"lambd": 1e-3, "t0": 5},
    "RMSprop": {"alpha": 0.9, "weight_decay": 1e-3},
    "RMSprop centered": {"momentum": 0.5, "centered": True},
    "Rprop": {"etas": (0.6, 1.1)},
    "Adafactor": {"weight_decay": 0.01},
    "Muon": {},
}


class Whole(torch.optim.Optimizer):
    """An optimizer whose step depends on all of a network's gradient, tensor by tensor."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad / (p.grad.norm() + 0.1)


def case(name):
    kind = getattr(torch.optim, name.split()[0], None)
    if kind is None:
        pytest.skip(f"this torch has no {name}")
    # Muon takes matrices only.
    return kind, CASES[name], ({"bias": False} if name == "Muon" else {})


def test_every_optimizer_of_torch_has_a_case():
    cases = {name.split()[0] for name in CASES}
    assert {kind.__name__ for kind in NAMED.values()} - cases == set(REFUSED)
    assert set(NAMED.values()) >= ELEMENTWISE


@pytest.mark.parametrize("widths", [(7, 5), (2, 2)])
@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_equals_the_loop(name, widths):
    kind, options, changes = case(name)
    recipe = make(widths=widths, **changes)
    x, y = examples(recipe)
    settings = {"steps": 15, "batch_size": 16, "optimizer": kind, **options}
    for rates in ([0.01] * 3, [0.03, 0.01, 0.01]):
        run = train_many(recipe, x, y, seeds=SEEDS, lr=rates, **settings)
        nets = [
            loop(recipe, x, y, s, lr=r, **settings)[0] for s, r in zip(SEEDS, rates, strict=True)
        ]
        assert_same(run, nets)
        assert run.lr.tolist() == rates


STRUCTURES = ["plain", "maxout block", "prelu, one slope a unit", "module", "batch", "all"]


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "Muon"])
def test_every_optimizer_on_every_structure_equals_the_loop(structure, name):
    kind, options, _ = case(name)
    recipe = make(**KINDS[structure])
    x, y = examples(recipe)
    settings = {"batch_size": 13, "clip": 1.0, "optimizer": kind, **options}
    run = train_many(recipe, x, y, seeds=[5], steps=30, lr=0.01, **settings)
    without = set()
    if recipe.normalization == "batch" and kind not in (torch.optim.SGD, torch.optim.Adadelta):
        # The true gradient of a bias in front of batch normalization is 0. What rounding leaves
        # of it makes the bias move by a trifle, which some optimizers scale up to a full step:
        # its sign is chance, and the network does not see it.
        without = {f"linear{layer}.bias" for layer in range(1, recipe.hidden + 1)}
    net, _ = loop(recipe, x, y, 5, 30, 0.01, **settings)
    assert_same(run, [net], without=without)


@pytest.mark.parametrize(
    "make_it",
    [
        Whole,
        lambda groups: Whole(groups, lr=0.0),
        partial(torch.optim.Adafactor, weight_decay=0.1),
        partial(torch.optim.SGD, momentum=0.9),
        lambda groups: torch.optim.Adam(groups, amsgrad=True),
    ],
)
@pytest.mark.parametrize("widths", [(7, 5), (2, 2)])
def test_functions_and_optimizers_of_ones_own_equal_the_loop(make_it, widths):
    """What mixes a tensor's numbers sees those of one member only, in torch's layout."""
    recipe = make(widths=widths)
    x, y = examples(recipe)
    run = train_many(recipe, x, y, seeds=SEEDS, steps=10, lr=0.02, optimizer=make_it)

    def oracle(parameters, lr):
        return make_it(
            [{"params": list(parameters), "lr": lr}], **({"lr": lr} if make_it is Whole else {})
        )

    assert_same(run, [loop(recipe, x, y, s, 10, 0.02, optimizer=oracle)[0] for s in SEEDS])


def test_matrices_of_any_module_are_as_a_single_network_has_them():
    def build():
        return nn.Sequential(
            nn.Linear(3, 9, bias=False), nn.ReLU(), nn.Linear(9, 4, bias=False)
        ).double()

    x, y = examples(make())
    settings = {"steps": 10, "lr": 0.02, "optimizer": torch.optim.Muon}
    run = train(stack_of(build, SEEDS), x, y, **settings)
    nets = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        nets.append(fit(build(), x, y, seed=seed, **settings)[0])
    assert_same(run, nets)


@pytest.mark.parametrize("rates", [[0.01] * 3, [0.01, 0.01, 0.03], [0.03, 0.02, 0.01]])
@pytest.mark.parametrize("kind", [torch.optim.Adam, "AdamW"])
def test_fused_updates_equal_the_loop(kind, rates):
    recipe = make(widths=(70, 60))
    x, y = examples(recipe)
    settings = {
        "steps": 10, "weight_decay": 0.01, "batch_size": 16,
        "scheduler": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    }  # fmt: skip
    run = train_many(recipe, x, y, seeds=SEEDS, lr=rates, optimizer=kind, **settings)
    theirs = getattr(torch.optim, kind) if isinstance(kind, str) else kind
    rates = zip(SEEDS, rates, strict=True)
    assert_same(
        run, [loop(recipe, x, y, s, lr=r, optimizer=theirs, **settings)[0] for s, r in rates]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sgd_steps_right_in_16_bits(dtype):
    recipe = make(widths=(70, 60))
    x, y = examples(recipe, dtype=dtype)
    stack = recipe.stack(2, dtype=dtype)
    before = stack.parameter_vectors().float()
    run = train(stack, x, y, steps=1, lr=0.5, optimizer="sgd")
    moved = (stack.parameter_vectors().float() - before).norm(dim=1)
    torch.testing.assert_close(moved, 0.5 * run.gradient_norm[-1], rtol=0.05, atol=0)
