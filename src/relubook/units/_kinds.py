"""The members of the rectifier's family, by the operators that compute them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor


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

    def fires(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return where a unit is not silent, never at NaN; ``out`` counts if ``by_output``."""
        if not self.by_output or out is None:
            return x > self.level
        if self.dim is not None:
            return x == out.unsqueeze(self.dim)
        return (out != 0) & ~out.isnan()


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
