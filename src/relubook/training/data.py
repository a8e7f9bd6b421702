"""Inputs and targets of all members: checked, and cut into batches."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook.training.losses import ELEMENTWISE, member_loss
from relubook.training.stack import Stack, batches_of

__all__ = ["MemberData"]


class MemberData:
    """Inputs and targets of all members, checked, on the stack's device and in its type."""

    def __init__(self, stack: Stack, x: Any, y: Any, loss: Any, kind: str):
        for name, value in ((f"{kind}x", x), (f"{kind}y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
            if value.is_meta:
                raise ValueError(f"{name} must hold numbers, but it is a meta tensor")
            if value.dim() < 1 or 0 in value.shape:
                raise ValueError(f"{name} must hold examples, not of shape {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} has {int((~value.isfinite()).sum())} non-finite entries")
        like, members = next(stack.parameters(), torch.empty(0)), len(stack)
        self.own = stack.owns(x)
        self.x = x.to(like) if x.is_floating_point() else x.to(like.device)
        self.n = n = x.shape[1] if self.own else len(x)
        self.own_y = y.shape[:2] == (members, n) and y.dim() >= 2 + y.is_floating_point()
        if not self.own_y and len(y) != n:
            raise ValueError(
                f"{kind}y must have one target for each of {n} inputs, shape ({n}, ...) or "
                f"({members}, {n}, ...), not {tuple(y.shape)}"
            )
        if y.is_floating_point() and y.dim() == 1:
            y = y[:, None]
        self.y = y.to(like) if y.is_floating_point() else y.to(like.device)
        self.each = member_loss(loss, y)
        self.members, self.members_last = members, stack.members_last
        mode = stack.training
        with torch.no_grad():
            out = stack.eval()(self.rows(slice(0, 1))[0])
            stack.train(mode)
            if not y.is_floating_point() and loss in (None, "cross_entropy", F.cross_entropy):
                self._check_labels(out, kind)
            elif loss in (None, "mse", "mae", *ELEMENTWISE) and out.shape[2:] != self.shape:
                raise ValueError(
                    f"{kind}y must have targets of shape {tuple(out.shape[2:])}, as the outputs "
                    f"do, not {tuple(self.shape)}"
                )
            losses = self.each(out, self.rows(slice(0, 1))[1])
        if losses.shape != (members,):
            raise ValueError(
                "loss must return one number for one network's outputs and targets, "
                f"not the shape {tuple(losses.shape[1:])}"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape of one target."""
        return self.y.shape[2:] if self.own_y else self.y.shape[1:]

    def _check_labels(self, out: Tensor, kind: str) -> None:
        if self.shape:
            raise ValueError(
                f"{kind}y must have the shape ({self.n},) or ({self.members}, {self.n}), "
                f"not {tuple(self.y.shape)}"
            )
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= out.shape[-1]:
            raise ValueError(
                f"labels of {kind}y must be in 0..{out.shape[-1] - 1}, not {low}..{high}"
            )

    def rows(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of some examples, targets as (members, batch, ...)."""
        x = self.x[:, index] if self.own else self.x[index]
        y = (
            self.y[:, index]
            if self.own_y
            else self.y[index].expand(self.members, *self.y[index].shape)
        )
        return x, y

    def batches(
        self, seeds: Sequence[int], size: int | None, seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of every step."""
        if size is None:
            yield from itertools.repeat(self.rows(slice(None)))
        assert size is not None
        if seed is not None:
            yield from (self.rows(index) for index in batches_of(seed, self.n, size))
        rows = torch.arange(self.members)[:, None]
        rows, dim = (rows.t(), 1) if self.members_last else (rows, 0)
        for each in zip(*(batches_of(s, self.n, size) for s in seeds), strict=True):
            index = torch.stack(each, dim).to(self.x.device)
            x = self.x[rows, index] if self.own else self.x[index]
            y = self.y[rows, index] if self.own_y else self.y[index]
            yield x.transpose(0, dim), y.transpose(0, dim)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets for a range of members."""
        x = self.x[start:stop] if self.own else self.x
        return x, self.y[start:stop] if self.own_y else self.y
