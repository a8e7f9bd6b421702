"""The rectifier's family: what torch lacks, and one registry of all its members."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.layers._options import canonical, check_options, nearest
from relubook.layers.maxout import MaxPieces

__all__ = [
    "MODULES", "REGISTRY", "Activation", "Elementwise", "activation", "registered",
    "relu_with_derivative_at_zero", "squared_relu", "step",
]  # fmt: skip


def squared_relu(input: Tensor) -> Tensor:
    """Return ``max(0, input) ** 2``, elementwise; its derivative at 0 is 0 on both sides."""
    return torch.relu(input).square()


def step(input: Tensor) -> Tensor:
    """Return 1 where ``input > 0``, else 0 (NaN for NaN), with a derivative of 0 for autograd."""
    return input.clamp(0, 1).ceil()


def relu_with_derivative_at_zero(input: Tensor, value: float | Tensor) -> Tensor:
    """Return ``max(0, input)`` with a chosen derivative where the input is exactly 0.

    With the values 0, 0.5 and 1 the gradients are those of ``torch.relu(x)``,
    ``torch.maximum(x, zeros)`` and ``x.clamp(min=0)``. NaN stays NaN. The input may have any shape;
    TypeError unless it is floating point. The value, which no gradient reaches, is a number or a
    tensor that expands to the input's shape, such as one a network; ValueError unless finite.

    Source: Bertoin et al. 2021, https://arxiv.org/abs/2106.12915, ask which value is best.
    """
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, not {input.dtype}")
    at_zero = torch.as_tensor(value, dtype=input.dtype, device=input.device).detach()
    if not (at_zero.isfinite().all() if isinstance(value, Tensor) else math.isfinite(value)):
        raise ValueError(f"value must be finite, not {value!r}")
    return torch.where(input == 0, at_zero.expand(input.shape) * input, torch.relu(input))


class Elementwise(nn.Module):
    """A function from tensor to tensor of the same shape, as a module."""

    def __init__(self, function: Callable[..., Tensor], /, **options: Any):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, input: Tensor) -> Tensor:
        """Return the function's value."""
        return self.function(input, **self.options)

    def extra_repr(self) -> str:
        """Return the function's name and the options."""
        return ", ".join([_name(self.function), *(f"{k}={v!r}" for k, v in self.options.items())])


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


@dataclass(frozen=True)
class Activation:
    """What the book knows of one activation function.

    Attributes:
        module: The class, or the function, that :func:`activation` builds on.
        formula: LaTeX, in ``x``, without dollar signs.
        limits: Limits of the function for x to minus and plus infinity.
        derivative_at_zero: What autograd returns at 0, by default (``rrelu``: in evaluation mode).
        initializer: Name in ``relubook.layers.initializers`` or ``torch.nn.init``. It keeps the
            second moment from layer to layer for ReLU, absolute value, step and SELU, nearly so
            for the leaky ones, and goes with the others by custom.
    """

    name: str
    module: type[nn.Module] | Callable[..., Tensor]
    formula: str
    limits: tuple[float, float]
    derivative_at_zero: float
    paper: str
    url: str
    initializer: str = "he_normal_"

    @property
    def bounded(self) -> bool:
        """Whether the function stays between two finite numbers."""
        return all(math.isfinite(limit) for limit in self.limits)


_INF = math.inf
_SELU_SLOPE = 1.0507009873554805 * 1.6732632423543772

# fmt: off
_ENTRIES = (
    Activation("relu", nn.ReLU, r"\max(0, x)", (0, _INF), 0,
        "Nair and Hinton 2010", "https://dl.acm.org/doi/10.5555/3104322.3104425"),
    Activation("relu6", nn.ReLU6, r"\min(\max(0, x), 6)", (0, 6), 0,
        "Krizhevsky 2010", "https://www.cs.toronto.edu/~kriz/conv-cifar10-aug2010.pdf"),
    Activation("leaky_relu", nn.LeakyReLU, r"\max(0, x) + a \min(0, x)", (-_INF, _INF), 0.01,
        "Maas et al. 2013", "https://ai.stanford.edu/~amaas/papers/relu_hybrid_icml2013_final.pdf"),
    Activation("prelu", nn.PReLU, r"\max(0, x) + a \min(0, x), \; a \text{ learned}",
        (-_INF, _INF), 0.25, "He et al. 2015", "https://arxiv.org/abs/1502.01852"),
    Activation("rrelu", nn.RReLU, r"\max(0, x) + a \min(0, x), \; a \sim U(l, u)",
        (-_INF, _INF), 11 / 48, "Xu et al. 2015", "https://arxiv.org/abs/1505.00853"),
    Activation("elu", nn.ELU, r"x \text{ if } x > 0 \text{ else } \alpha (e^x - 1)", (-1, _INF), 1,
        "Clevert et al. 2015", "https://arxiv.org/abs/1511.07289"),
    Activation("celu", nn.CELU, r"\max(0, x) + \min(0, \alpha (e^{x / \alpha} - 1))", (-1, _INF), 1,
        "Barron 2017", "https://arxiv.org/abs/1704.07483"),
    Activation("selu", nn.SELU,
        r"\lambda x \text{ if } x > 0 \text{ else } \lambda \alpha (e^x - 1)",
        (-_SELU_SLOPE, _INF), _SELU_SLOPE,
        "Klambauer et al. 2017", "https://arxiv.org/abs/1706.02515", "lecun_normal_"),
    Activation("gelu", nn.GELU, r"x \, \Phi(x)", (0, _INF), 0.5,
        "Hendrycks and Gimpel 2016", "https://arxiv.org/abs/1606.08415"),
    Activation("silu", nn.SiLU, r"x \, \sigma(x)", (0, _INF), 0.5,
        "Elfwing et al. 2017", "https://arxiv.org/abs/1702.03118"),
    Activation("mish", nn.Mish, r"x \tanh(\ln(1 + e^x))", (0, _INF), 0.6,
        "Misra 2019", "https://arxiv.org/abs/1908.08681"),
    Activation("hardswish", nn.Hardswish, r"x \min(\max(0, x + 3), 6) / 6", (0, _INF), 0.5,
        "Howard et al. 2019", "https://arxiv.org/abs/1905.02244"),
    Activation("softplus", nn.Softplus, r"\ln(1 + e^{\beta x}) / \beta", (0, _INF), 0.5,
        "Dugas et al. 2000", "https://papers.nips.cc/paper/1920"),
    Activation("squared_relu", squared_relu, r"\max(0, x)^2", (0, _INF), 0,
        "So et al. 2021", "https://arxiv.org/abs/2109.08668"),
    Activation("absolute", torch.abs, r"|x|", (_INF, _INF), 0,
        "Jarrett et al. 2009", "https://doi.org/10.1109/ICCV.2009.5459469", "lecun_normal_"),
    Activation("sigmoid", nn.Sigmoid, r"1 / (1 + e^{-x})", (0, 1), 0.25,
        "Rumelhart et al. 1986", "https://doi.org/10.1038/323533a0", "xavier_normal_"),
    Activation("tanh", nn.Tanh, r"\tanh(x)", (-1, 1), 1,
        "LeCun et al. 1998", "https://doi.org/10.1007/3-540-49430-8_2", "xavier_normal_"),
    Activation("softsign", nn.Softsign, r"x / (1 + |x|)", (-1, 1), 1, "Glorot and Bengio 2010",
        "https://proceedings.mlr.press/v9/glorot10a.html", "xavier_normal_"),
    Activation("step", step, r"1 \text{ if } x > 0 \text{ else } 0", (0, 1), 0,
        "McCulloch and Pitts 1943", "https://doi.org/10.1007/BF02478259"),
)
# fmt: on

REGISTRY: Mapping[str, Activation] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every member of the family by name."""

_NOT_ELEMENTWISE = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
_TORCH = {n: getattr(nn, n) for n in nn.modules.activation.__all__ if n not in _NOT_ELEMENTWISE}

MODULES: tuple[type[nn.Module], ...] = (*_TORCH.values(), Elementwise, MaxPieces)
"""Classes of modules that are activations: torch's elementwise ones and this package's own."""

_NAMED: dict[str, Callable[..., Any]] = {
    **{name: entry.module for name, entry in REGISTRY.items()},
    **{"abs": torch.abs, "swish": nn.SiLU, "maxout": MaxPieces},
    **{n: c for n, c in _TORCH.items() if all(c is not e.module for e in _ENTRIES)},
}
_KNOWN = {canonical(name): module for name, module in _NAMED.items()}
_ENTRY_OF = {entry.module: entry for entry in _ENTRIES} | {
    getattr(home, name): REGISTRY["absolute" if name == "abs" else name]
    for home in (torch, F, Tensor)
    for name in ("abs", *REGISTRY)
    if hasattr(home, name)
}


def registered(what: Any) -> Activation | None:
    """Return the registry's entry for what :func:`activation` takes; None for a user's own."""
    if isinstance(what, str):
        what = _KNOWN.get(canonical(what))
    elif isinstance(what, nn.Module):
        what = what.function if isinstance(what, Elementwise) else type(what)
    return _ENTRY_OF.get(what)


def activation(what: str | Callable[..., Any], /, **options: Any) -> nn.Module:
    """Build an activation as a module.

    Args:
        what: A name (in :data:`REGISTRY`, in torch's spelling as ``"LeakyReLU"``, or ``"maxout"``,
            the largest of neighboring features; ValueError otherwise), a class, a module, which is
            copied with its parameters, or a function from tensor to tensor of the same shape.
        **options: What it takes beyond the tensor: TypeError if one is unknown or missing,
            ValueError if one is not a finite number.

    >>> activation("leaky_relu", negative_slope=0.1)
    LeakyReLU(negative_slope=0.1)
    """
    if isinstance(what, nn.Module):
        if options:
            raise TypeError(f"{what} is built already and takes no options: {sorted(options)}")
        return copy.deepcopy(what)
    owner = repr(what) if isinstance(what, str) else _name(what)
    build = _KNOWN.get(canonical(what)) if isinstance(what, str) else what
    if build is None and isinstance(what, str):
        raise ValueError(f"unknown activation {owner}; {nearest(what, _NAMED)}")
    is_class = isinstance(build, type) and issubclass(build, nn.Module)
    if not callable(build) or (isinstance(build, type) and not is_class):
        raise TypeError(f"an activation must be a name, a module or a function, not {what!r}")
    check_options(owner, build, options, tensors=0 if is_class else 1)
    return build(**options) if is_class else Elementwise(build, **options)
