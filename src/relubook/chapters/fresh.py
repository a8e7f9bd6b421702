"""Fresh networks: what their scale does in the first steps, and inputs to try them on."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relubook.training.stack import Recipe
from relubook.training.train import crossed, train_many

__all__ = ["Fate", "correlated", "first_steps", "mean_cosine"]


class Fate(NamedTuple):
    """What the first steps of training make of networks; a number a network, shape (members,).

    Attributes:
        born: Share of the hidden units that are dead on the training inputs before training.
        stepped: The same after one step; NaN for a network that has overflowed.
        gradient: Norm of the first gradient.
        moved: How far the parameters have gone at the end, as a share of their norm at birth;
            NaN or infinite for a network that has overflowed.
        diverged: Whether loss or parameters are no longer finite at the end, bool.
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
    optimizer: str,
    steps: int = 100,
    batch_size: int = 64,
) -> dict[float, Fate]:
    """Train networks for a few steps at each of several rates and return their fates.

    The seeds are the same at each rate, so that the fates are paired.

    Args:
        recipe: The networks; all hidden layers equally wide.
        x: Inputs, shape (n, inputs).
        y: Labels, integers of shape (n,).
        seeds: The members' seeds; a number m stands for ``range(m)``.
        rates: Learning rates, all different.
        optimizer: As for :func:`relubook.training.train.train_many`.
        steps: Number of steps, at least 1.
        batch_size: Examples a step.

    Returns:
        The fate by rate.

    Raises:
        ValueError: If the hidden widths differ, a rate is named twice, there is none, or
            ``steps`` is below 1; and as :func:`relubook.training.train.train_many` does.
    """
    if len(set(recipe.hidden_widths)) != 1:
        raise ValueError(f"hidden layers must be equally wide, not {recipe.hidden_widths}")
    if not rates or len(set(rates)) != len(rates):
        raise ValueError(f"rates must be different and at least one, not {list(rates)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    members, lr = crossed(seeds, rates)
    run = train_many(
        recipe, x, y,
        seeds=members, lr=lr, steps=steps, optimizer=optimizer, batch_size=batch_size, record=[1],
    )  # fmt: skip
    first = recipe.stack(members).parameter_vectors()
    moved = (run.network.parameter_vectors() - first).norm(dim=1) / first.norm(dim=1)
    dead = run.dead.mean(2)
    measured = (dead[0], dead[1], run.gradient_norm[1], moved, run.diverged >= 0, run.accuracy[-1])
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

    Raises:
        ValueError: If ``rows`` or ``features`` is below 1, or ``cosine`` lies outside [0, 1].
    """
    if rows < 1 or features < 1:
        raise ValueError(f"need rows and features >= 1, not {rows} and {features}")
    if not 0 <= cosine <= 1:
        raise ValueError(f"cosine must lie between 0 and 1, not {cosine!r}")
    shared = torch.randn(1, features, generator=generator)
    own = torch.randn(rows, features, generator=generator)
    return math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * own


def mean_cosine(x: Tensor) -> float:
    """Return the mean cosine of the angle between two different rows.

    Args:
        x: Inputs, shape (n, features), n >= 2.

    Returns:
        The mean over all pairs; a row of zeros counts as orthogonal to all.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"x must have two rows or more, not the shape {tuple(x.shape)}")
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    # The squared length of the sum holds every pair twice, and each row with itself.
    total = unit.sum(0).square().sum() - unit.square().sum()
    return float(total / (len(x) * (len(x) - 1)))
