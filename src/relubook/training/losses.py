"""One definition of each loss: torch's, of one network's outputs and targets, for many at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHORT = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}
ELEMENTWISE = (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss)
LABELS = (F.cross_entropy, nn.CrossEntropyLoss)
"""Losses that take integers as numbers of classes."""
SAME_SHAPE = (*ELEMENTWISE, nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss)
"""Losses that take targets of the outputs' shape alone."""
FUNCTIONS = {
    name: value
    for name, value in vars(F).items()
    if name[0] != "_" and (name.endswith(("_loss", "_entropy", "_logits")) or name == "kl_div")
}
CLASSES = {name: value for name, value in vars(nn).items() if name.endswith("Loss")}


def loss_function(loss: Any, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function of one network's outputs and targets that a loss stands for.

    Args:
        loss: A name of ``torch.nn.functional`` or ``torch.nn`` (or ``"mse"``, ``"mae"``,
            ``"huber"``), a class or instance of a loss of ``torch.nn``, or any function of one
            network's outputs and targets (batch, ...) that returns their mean loss and that vmap
            can map. None: cross-entropy if y holds integers, else the mean squared error.
        y: Labels or targets, which None goes by.

    Raises ValueError if the name is unknown or the loss no mean, TypeError if it is no function.
    """
    if loss is None:
        loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    if isinstance(loss, str):
        known = SHORT | FUNCTIONS | CLASSES
        if loss not in known:
            names = ", ".join(SHORT)
            raise ValueError(f"unknown loss {loss!r}; known: {names} and the losses of torch")
        loss = known[loss]
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        loss = loss()
    if not callable(loss):
        raise TypeError(f"loss must be a name or a function, not {loss!r}")
    if getattr(loss, "reduction", "mean") != "mean":
        raise ValueError(f"loss must have the reduction 'mean', not {loss.reduction!r}")
    return loss


def of_each_member(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss of outputs and targets (members, batch, ...) with one number a member."""
    if loss in ELEMENTWISE:
        return lambda out, y: loss(out, y, reduction="none").flatten(1).mean(1)
    if loss is not F.cross_entropy:
        return torch.func.vmap(loss)

    def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
        # Members take torch's place of the examples, and classes come second: much the fastest.
        y = y.transpose(1, 2) if y.is_floating_point() else y
        return F.cross_entropy(out.transpose(1, 2), y, reduction="none").flatten(1).mean(1)

    return cross_entropy


def of_kind(loss: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a loss is one of these functions and classes, or of one of the classes."""
    return any(
        loss is kind or (isinstance(kind, type) and isinstance(loss, kind)) for kind in kinds
    )
