"""The members of the rectifier's family, by the operators that compute them."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

Activations = Mapping[Any, str | Callable[[Tensor], Tensor]] | None
Calls = dict[str | CodeType, tuple[Any, "Kind"]]


@dataclass(frozen=True)
class Kind:
    """One member of the family."""

    name: str
    silences: bool = True  # whether it has a silent region
    level: float = 0.0  # its largest silent pre-activation; -inf if the silent region is a band
    by_output: bool = False  # whether its output tells more exactly whether it is silent
    # For the pieces of maxout, the dimension along which those of a unit lie. A piece counts as
    # firing where it wins: where it attains the maximum.
    dim: int | None = None
    silent: Callable[[Tensor], Tensor] | None = None  # tells where an output is silent, if not at 0

    def fires(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return where a unit is not silent, never at NaN; ``out`` counts if ``by_output``."""
        if not self.by_output or out is None:
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


def classify(operator: str, bound: Mapping[str, Any]) -> Kind | None:
    """Return the kind of an operator with these arguments; ``None`` outside the family."""
    kind = FAMILY.get(operator)
    return kind(bound) if callable(kind) else kind


RULES: dict[str, Callable[[str], Kind]] = {"silent where 0": by_output, "never silent": smooth}


def own_kinds(activations: Activations, modules: Mapping[str, nn.Module]) -> Calls:
    """Return the key and the kind of each module, by name, and function, by code, that are named.

    TypeError for a key that nothing can be told by, ValueError for an unknown rule.
    """
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
