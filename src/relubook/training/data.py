"""Inputs and targets of all members: checked, and cut into batches."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from relubook.training.losses import LABELS, SAME_SHAPE, loss_function, of_each_member, of_kind
from relubook.training.stack import Stack, batches_of, kept_modes


class MemberData:
    """Inputs and targets of all members, checked, on the stack's device and in its type.

    Losses are computed in 32 bits at least. Where y could be (n, ...) or (members, n, ...), it is
    what fits the outputs; for one output (n,) stands for (n, 1). Messages call x ``f"{kind}x"``.
    """

    def __init__(self, stack: Stack, x: Any, y: Any, loss: Any, kind: str = ""):
        for name, value in ((f"{kind}x", x), (f"{kind}y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
            if value.is_meta:
                raise ValueError(f"{name} must hold numbers, but it is a meta tensor")
            if value.dim() < 1 or 0 in value.shape:
                raise ValueError(f"{name} must hold examples, but has shape {tuple(value.shape)}")
            if wrong := int((~value.isfinite()).sum()):
                raise ValueError(f"{name} must be finite, but has {wrong} non-finite entries")
        like = next(stack.parameters(), torch.empty(0))
        self.members, self.members_last = len(stack), stack.members_last
        self.own = stack.owns(x)
        self.n = n = x.shape[1] if self.own else len(x)
        self.x = x.to(like) if x.is_floating_point() else x.to(like.device)
        with kept_modes(stack), torch.no_grad():
            out = stack.eval()(self.x[:, :2] if self.own else self.x[:2])
        exact = torch.promote_types(out.dtype, torch.float32)
        self.y = y.to(like.device, exact if y.is_floating_point() else None)
        fits = y.is_floating_point() and y.shape[1:] == out.shape[2:]
        self.own_y = y.shape[:2] == (self.members, n) and not (len(y) == n and fits)
        if not self.own_y and len(y) != n:
            shapes = f"({n}, ...) or ({self.members}, {n}, ...), not {tuple(y.shape)}"
            raise ValueError(f"{kind}y must have one target for each of {n} inputs, shape {shapes}")
        if y.is_floating_point() and out.shape[2:] == (1,) and y.dim() == 1 + self.own_y:
            self.y = self.y[..., None]
        one = loss_function(loss, y)
        target = self.y.shape[1 + self.own_y :]
        if not y.is_floating_point() and of_kind(one, LABELS):
            if target != out.shape[3:]:
                shapes = f"{tuple(out.shape[3:])}, one for each vector of outputs, not {(*target,)}"
                raise ValueError(f"{kind}y must have labels of shape {shapes}")
            used = y[y != one.ignore_index] if hasattr(one, "ignore_index") else y
            low, high = (int(used.min()), int(used.max())) if used.numel() else (0, 0)
            if low < 0 or high >= out.shape[2]:
                wanted = f"0..{out.shape[2] - 1}"
                raise ValueError(f"labels of {kind}y must be in {wanted}, not {low}..{high}")
        elif of_kind(one, LABELS + SAME_SHAPE):
            if not y.is_floating_point():
                raise TypeError(f"{kind}y must hold floating-point targets, not {y.dtype}")
            if out.shape[2:] != target:
                shapes = f"{tuple(out.shape[2:])}, as the outputs do, not {tuple(target)}"
                raise ValueError(f"{kind}y must have targets of shape {shapes}")
        each = of_each_member(one)
        self.each = lambda out, y: each(out.to(exact), y)
        with torch.no_grad():
            losses = self.each(out, self.rows(slice(0, 2))[1])
        if losses.shape != (self.members,):
            shape = tuple(losses.shape[1:])
            raise ValueError(f"loss must return one number for one network, not the shape {shape}")

    def rows(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of some examples, targets as (members, batch, ...)."""
        x = self.x[:, index] if self.own else self.x[index]
        if self.own_y:
            return x, self.y[:, index]
        y = self.y[index]
        return x, y.expand(self.members, *y.shape)

    def batches(
        self, seeds: Sequence[int], size: int | None, seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of every step."""
        if size is None:
            yield from itertools.repeat(self.rows(slice(None)))
        assert size is not None
        if seed is not None:
            yield from (self.rows(index[0]) for index in batches_of([seed], self.n, size))
        rows = torch.arange(self.members, device=self.x.device)[:, None]
        for index in batches_of(seeds, self.n, size):
            # What is gathered lies in memory as the index does.
            place = index if self.members_last else index.contiguous()
            place = place.to(self.x.device)
            x = self.x[rows, place] if self.own else self.x[place]
            y = self.y[rows, place] if self.own_y else self.y[place]
            yield x, y

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets for a range of members."""
        x = self.x[start:stop] if self.own else self.x
        return x, self.y[start:stop] if self.own_y else self.y
