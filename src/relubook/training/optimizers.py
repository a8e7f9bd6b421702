"""Any optimizer of torch, at one rate or at many, over all numbers of a stack."""

import contextlib
import difflib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relubook.training.modules import StackedLinear
from relubook.training.stack import Stack

NAMED = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and torch.optim.Optimizer in kind.__mro__[1:]
}
ELEMENTWISE = {
    NAMED[name]
    for name in (
        "sgd", "adam", "adamw", "adamax", "nadam", "radam", "adadelta", "adagrad", "asgd",
        "rmsprop", "rprop",
    )
}  # fmt: skip
REFUSED = {"LBFGS": "it calls the loss many times a step", "SparseAdam": "gradients are dense"}


class Numbers:
    """All trained parameters of a stack in one piece of memory, and their gradients in another.

    The stack's parameters are views of it while the context lasts.
    """

    def __init__(self, stack: Stack):
        self.parameters = [p for p in stack.parameters() if p.requires_grad]
        if len(types := {p.dtype for p in self.parameters}) != 1:
            raise ValueError(f"stack must have trained parameters of one type, not {types or None}")
        self.members = len(stack)
        self.turned = {id(m.weight) for m in stack.modules() if isinstance(m, StackedLinear)}
        sizes = [p.numel() for p in self.parameters]
        self.values, self.gradient = (
            self.parameters[0].detach().new_zeros(sum(sizes)) for _ in range(2)
        )
        self.gradients = []
        parts = (self.values.split(sizes), self.gradient.split(sizes))
        for parameter, *blocks in zip(self.parameters, *parts, strict=True):
            if stack.members_last:
                shape = (*parameter.shape[1:], self.members)
                value, gradient = (block.view(shape).movedim(-1, 0) for block in blocks)
            else:
                value, gradient = (block.view(parameter.shape) for block in blocks)
            parameter.data, parameter.grad = value.copy_(parameter.detach()), gradient
            self.gradients.append(gradient)

    def groups(self, rates: list[float], elementwise: bool) -> list[dict[str, Any]]:
        """Return groups of views, one a run of equal rates; one a member unless elementwise."""
        if len(set(rates)) == 1 and elementwise:
            self.values.grad = self.gradient
            return [{"params": [self.values], "lr": rates[0]}]
        members, groups = len(rates), []
        cuts = [i for i in range(1, members) if not elementwise or rates[i] != rates[i - 1]]
        for start, stop in itertools.pairwise([0, *cuts, members]):
            views = []
            for parameter, whole in zip(self.parameters, self.gradients, strict=True):
                view, gradient = parameter.data[start:stop], whole[start:stop]
                if not elementwise:
                    view, gradient = view[0], gradient[0]
                    if id(parameter) in self.turned:
                        view, gradient = view.mT, gradient.mT
                view.grad = gradient
                views.append(view)
            groups.append({"params": views, "lr": rates[start]})
        return groups

    def norms(self) -> Tensor:
        """Return the norm of each member's gradient, shape (members,), in 32 bits at least."""
        exact = torch.promote_types(self.values.dtype, torch.float32)
        parts = [
            torch.linalg.vector_norm(each.reshape(self.members, -1), dim=1, dtype=exact)
            for each in self.gradients
        ]
        return torch.stack(parts).norm(dim=0)

    def clip(self, norms: Tensor, largest: float) -> None:
        """Scale down the gradients of members whose norm is larger."""
        factors = (largest / (norms + 1e-6)).clamp(max=1)
        for each in self.gradients:
            each.mul_(factors.view(-1, *[1] * (each.dim() - 1)))

    def finite(self) -> Tensor:
        """Return which members have finite parameters only, shape (members,)."""
        parts = [p.detach().isfinite().reshape(self.members, -1).all(1) for p in self.parameters]
        return torch.stack(parts).all(0)

    def __enter__(self) -> "Numbers":
        return self

    def __exit__(self, *error: object) -> None:
        for parameter in self.parameters:
            value = parameter.detach().clone(memory_format=torch.contiguous_format)
            parameter.data, parameter.grad = value, None


def optimizer_maker(
    optimizer: Any, options: dict[str, Any]
) -> tuple[Callable[..., torch.optim.Optimizer], bool]:
    """Return what makes an optimizer from parameter groups, and whether it is elementwise."""
    if isinstance(optimizer, str):
        if (name := optimizer.lower()) not in NAMED:
            close = difflib.get_close_matches(name, list(NAMED), n=3, cutoff=0.4)
            known = ", ".join(close or sorted(NAMED))
            raise ValueError(f"unknown optimizer {optimizer!r}; known: {known}")
        optimizer = NAMED[name]
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError("optimizer must be a class or a function that makes one, not an instance")
    if not callable(optimizer):
        raise TypeError(f"optimizer must be a name, a class or a function, not {optimizer!r}")
    if isinstance(optimizer, type):
        optimizer = functools.partial(optimizer, lr=0.0)  # each group has its own
    made = optimizer([{"params": [torch.zeros(1, 1)], "lr": 0.0}], **options)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, not {made!r}")
    if (name := type(made).__name__) in REFUSED:
        raise ValueError(f"optimizer must not be {name}: {REFUSED[name]}")
    return optimizer, type(made) in ELEMENTWISE


def make_optimizer(
    make: Callable[..., Any], groups: list[dict[str, Any]], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return an optimizer of parameter groups, fused where torch has that and is right."""
    values = [value for group in groups for value in group["params"]]
    if all(value.is_contiguous() for value in values):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            fused = make([dict(group) for group in groups], **{"fused": True} | options)
            # Fused SGD takes wrong steps in 16 bits (torch 2.13, on the processor).
            if values[0].element_size() > 2 or not isinstance(fused, torch.optim.SGD):
                return fused
    return make(groups, **options)
