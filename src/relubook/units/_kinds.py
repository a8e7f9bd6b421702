"""The rectifier's family, by the operators that compute it, and where units lie at a call."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from relubook.units._numbers import along, core

Activations = Mapping[Any, str | Callable[[Tensor], Tensor]] | None
Calls = dict[str | CodeType, tuple[Any, "Kind"]]
LONG = 64  # values of a unit in one input from which to reduce them first is fast


@dataclass(frozen=True)
class Kind:
    """One member of the family."""

    name: str
    silences: bool = True  # whether it has a silent region
    level: float = 0.0  # its largest silent pre-activation; -inf if the silent region is a band
    by_output: bool = False  # whether its output tells more exactly whether it is silent
    # For maxout, the dimension of a unit's pieces. A piece fires where it attains the maximum.
    dim: int | None = None
    silent: Callable[[Tensor], Tensor] | None = None  # tells where an output is silent, if not at 0

    def fires(self, x: Tensor, out: Tensor) -> Tensor:
        """Return where a unit is not silent, never at NaN; ``out`` counts if ``by_output``."""
        if not self.by_output:
            return x > self.level
        if self.dim is not None:
            return x == out.unsqueeze(self.dim)
        silent = out == 0 if self.silent is None else self.silent(out)
        if getattr(silent, "dtype", None) != torch.bool or silent.shape != out.shape:
            what = f"activations: the rule for {self.name} must return a bool tensor"
            raise ValueError(f"{what} of its output's shape {tuple(out.shape)}, true where silent")
        return ~silent & ~out.isnan()


def is_zero(value: Any) -> bool:
    """Tell whether an argument is the number 0, or a tensor of zeros that nobody trains."""
    if isinstance(value, Tensor):
        return value.numel() > 0 and not bool(value.any()) and not value.requires_grad
    return isinstance(value, int | float) and value == 0


smooth = partial(Kind, silences=False)
by_output = partial(Kind, level=-math.inf, by_output=True)


def bounded(low: Any, high: Any = None) -> Kind | None:
    """Return the kind of a clamp; ``None`` unless its lower limit is 0."""
    if not is_zero(low):
        return None
    if high is None:
        return RELU
    return RELU6 if not isinstance(high, Tensor) and high == 6 else Kind("hardtanh")


def threshold(level: float, value: Any) -> Kind | None:
    """Return the kind of a threshold; ``None`` unless it puts 0 below its level."""
    if not is_zero(value):
        return None
    return by_output("threshold", level=float(level)) if level else RELU


PIECE = "maxout piece"
RELU, RELU6 = Kind("relu"), Kind("relu6")
FAMILY: dict[str, Kind | Callable[[Mapping[str, Any]], Kind | None]] = {
    "relu": RELU,
    "relu6": RELU6,
    "hardswish": by_output("hardswish", level=-3.0),
    "hardsigmoid": by_output("hardsigmoid", level=-3.0),
    "hardshrink": by_output("hardshrink"),
    "softshrink": by_output("softshrink"),
    **dict.fromkeys(("clamp", "clip", "clamp_min"), lambda a: bounded(a.get("min"), a.get("max"))),
    **dict.fromkeys(("maximum", "fmax"), lambda a: bounded(a["other"]) or bounded(a["self"])),
    "hardtanh": lambda a: bounded(a.get("min_val", -1), a.get("max_val", 1)) or smooth("hardtanh"),
    "threshold": lambda a: threshold(a["threshold"], a["value"]),
    "leaky_relu": lambda a: bounded(a.get("negative_slope", 0.01)) or smooth("leaky_relu"),
    **{name: smooth(name) for name in ("prelu", "elu", "celu", "gelu", "silu", "mish", "softplus")},
    "_prelu_kernel": smooth("prelu"),
    **dict.fromkeys(("rrelu_with_noise", "rrelu_with_noise_functional"), smooth("rrelu")),
}
"""Members, or rules for them by the arguments, by the names of ATen's operators."""


def kind_of(operator: str, bound: Mapping[str, Any]) -> Kind | None:
    """Return the kind of an operator with these arguments; ``None`` outside the family."""
    kind = FAMILY.get(operator)
    return kind(bound) if callable(kind) else kind


RULES: dict[str, Callable[[str], Kind]] = {"silent where 0": by_output, "never silent": smooth}


def own_kinds(activations: Activations, modules: Mapping[str, nn.Module]) -> Calls:
    """Return the key and the kind of each module, by name, and function, by code; or raise."""
    if not isinstance(activations, Mapping | None):
        raise TypeError(f"activations must be a mapping, not a {type(activations).__name__}")
    found: Calls = {}
    for key, rule in (activations or {}).items():
        if not callable(rule) and rule not in list(RULES):
            rules = f"{list(RULES)} or be a function of the output"
            raise ValueError(f"activations[{key!r}] must be in {rules}")
        kind = RULES[rule] if isinstance(rule, str) else partial(by_output, silent=rule)
        parents = key.__mro__ if isinstance(key, type) else ()
        function = key.forward if torch.autograd.Function in parents else key
        code = getattr(inspect.unwrap(function), "__code__", None)
        if isinstance(key, str | nn.Module) or nn.Module in parents:
            for name, module in modules.items():
                fits = fnmatchcase(name, key) if isinstance(key, str) else module is key
                if fits or (parents and isinstance(module, key)):
                    found.setdefault(name, (key, kind(type(module).__name__)))
        elif isinstance(code, CodeType):
            found[code] = key, kind(key.__name__)
        else:
            what = "a module, its class or its name, a Python function or an autograd.Function"
            raise TypeError(f"activations names {key!r}, which is none of: {what}")
    return found


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a rectifier, or of maxout, as :meth:`SiteFinder.observe` gets it."""

    key: tuple[Any, ...]  # its name without ``#k``, the way to the call, the layer that feeds it
    kind: Kind
    units: int  # how many there are
    dims: tuple[int, ...]  # those of its input along which units lie
    # None if each place along them is a unit; else what sorts these, equally many for each.
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
        if x.shape[2:].numel() >= LONG:
            return reduce(reduce(x.flatten(2), -1), 0)
        return reduce(reduce(x, 0).flatten(1), 1)
    x = x.movedim(dim, -1)
    units = x.shape[-1]
    group = 64 // units
    if group > 1 and x.is_contiguous() and x.numel() % (group * units) == 0:
        # A reduction over narrow rows is slow.
        x = reduce(x.view(-1, group * units), 0).view(group, units)
    return reduce(x, list(range(x.ndim - 1)))


def place(units: Tensor, hint: int) -> tuple[int, tuple[int, ...], Tensor | None]:
    """Return ``units, dims, order`` of numbers; ``hint``: the dimension where they cannot tell."""
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
