"""Choose a learning rate for each competitor on the same grid, with seeds of its own."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from relubook.evidence.data import Dataset
from relubook.training.stack import Recipe, _seeds
from relubook.training.train import crossed, train_many

__all__ = ["tune_rate"]


def tune_rate(
    recipe: Recipe,
    data: Dataset,
    rates: Sequence[float],
    *,
    seeds: int | Iterable[int],
    **settings: Any,
) -> tuple[float, Tensor]:
    """Return the rate with the best mean score on the validation part.

    The score is the accuracy at the end for classes, the negative loss for targets. A network
    that overflows scores 0, or minus infinity.

    Args:
        recipe: The networks.
        data: Trained on its train part, judged on its validation part.
        rates: Learning rates, three or more, in ascending order.
        seeds: Seeds of the tuning, not to be used again in the comparison; a number m stands for
            ``range(m)``.
        settings: Passed on to :func:`relubook.training.train.train_many`: steps, optimizer and so on.

    Returns:
        The best rate, and the mean score by rate, shape (rates,).

    Raises:
        ValueError: If there are fewer than three rates, or the best one stands at an edge of the
            grid, which then has to be extended.
    """
    if len(rates) < 3 or list(rates) != sorted(rates):
        raise ValueError(f"rates must be three or more in ascending order, not {list(rates)}")
    members, lr = crossed(_seeds(seeds), rates)
    run = train_many(
        recipe,
        data.train.x,
        data.train.y,
        seeds=members,
        lr=lr,
        validation=(data.validation.x, data.validation.y),
        **{"record": []} | settings,
    )
    classes = not data.train.y.is_floating_point()
    score = run.validation_accuracy[-1] if classes else -run.validation_loss[-1]
    score = score.nan_to_num(nan=0.0 if classes else -float("inf"))
    score = score.where(run.diverged < 0, 0.0 if classes else -float("inf"))
    by_rate = score.view(len(rates), -1).mean(1)
    best = int(by_rate.argmax())
    if best in (0, len(rates) - 1):
        raise ValueError(
            f"the best rate, {rates[best]}, stands at the edge of the grid {list(rates)}: extend it"
        )
    return rates[best], by_rate
