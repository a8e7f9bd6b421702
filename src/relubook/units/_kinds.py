"""The members of the rectifier's family, by the operators that compute them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COMPOSED = {
    "NewGELUActivation": "gelu_new",
    "FastGELUActivation": "gelu_fast",
    "QuickGELUActivation": "quick_gelu",
    "QuickGELU": "quick_gelu",
}
"""Modules of other libraries that compute a smooth member by arithmetic, and its kind."""


@dataclass(frozen=True)
class Kind:
    """One member of the family.

    Attributes:
        name: ``"relu"`` and so on.
        silences: Whether it has a silent region.
        level: It is silent up to this pre-activation; ``-inf`` if its silent region is a band.
        by_output: Whether its output tells more exactly whether it is silent.
    """

    name: str
    silences: bool = True
    level: float = 0.0
    by_output: bool = False

    def fires(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return where a unit is not silent, as ``bool``; never at NaN.

        Args:
            x: Pre-activations.
            out: Outputs, of the same shape; may be ``None`` unless ``by_output``.
        """
        if not self.by_output:
            return x > self.level
        assert out is not None
        return (out != 0) & ~torch.isnan(out)


KINDS = {
    "relu": Kind("relu"),
    "relu6": Kind("relu6"),
    "hardswish": Kind("hardswish", level=-3.0, by_output=True),
    "hardsigmoid": Kind("hardsigmoid", level=-3.0, by_output=True),
    "hardshrink": Kind("hardshrink", level=-math.inf, by_output=True),
    "softshrink": Kind("softshrink", level=-math.inf, by_output=True),
    "_prelu_kernel": Kind("prelu", silences=False),
    "rrelu_with_noise": Kind("rrelu", silences=False),
    "rrelu_with_noise_functional": Kind("rrelu", silences=False),
} | {
    name: Kind(name, silences=False)
    for name in ("leaky_relu", "prelu", "elu", "celu", "gelu", "silu", "mish", "softplus")
}
"""Operators that are members of the family whatever their arguments."""
CANDIDATES = KINDS.keys() | {
    "clamp",
    "clip",
    "clamp_min",
    "maximum",
    "fmax",
    "threshold",
    "hardtanh",
}


def is_zero(value: Any) -> bool:
    """Tell whether an argument is the number 0, or a tensor of zeros that nobody trains."""
    if isinstance(value, Tensor):
        return value.numel() > 0 and not bool(value.any()) and not value.requires_grad
    return isinstance(value, int | float) and value == 0


def _bounded(low: Any, high: Any) -> Kind | None:
    if not is_zero(low):
        return None
    if high is None:
        return KINDS["relu"]
    return KINDS["relu6"] if not isinstance(high, Tensor) and high == 6 else Kind("hardtanh")


def classify(operator: str, bound: Mapping[str, Any]) -> Kind | None:
    """Tell whether an operator is a member of the family.

    Args:
        operator: Name of the ATen operator, without its trailing underscore.
        bound: Its arguments by name.

    Returns:
        Its kind, or ``None`` for any other operator.
    """
    if operator in ("clamp", "clip", "clamp_min"):
        return _bounded(bound.get("min"), bound.get("max"))
    if operator in ("maximum", "fmax"):
        return _bounded(bound.get("other"), None) or _bounded(bound.get("self"), None)
    if operator == "hardtanh":
        low, high = bound.get("min_val", -1), bound.get("max_val", 1)
        return _bounded(low, high) or Kind("hardtanh", silences=False)
    if operator == "threshold":
        level = float(bound["threshold"])
        if not is_zero(bound.get("value")):
            return None
        return Kind("threshold", level=level, by_output=True) if level else KINDS["relu"]
    if operator == "leaky_relu" and is_zero(bound.get("negative_slope", 0.01)):
        return KINDS["relu"]
    return KINDS.get(operator)
