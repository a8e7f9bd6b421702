"""One definition of each loss: torch's, of one network's outputs and targets, for many at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHORT = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}
ELEMENTWISE = (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss)
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
            network's outputs and targets (batch, ...) that returns their mean loss and that
            ``torch.func.vmap`` can map. None stands for cross-entropy if y holds integers, else
            the mean squared error.
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


def takes_labels(loss: Any, y: Tensor) -> bool:
    """Whether a loss takes y as numbers of classes."""
    return not y.is_floating_point() and (
        loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    )


def same_shape(loss: Any) -> bool:
    """Whether a loss compares targets with outputs of the same shape, unless it takes labels."""
    kinds = (nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.CrossEntropyLoss)
    return loss in (*ELEMENTWISE, F.cross_entropy) or isinstance(loss, kinds)


def classifies(out: Tensor, y: Tensor) -> bool:
    """Whether targets are labels of the outputs: integers, one for each vector of outputs."""
    return not y.is_floating_point() and out.shape[:-1] == y.shape
