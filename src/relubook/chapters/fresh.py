"""Fresh networks: what their scale does in the first steps, and inputs to try them on."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relubook.training.recipe import Recipe
from relubook.training.train import crossed, train

__all__ = ["Fate", "correlated", "first_steps", "mean_cosine"]


class Fate(NamedTuple):
    """What the first steps of training make of networks, each (members,); NaN after overflow."""

    born: Tensor  # share of the hidden units that are dead on the inputs before training
    stepped: Tensor  # the same after one step
    gradient: Tensor  # norm of the first gradient
    moved: Tensor  # distance of the parameters at the end, as a share of their norm at birth
    diverged: Tensor  # whether loss or parameters are not finite at the end
    accuracy: Tensor  # on the training set at the end


def first_steps(
    recipe: Recipe, x: Tensor, y: Tensor, *, seeds: Any, rates: Sequence[float], **settings: Any
) -> dict[float, Fate]:
    """Train the same seeds at each rate, on inputs (n, inputs) and labels (n,); return their fates.

    ``settings`` (steps, optimizer and so on) are those of ``train``.
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
    """Draw normal inputs (rows, features), of which any two have about a given cosine in [0, 1].

    One state of the generator gives the same shared and own parts at every cosine.
    """
    shared = torch.randn(1, features, generator=generator)
    own = torch.randn(rows, features, generator=generator)
    return math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * own


def mean_cosine(x: Tensor) -> float:
    """Return the mean cosine of two different rows; a row of zeros is orthogonal to all."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    # The squared length of the sum holds every pair twice, and each row with itself.
    total = unit.sum(0).square().sum() - unit.square().sum()
    return float(total / (len(x) * (len(x) - 1)))
