"""One network proves nothing: how often a comparison on a single seed names the wrong winner."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relubook._optional import require
from relubook.evidence.data import dataset
from relubook.evidence.results import computation
from relubook.evidence.statistics import Estimate, mean_interval
from relubook.training.recipe import Recipe
from relubook.training.train import train

__all__ = ["FlippedVerdicts", "flipped_verdicts"]


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
    kinds = {"activation": activation, "normalization": normalization}
    stack = Recipe(digits.features, 32, digits.classes, hidden=4, **kinds).stack(seeds)
    held_out = (digits.test.x, digits.test.y)
    run = train(
        stack, digits.train.x, digits.train.y, steps=300, lr=lr, batch_size=64, record=[],
        validation=held_out,
    )  # fmt: skip
    return {"accuracy": run.validation_accuracy[-1], "dead": run.dead[-1].mean(1)}


@dataclass(frozen=True)
class FlippedVerdicts:
    """How far a comparison of two remedies hangs on the seeds.

    Attributes:
        difference: Mean difference, first minus second, over all seeds, with its 95% interval.
        flipped: Share of pairs of one network of each, of independent seeds, in which the one
            that is worse on average comes out ahead. 0 or 1/2 if the mean difference is 0.
        same_seed: The same for pairs that share their seed.
        ties: Share of the independent pairs that come out equal.
        needed: Number of pairs of equal seeds after which a 95% interval of the mean difference
            leaves out 0 with a probability of about 80%.
    """

    difference: Estimate
    flipped: float
    same_seed: float
    ties: float
    needed: int


def flipped_verdicts(first: Sequence[float], second: Sequence[float]) -> FlippedVerdicts:
    """Ask how often one network of each would have named the wrong winner.

    Args:
        first: One number a network, shape (n,), such as test accuracies.
        second: The same under the other remedy, seeds in the same order.

    Returns:
        The shares over all n (n - 1) pairs of different seeds and over the n pairs of equal ones.

    Raises:
        ValueError: If the lengths differ, there are fewer than two, or one is not finite.
    """
    np = require("numpy", "comparisons")
    stats = require("scipy.stats", "comparisons")
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired samples must have one length, not {len(a)} and {len(b)}")
    difference = mean_interval(a - b)
    n, sign = len(a), math.copysign(1.0, difference.value)
    apart = a[:, None] - b[None, :]
    off = ~np.eye(n, dtype=bool)
    spread = float(np.std(a - b, ddof=1))
    effect = abs(difference.value) / spread if spread else math.inf
    needed = 2
    if math.isfinite(effect) and effect > 0:
        reach = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
        needed = max(2, math.ceil((reach / effect) ** 2))
    return FlippedVerdicts(
        difference=difference,
        flipped=float((sign * apart[off] < 0).mean()),
        same_seed=float((sign * (a - b) < 0).mean()),
        ties=float((apart[off] == 0).mean()),
        needed=needed,
    )
