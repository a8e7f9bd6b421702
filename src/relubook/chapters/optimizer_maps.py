"""Dead units over the learning rate, the optimizer, the depth, and the scale of the targets."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook.evidence.data import Split, dataset
from relubook.evidence.results import computation
from relubook.training.recipe import Recipe
from relubook.training.stack import Stack
from relubook.training.train import TrainingRun, train

MAP_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "Nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "RMSprop": torch.optim.RMSprop,
}

MAP_RATES = (
    0.00032, 0.00056, 0.001, 0.0018, 0.0032, 0.0056, 0.01, 0.018, 0.032, 0.056,
    0.1, 0.18, 0.32, 0.56, 1.0, 1.8, 3.2, 5.6, 10.0,
)  # fmt: skip
"""Four learning rates a decade, so that ten times a rate is a rate again."""


def train_digits(
    seeds: int | Sequence[int], *, optimizer: str, depth: int = 3, width: int = 32, **settings: Any
) -> TrainingRun:
    """Train networks on the digits in the map's setting: He's draw, zero biases, cross-entropy.

    ``depth`` counts linear maps; settings are those of ``train``, by default 300 steps (18 passes)
    of 64 examples. The validation set is that of the digits.
    """
    digits = dataset("digits")
    stack = Recipe(digits.features, width, digits.classes, hidden=depth - 1).stack(seeds)
    settings = {"steps": 300, "batch_size": 64} | settings
    settings |= {"validation": (digits.validation.x, digits.validation.y)}
    settings["optimizer"] = MAP_OPTIMIZERS[optimizer]
    return train(stack, digits.train.x, digits.train.y, **settings)


def matched_rate(optimizer: str, rate: float) -> float:
    """Return the learning rate that matches an effective rate: a tenth but for plain SGD.

    A constant gradient g moves SGD by ``lr g`` a step, and momentum m, in the long run, by
    ``lr g / (1 - m)``. Adam, whose step hardly depends on g, gets the factor of momentum 0.9.
    """
    return rate if optimizer == "SGD" else rate / 10


def train_diabetes(
    seeds: int | Sequence[int],
    *,
    optimizer: str,
    target_sd: float = 1.0,
    target_mean: float = 0.0,
    depth: int = 3,
    **settings: Any,
) -> TrainingRun:
    """Train networks of 32 units a layer to predict the progress of diabetes, by squared error.

    Settings are those of ``train``, by default 300 steps (36 passes) of 32 examples.
    """
    data = dataset("diabetes").train
    stack = Recipe(data.x.shape[1], 32, 1, hidden=depth - 1).stack(seeds)
    settings = {"steps": 300, "batch_size": 32} | settings
    settings["optimizer"] = MAP_OPTIMIZERS[optimizer]
    return train(stack, data.x, target_mean + target_sd * data.y, **settings)


def train_single_relu(
    seeds: Sequence[int],
    *,
    optimizer: str,
    target_sd: float = 1.0,
    target_mean: float = 0.0,
    inputs: int = 10,
    n: int = 256,
    steps: int = 1000,
    **settings: Any,
) -> tuple[TrainingRun, Tensor]:
    """Train single ReLUs ``relu(w x + b)`` to copy another one, by squared error, full batch.

    Inputs are standard normal, each seed's own. The target is a ReLU with random weights and no
    bias, scaled to ``target_sd``, plus ``target_mean``; w starts with He's draw, b at 0. Returns
    the run of the linear map, and which units are silent on all n inputs at the end, (members,).
    """
    xs, ys = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, inputs, generator=generator)
        y = (x @ torch.randn(inputs, 1, generator=generator)).relu()
        xs.append(x)
        ys.append(target_mean + target_sd * y / y.std())
    x, y = torch.stack(xs), torch.stack(ys)
    stack = Recipe(inputs, (), 1).stack(seeds)
    settings |= {"steps": steps, "optimizer": MAP_OPTIMIZERS[optimizer]}
    run = train(stack, x, y, loss=lambda out, y: F.mse_loss(out.relu(), y), **settings)
    with torch.no_grad():
        dead = (run.network(x) <= 0).flatten(1).all(1)
    return run, dead


def test_accuracy(network: Stack, split: Split) -> Tensor:
    """Return each member's share of right labels, (members,); non-finite outputs name class 0."""
    network.eval()
    with torch.no_grad():
        named = network(split.x).nan_to_num(0.0, 0.0, 0.0).argmax(-1)
    return (named == split.y).to(torch.float64).mean(-1)


test_accuracy.__test__ = False  # type: ignore[attr-defined]


@computation(
    "optimizer-map",
    grid={"optimizer": list(MAP_OPTIMIZERS), "depth": [3, 10], "lr": list(MAP_RATES)},
    seeds=50,
)
def optimizer_map(
    seeds: Sequence[int], *, optimizer: str, depth: int, lr: float
) -> Mapping[str, Any]:
    """Train networks of 32 units a layer on the digits and return what became of each.

    By seed the dead share of hidden units (NaN once non-finite), validation and test accuracy,
    the training loss at the start and the end, and whether the network is non-finite, and has a
    hidden layer that is wholly dead (``constant``).
    """
    run = train_digits(seeds, optimizer=optimizer, lr=lr, depth=depth, record=[])
    digits = dataset("digits")
    return {
        "dead": run.dead_share(),
        "validation": test_accuracy(run.network, digits.validation),
        "accuracy": test_accuracy(run.network, digits.test),
        "start": run.loss[0],
        "loss": run.loss[-1],
        "diverged": run.diverged >= 0,
        "constant": (run.dead[-1] == 1).any(-1),
    }


@computation(
    "target-scale",
    grid={
        "model": ["single", "network"],
        "optimizer": ["SGD", "momentum", "Adam"],
        "rate": [0.01, 0.03, 0.1, 0.3, 1.0],
        "sd": [1.0, 0.1, 0.01, 0.001],
        "mean": [0.0, 1.0],
    },
    seeds=60,
)
def target_scale(
    seeds: Sequence[int], *, model: str, optimizer: str, rate: float, sd: float, mean: float
) -> Mapping[str, Any]:
    """Train single ReLUs or networks on targets of a given scale at matched effective rates.

    By seed the dead share (NaN once non-finite), the last loss in units of the targets' variance
    (``error``), and whether the network is non-finite (``diverged``).
    """
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": matched_rate(optimizer, rate)}
    settings |= {"target_sd": sd, "target_mean": mean, "record": []}
    if model == "single":
        run, silent = train_single_relu(seeds, **settings)
        dead = silent.to(torch.float64)
        dead[run.diverged >= 0] = math.nan
    else:
        run = train_diabetes(seeds, **settings)
        dead = run.dead_share()
    return {"dead": dead, "error": run.loss[-1] / sd**2, "diverged": run.diverged >= 0}
