"""One network proves nothing: how often a comparison on a single seed names the wrong winner."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from relubook._optional import require
from relubook.evidence.data import dataset
from relubook.evidence.results import computation
from relubook.evidence.statistics import Estimate, mean_interval
from relubook.training.recipe import Recipe
from relubook.training.train import train


@computation(
    "one-network",
    grid={
        "activation": ["relu", "leaky_relu"],
        "normalization": ["none", "batch"],
        "lr": [0.001, 0.01],
    },
    seeds=500,
)
def one_network(
    seeds: Sequence[int], *, activation: str, normalization: str, lr: float
) -> Mapping[str, Any]:
    """Train small networks on the digits; return test accuracy and dead share by seed."""
    digits = dataset("digits")
    recipe = Recipe(
        digits.features, 32, digits.classes, hidden=4,
        activation=activation, normalization=normalization,
    )  # fmt: skip
    run = train(
        recipe.stack(seeds), digits.train.x, digits.train.y, steps=300, lr=lr, batch_size=64,
        record=[], validation=(digits.test.x, digits.test.y),
    )  # fmt: skip
    return {"accuracy": run.validation_accuracy[-1], "dead": run.dead[-1].mean(1)}


class FlippedVerdicts(NamedTuple):
    """How far a comparison of two remedies hangs on the seeds.

    Attributes:
        difference: Mean difference, first minus second, with its 95% interval.
        flipped: Share of pairs of different seeds in which the worse on average is ahead.
        same_seed: The same for pairs that share their seed.
        ties: Share of the pairs of different seeds that come out equal.
        needed: Pairs of equal seeds for a 95% interval without 0, with a probability of about 80%.
    """

    difference: Estimate
    flipped: float
    same_seed: float
    ties: float
    needed: int


def flipped_verdicts(first: Sequence[float], second: Sequence[float]) -> FlippedVerdicts:
    """Ask how often one network of each remedy, numbers (n,) by seed, names the wrong winner."""
    np = require("numpy", "comparisons")
    stats = require("scipy.stats", "comparisons")
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired samples must have one length, not {len(a)} and {len(b)}")
    paired, difference = a - b, mean_interval(a - b)
    sign = math.copysign(1.0, difference.value)
    apart = (a[:, None] - b)[~np.eye(len(a), dtype=bool)]
    needed = 2
    if (spread := float(np.std(paired, ddof=1))) and difference.value:
        reach = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
        needed = max(2, math.ceil((reach * spread / difference.value) ** 2))
    return FlippedVerdicts(
        difference=difference,
        flipped=float((sign * apart < 0).mean()),
        same_seed=float((sign * paired < 0).mean()),
        ties=float((apart == 0).mean()),
        needed=needed,
    )
