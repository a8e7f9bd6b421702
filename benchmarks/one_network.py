"""One network proves nothing: how often a comparison on a single seed names the wrong winner.

The README's table; 500 networks of each kind take four minutes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from relubook.evidence.data import dataset
from relubook.evidence.statistics import interval
from relubook.training.recipe import Recipe
from relubook.training.train import train

RATES = (0.001, 0.01)
NETWORKS = 500


def accuracies(seeds: Sequence[int], lr: float, **kind: str) -> list[float]:
    """Train small networks of a kind on the digits; return their test accuracies by seed."""
    digits = dataset("digits")
    recipe = Recipe(digits.features, 32, digits.classes, hidden=4, **kind)
    run = train(
        recipe.stack(seeds), digits.train.x, digits.train.y, steps=300, lr=lr, batch_size=64,
        record=[], validation=(digits.test.x, digits.test.y),
    )  # fmt: skip
    return run.validation_accuracy[-1].tolist()


def benchmarks(networks: int = NETWORKS) -> list[dict]:
    torch.set_num_threads(1)
    entries = []
    for lr in RATES:
        plain = accuracies(range(networks), lr)
        for kind in ({"normalization": "batch"}, {"activation": "leaky_relu"}):
            (name,) = kind.values()
            flips = flipped_verdicts(plain, accuracies(range(networks), lr, **kind))
            ahead, low, high = (100 * end for end in flips.difference)
            facts = {
                f"plain ahead by points ({low:.2f} to {high:.2f})": ahead,
                "share of pairs that name the wrong winner": flips.flipped,
                "the same, both of one seed": flips.same_seed,
                "share of ties": flips.ties,
                "pairs needed": flips.needed,
            }
            entries += [
                {"name": f"plain or {name}, {lr:g}: {what}", "ratio": x, "bar": None, "holds": None}
                for what, x in facts.items()
            ]
    return entries


class FlippedVerdicts(NamedTuple):
    """How far a comparison of two remedies hangs on the seeds.

    Attributes:
        difference: Mean difference, first minus second, and both ends of its 95% interval.
        flipped: Share of pairs of different seeds in which the worse on average is ahead.
        same_seed: The same for pairs that share their seed.
        ties: Share of the pairs of different seeds that come out equal.
        needed: Pairs of equal seeds for a 95% interval without 0, with a probability of about 80%.
    """

    difference: tuple[float, float, float]
    flipped: float
    same_seed: float
    ties: float
    needed: int


def flipped_verdicts(first: Sequence[float], second: Sequence[float]) -> FlippedVerdicts:
    """Ask how often one network of each remedy, numbers (n,) by seed, names the wrong winner."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired samples must have one length, not {len(a)} and {len(b)}")
    paired = a - b
    difference = interval(paired, within=None)
    ahead = difference[0]
    sign = math.copysign(1.0, ahead)
    apart = (a[:, None] - b)[~np.eye(len(a), dtype=bool)]
    needed = 2
    if (spread := float(np.std(paired, ddof=1))) and ahead:
        reach = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
        needed = max(2, math.ceil((reach * spread / ahead) ** 2))
    return FlippedVerdicts(
        difference=difference,
        flipped=float((sign * apart < 0).mean()),
        same_seed=float((sign * paired < 0).mean()),
        ties=float((apart == 0).mean()),
        needed=needed,
    )
