"""Any optimizer of torch, at one rate or at many, over all numbers of a stack."""

import difflib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relubook.training.stack import Stack

__all__ = ["Numbers", "make_optimizer", "optimizer_class"]

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
MATRIX_WISE = ("Adafactor", "Muon")
REFUSED = {
    "LBFGS": "it calls the loss many times a step",
    "SparseAdam": "gradients here are dense",
}


class Numbers:
    """All trained parameters of a stack in one piece of memory, and their gradients in another.

    One update then serves all layers. The stack's parameters are views of it until
    :meth:`release`; where the stack says so, the members stand side by side in memory.
    """

    def __init__(self, stack: Stack):
        self.parameters = [p for p in stack.parameters() if p.requires_grad]
        self.members = len(stack)
        sizes = [p.numel() for p in self.parameters]
        like = self.parameters[0].detach() if sizes else torch.empty(0)
        self.values, self.gradient = (like.new_zeros(sum(sizes)) for _ in range(2))
        parts = (self.values.split(sizes), self.gradient.split(sizes))
        for parameter, *blocks in zip(self.parameters, *parts, strict=True):
            if stack.members_last:
                shape = (*parameter.shape[1:], self.members)
                value, gradient = (block.view(shape).movedim(-1, 0) for block in blocks)
            else:
                value, gradient = (block.view(parameter.shape) for block in blocks)
            value.copy_(parameter.detach())
            parameter.data, parameter.grad = value, gradient

    def groups(self, rates: list[float], matrix_wise: bool) -> list[dict[str, Any]]:
        """Return parameter groups of views, one for each run of equal rates.

        With ``matrix_wise`` one for each member, its matrices as a single network has them.
        """
        if len(set(rates)) == 1 and not matrix_wise:
            self.values.grad = self.gradient
            return [{"params": [self.values], "lr": rates[0]}]
        members, groups = len(rates), []
        cuts = [i for i in range(1, members) if matrix_wise or rates[i] != rates[i - 1]]
        for start, stop in itertools.pairwise([0, *cuts, members]):
            views = []
            for parameter in self.parameters:
                assert parameter.grad is not None
                view, gradient = parameter.data[start:stop], parameter.grad[start:stop]
                if matrix_wise:
                    view, gradient = view[0], gradient[0]
                    view, gradient = (view.mT, gradient.mT) if view.dim() == 2 else (view, gradient)
                view.grad = gradient
                views.append(view)
            groups.append({"params": views, "lr": rates[start]})
        return groups

    def norms(self) -> Tensor:
        """Return the norm of each member's gradient, shape (members,)."""
        parts = [p.grad.flatten(1).norm(dim=1) for p in self.parameters if p.grad is not None]
        return torch.stack(parts).norm(dim=0) if parts else self.values.new_zeros(self.members)

    def clip(self, norms: Tensor, largest: float) -> None:
        """Scale down the gradients of members whose norm is larger."""
        factors = (largest / (norms + 1e-6)).clamp(max=1)
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(factors.view(-1, *[1] * (parameter.dim() - 1)))

    def finite(self) -> Tensor:
        """Return which members have finite parameters only, shape (members,)."""
        found = torch.ones(self.members, dtype=torch.bool, device=self.values.device)
        for parameter in self.parameters:
            found &= parameter.detach().isfinite().flatten(1).all(1)
        return found

    def release(self) -> None:
        """Give the stack's parameters memory of their own again."""
        for parameter in self.parameters:
            value = parameter.detach().clone(memory_format=torch.contiguous_format)
            parameter.data, parameter.grad = value, None


def optimizer_class(optimizer: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return the class, or function, that a name or class of ``torch.optim`` stands for.

    Raises:
        TypeError: If it is neither a name nor callable.
        ValueError: If the name is unknown, or the optimizer fits no stack.
    """
    known = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    known.pop("Optimizer")
    if isinstance(optimizer, str):
        named = {name.lower(): kind for name, kind in known.items()}
        if optimizer.lower() not in named:
            close = difflib.get_close_matches(optimizer.lower(), list(named), n=3, cutoff=0.4)
            raise ValueError(
                f"unknown optimizer {optimizer!r}; known: {', '.join(close or sorted(known))}"
            )
        optimizer = named[optimizer.lower()]
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a class or a function, such as torch.optim.Adam, not an instance: "
            "train() gives it the parameters of all members"
        )
    if not callable(optimizer):
        raise TypeError(f"optimizer must be a name, a class or a function, not {optimizer!r}")
    name = getattr(optimizer, "__name__", "")
    if name in REFUSED:
        raise ValueError(f"optimizer must not be {name}: {REFUSED[name]}")
    return optimizer


def make_optimizer(
    kind: Any, numbers: Numbers, rates: list[float], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return an optimizer over a stack's numbers, with one parameter group a run of equal rates."""
    groups = numbers.groups(rates, getattr(kind, "__name__", "") in MATRIX_WISE)
    # Fused updates are wrong for parts of memory, and in 16 bits (torch 2.13, SGD and Adam).
    exact = numbers.values.dtype in (torch.float32, torch.float64)
    whole = all(value.is_contiguous() for group in groups for value in group["params"])
    if exact and whole and kind in FUSED and not {"fused", "foreach"} & set(options):
        options = options | {"fused": True}
    return kind(groups, **options)
