"""Where units and inputs lie at a call of a rectifier, and sums and maxima along them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from relubook.units._kinds import Kind
from relubook.units._numbers import along, core


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a rectifier, or of maxout, as :meth:`SiteFinder.observe` gets it."""

    key: tuple[Any, ...]  # its name without ``#k``, the way to the call, the layer that feeds it
    kind: Kind
    units: int  # how many there are
    dims: tuple[int, ...]  # those of its input along which units lie
    # None if each place along them is a unit; else what sorts these places by unit, equally many
    # for each.
    order: Tensor | None
    inputs: Tensor | None  # the number of the input of each element, if known
    size: int  # how many inputs are in the batch
    data: bool  # whether what reaches it depends on the model's inputs
    producer: str | None  # as in a :class:`~relubook.units.report.SiteReport`
    location: str | None

    def per_unit(self, x: Tensor, reduction: str) -> Tensor:
        """Reduce a tensor of its input's shape to shape (units,): ``"amax"``, ``"sum"``, ..."""
        reduce = getattr(torch, reduction)
        if len(self.dims) == 1:
            x = by_unit(x, self.dims[0] - x.ndim, reduce)
        else:
            rest = [dim for dim in range(x.ndim) if dim not in self.dims]
            x = (reduce(x, rest) if rest else x).reshape(-1)
        if self.order is not None:
            x = reduce(x[self.order.to(x.device)].view(self.units, -1), 1)
        return x

    @cached_property
    def rows(self) -> tuple[Tensor, list[int], bool]:
        """Return the inputs as by ``core``, where they vary, and whether all go along that."""
        assert self.inputs is not None
        ids = core(self.inputs)
        dims = along(ids)
        whole = torch.equal(ids.flatten(), torch.arange(self.size, device="cpu"))
        return ids, dims, whole and self.order is None and set(dims).isdisjoint(self.dims)

    def per_input(self, fires: Tensor) -> Tensor:
        """Count over positions, for all inputs of the batch: shape (size, units)."""
        size, (ids, dims, whole) = self.size, self.rows
        rest = [dim for dim in range(fires.ndim) if dim not in (*self.dims, *dims)]
        counts = fires.sum(rest, keepdim=True) if rest else fires
        if whole:
            return counts.permute(*dims, *self.dims, *rest).reshape(size, self.units)
        places = [length if dim in self.dims else 1 for dim, length in enumerate(fires.shape)]
        unit = torch.arange(math.prod(places), device="cpu")
        if self.order is not None:
            unit[self.order] = unit // (unit.numel() // self.units)
        key = (ids * self.units + unit.view(places)).flatten().to(fires.device)
        table = torch.zeros(size * self.units, dtype=torch.int64, device=fires.device)
        return table.index_add_(0, key, counts.flatten().long()).view(size, self.units)


def by_unit(x: Tensor, dim: int, reduce: Callable[..., Tensor] = torch.amax) -> Tensor:
    """Reduce all dimensions but one, counted from the end and so negative."""
    ndim = x.ndim
    if ndim == 2 and dim == -1:
        return reduce(x, 0)
    if ndim == 1:
        return x
    if dim == 1 - ndim and ndim > 2 and x.is_contiguous():
        # Reduce first along what is long enough to be fast.
        if x[0, 0].numel() >= 64:
            return reduce(reduce(x.flatten(2), -1), 0)
        return reduce(reduce(x, 0).flatten(1), 1)
    x = x.movedim(dim, -1)
    units = x.shape[-1]
    group = 64 // units
    if group > 1 and x.is_contiguous() and x.numel() % (group * units) == 0:
        # A reduction over narrow rows is slow.
        x = reduce(x.view(-1, group * units), 0).view(group, units)
    return reduce(x, list(range(x.ndim - 1)))


def placed(units: Tensor, hint: int) -> tuple[int, tuple[int, ...], Tensor | None]:
    """Return a site's ``units, dims, order`` for the numbers of the units of its input.

    Where the numbers cannot tell, ``hint`` is the dimension of the only unit, from the end.
    """
    small = core(units)
    dims = tuple(along(small))
    if not dims:
        if not units.ndim:
            return 1, (), None
        single = [dim for dim in range(-units.ndim, 0) if units.shape[dim] == 1]
        dim = (hint if hint in single or not single else single[-1]) % units.ndim
        return 1, (dim,), None if single else torch.arange(units.shape[dim], device="cpu")
    ids = small.flatten()
    if not torch.equal(ids, torch.arange(ids.numel(), device="cpu")):
        labels, counts = ids.unique(return_counts=True)
        if len(labels) < ids.numel() and bool((counts == counts[0]).all()):
            return len(labels), dims, ids.argsort(stable=True)
    return ids.numel(), dims, None
