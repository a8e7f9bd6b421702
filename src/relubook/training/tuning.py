"""Choose a learning rate for each competitor on the same grid, with seeds of its own."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from relubook.training.run import crossed
from relubook.training.train import train

__all__ = ["best_rate", "tune_rate"]


def best_rate(rates: Sequence[float], scores: Sequence[float] | Tensor) -> float:
    """Return the rate with the best score, unless it stands at the edge of the grid.

    There are three or more rates in ascending order, and one score for each, more being better
    and NaN the worst; else, or if the grid has to be extended, ValueError is raised.
    """
    if len(rates) < 3 or list(rates) != sorted(rates):
        raise ValueError(f"rates must be three or more in ascending order, not {list(rates)}")
    values = torch.as_tensor(scores, dtype=torch.float64)
    if values.shape != (len(rates),):
        shape = tuple(values.shape)
        raise ValueError(f"scores must be one score for each of {len(rates)} rates, not {shape}")
    if values.isnan().all():
        raise ValueError("scores must be numbers, but every score is NaN")
    best = int(values.nan_to_num(-math.inf, math.inf, -math.inf).argmax())
    if best in (0, len(rates) - 1):
        grid = list(rates)
        raise ValueError(
            f"the best rate, {rates[best]}, is at the edge of the grid {grid}: extend it"
        )
    return rates[best]


def tune_rate(
    recipe: Any, data: Any, rates: Sequence[float], *, seeds: int | Iterable[int], **settings: Any
) -> tuple[float, Tensor]:
    """Return the rate with the best mean score on the validation part.

    The score is the accuracy at the end for classes, the negative loss for targets. A network
    that overflows scores 0, or minus infinity.

    Args:
        recipe: The networks: anything with ``stack(seeds)``.
        data: Trained on its train part, judged on its validation part, each with ``x`` and ``y``.
        rates: Learning rates, three or more, in ascending order.
        seeds: Seeds of the tuning, not to be used again in the comparison.
        settings: Passed on to :func:`relubook.training.train.train`: steps, optimizer and so on.

    Returns the best rate (else ValueError, as :func:`best_rate`), and the mean score by rate.
    """
    members, lr = crossed(seeds, rates)
    stack = recipe.stack(members, dtype=data.train.x.dtype)
    parts = (data.train.x, data.train.y), (data.validation.x, data.validation.y)
    run = train(stack, *parts[0], lr=lr, validation=parts[1], **{"record": []} | settings)
    classes = not data.train.y.is_floating_point()
    score = run.validation_accuracy[-1] if classes else -run.validation_loss[-1]
    fine = (run.diverged < 0) & ~score.isnan()
    score = score.where(fine, 0.0 if classes else -math.inf)
    by_rate = score.view(len(rates), -1).mean(1)
    return best_rate(rates, by_rate), by_rate
