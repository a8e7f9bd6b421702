"""Fresh networks: what their scale does in the first steps, and inputs to try them on."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relubook.training.recipe import Recipe
from relubook.training.train import crossed, train

__all__ = ["Fate", "correlated", "first_steps", "mean_cosine"]


class Fate(NamedTuple):
    """What the first steps of training make of networks; a number a network, shape (members,).

    Attributes:
        born: Share of the hidden units that are dead on the training inputs before training.
        stepped: The same after one step; NaN for a network that has overflowed.
        gradient: Norm of the first gradient.
        moved: How far the parameters have gone at the end, as a share of their norm at birth;
            NaN or infinite for a network that has overflowed.
        diverged: Whether loss or parameters are not finite at the end, bool.
        accuracy: Share of the training set classified rightly at the end; NaN after overflow.
    """

    born: Tensor
    stepped: Tensor
    gradient: Tensor
    moved: Tensor
    diverged: Tensor
    accuracy: Tensor


def first_steps(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    *,
    seeds: int | Iterable[int],
    rates: Sequence[float],
    **settings: Any,
) -> dict[float, Fate]:
    """Train networks for a few steps at each of several rates and return their fates.

    The seeds are the same at each rate, so that the fates are paired.

    ``x`` are inputs (n, inputs), ``y`` labels (n,); a number m as ``seeds`` stands for
    ``range(m)``, and ``settings`` (steps, optimizer and so on) are those of ``train``.
    """
    members, lr = crossed(seeds, rates)
    stack = recipe.stack(members)
    first = stack.parameter_vectors()
    run = train(stack, x, y, lr=lr, record=[1], **settings)
    moved = (stack.parameter_vectors() - first).norm(dim=1) / first.norm(dim=1)
    born, stepped = run.dead_share(0), run.dead_share(1)
    measured = (born, stepped, run.gradient_norm[1], moved, run.diverged >= 0, run.accuracy[-1])
    each = zip(*(values.view(len(rates), -1) for values in measured), strict=True)
    return {rate: Fate(*values) for rate, values in zip(rates, each, strict=True)}


def correlated(rows: int, features: int, cosine: float, *, generator: torch.Generator) -> Tensor:
    """Draw normal inputs that share a direction, so that any two have about a given cosine.

    Args:
        rows: Number of inputs n.
        features: Number of features d.
        cosine: In [0, 1]. With many features the cosine of two rows is near it.
        generator: Source of randomness: first for the shared part, then for the rows' own. One
            state gives the same parts at every cosine.

    Returns:
        ``sqrt(cosine) s + sqrt(1 - cosine) e`` with one s for all rows, shape (n, d), float32; the
        features have mean square 1.
    """
    shared = torch.randn(1, features, generator=generator)
    own = torch.randn(rows, features, generator=generator)
    return math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * own


def mean_cosine(x: Tensor) -> float:
    """Return the mean cosine of the angle between two different rows.

    A row of zeros counts as orthogonal to all.
    """
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    # The squared length of the sum holds every pair twice, and each row with itself.
    total = unit.sum(0).square().sum() - unit.square().sum()
    return float(total / (len(x) * (len(x) - 1)))
