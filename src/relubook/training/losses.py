"""One definition of each loss: torch's, of one network's outputs and targets, for many at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MemberLoss", "classifies", "member_loss"]

MemberLoss = Callable[[Tensor, Tensor], Tensor]

SHORT = {"mse": "mse_loss", "mae": "l1_loss", "huber": "huber_loss"}
ELEMENTWISE = (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss)


def member_loss(loss: Any, y: Tensor) -> MemberLoss:
    """Return a function of all members' outputs and targets that gives each one's loss.

    Args:
        loss: A name of ``torch.nn.functional`` (or ``"mse"``, ``"mae"``, ``"huber"``), a class or
            instance of a loss of ``torch.nn``, or any function of one network's outputs (batch,
            ...) and targets (batch, ...) that returns one number and that ``torch.func.vmap`` can
            map. None stands for cross-entropy if y holds integers, else the mean squared error.
        y: Labels or targets, which None goes by.

    Returns:
        A function of outputs (members, batch, ...) and targets (members, batch, ...) that returns
        (members,).

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is no function.
    """
    if loss is None:
        loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    if isinstance(loss, str):
        found = getattr(F, SHORT.get(loss, loss), None) or getattr(nn, loss, None)
        if found is None:
            raise ValueError(
                f"unknown loss {loss!r}; known: cross_entropy, {', '.join(SHORT)} and the names of "
                "torch.nn.functional"
            )
        loss = found
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        loss = loss()
    if not callable(loss):
        raise TypeError(f"loss must be a name or a function, not {loss!r}")
    if loss in ELEMENTWISE:
        return lambda out, y: loss(out, y, reduction="none").flatten(1).mean(1)
    if loss is F.cross_entropy:
        return _cross_entropy
    return torch.func.vmap(loss)


def _cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(out.flatten(0, 1), y.flatten(0, 1), reduction="none")
    return each.view(len(out), -1).mean(1)


def classifies(out: Tensor, y: Tensor) -> bool:
    """Whether targets are labels of the outputs: integers, one for each vector of outputs."""
    return not y.is_floating_point() and out.shape[:2] == y.shape
