"""The rectifier's family: what torch lacks, and one registry of all its members."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

__all__ = [
    "REGISTRY",
    "Absolute",
    "Activation",
    "SquaredReLU",
    "Step",
    "absolute",
    "activation",
    "activation_names",
    "relu_with_derivative_at_zero",
    "squared_relu",
    "step",
]


def squared_relu(input: Tensor) -> Tensor:
    """Return ``max(0, input) ** 2``, elementwise.

    Args:
        input: Any shape, floating point.

    Returns:
        Same shape and dtype. The derivative at 0 is 0, on both sides.

    Source:
        So et al. 2021, "Primer", https://arxiv.org/abs/2109.08668
    """
    return torch.relu(input).square()


def absolute(input: Tensor) -> Tensor:
    """Return ``|input|``, elementwise: a leaky rectifier of slope -1.

    Args:
        input: Any shape, floating point.

    Returns:
        Same shape and dtype. torch gives 0 as its derivative at 0.

    Source:
        Jarrett et al. 2009, "What is the best multi-stage architecture for object recognition?",
        https://doi.org/10.1109/ICCV.2009.5459469
    """
    return input.abs()


def relu_with_derivative_at_zero(input: Tensor, value: float | Tensor) -> Tensor:
    """Return ``max(0, input)`` with a chosen derivative where the input is exactly 0.

    The forward pass is ReLU's. The backward pass multiplies the incoming gradient by 1 where
    ``input > 0``, by 0 where ``input < 0`` and by ``value`` where ``input == 0``. With the values
    0, 0.5 and 1 the gradients are those of ``torch.relu(x)``, ``torch.maximum(x, zeros)`` and
    ``x.clamp(min=0)``. Forward-mode and higher derivatives and ``torch.func`` work as for any
    composition of torch's functions.

    Args:
        input: Any shape, floating point.
        value: The derivative at 0, a finite number; or a tensor of finite numbers that can be
            expanded to the shape of the input, such as one number a network. Subgradients are the
            numbers in [0, 1]; others are allowed, for experiments. No gradient reaches it.

    Returns:
        Same shape and dtype as the input. NaN stays NaN.

    Raises:
        TypeError: If the input is not floating point.
        ValueError: If a value is not finite, or the tensor would change the input's shape.

    Source:
        Bertoin et al. 2021, "Numerical influence of ReLU'(0) on backpropagation",
        https://arxiv.org/abs/2106.12915, ask which value is best.
    """
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, not {input.dtype}")
    if isinstance(value, Tensor):
        at_zero = value.detach().to(input)
        finite = bool(at_zero.isfinite().all())
        try:
            at_zero = at_zero.expand(input.shape)
        except RuntimeError:
            raise ValueError(
                f"value of shape {tuple(value.shape)} cannot be expanded to the input's "
                f"{tuple(input.shape)}"
            ) from None
    else:
        at_zero = torch.as_tensor(value, dtype=input.dtype, device=input.device)
        finite = math.isfinite(value)
    if not finite:
        raise ValueError(f"value must be finite, not {value!r}")
    return torch.where(input == 0, at_zero * input, torch.relu(input))


def step(input: Tensor) -> Tensor:
    """Return 1 where ``input > 0`` and 0 elsewhere, with a derivative of 0 everywhere.

    Args:
        input: Any shape, floating point. NaN stays NaN.

    Returns:
        Same shape and dtype, part of the autograd graph (so that a backward pass runs and shows
        the zero gradient, instead of failing).

    Source:
        McCulloch and Pitts 1943, https://doi.org/10.1007/BF02478259
    """
    return input.clamp(0, 1).ceil()


class SquaredReLU(nn.Module):
    """:func:`squared_relu` as a module, for any input shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``max(0, input) ** 2``."""
        return squared_relu(input)


class Absolute(nn.Module):
    """:func:`absolute` as a module, for any input shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``|input|``."""
        return absolute(input)


class Step(nn.Module):
    """:func:`step` as a module, for any input shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Return 1 where ``input > 0``, else 0."""
        return step(input)


@dataclass(frozen=True)
class Activation:
    """What the book knows of one activation function.

    Attributes:
        name: Its name in the registry, such as ``"leaky_relu"``.
        module: The class that :func:`activation` builds.
        formula: LaTeX, in ``x``, without dollar signs.
        paper: Author, year and title.
        url: DOI or arXiv address of the paper.
        initializer: Name of the initializer that is used with it, in ``relubook.layers.initializers`` or
            ``torch.nn.init``. It keeps the second moment from layer to layer exactly for ReLU,
            absolute value, step and SELU, nearly so for the leaky ones, and by custom for the rest.
        limits: Limits of the function for x to minus and plus infinity.
        derivative_at_zero: What torch's autograd returns at exactly 0, with default parameters
            (for ``rrelu`` in evaluation mode).
        parameters: The function's own parameters with their defaults.
    """

    name: str
    module: Callable[..., nn.Module]
    formula: str
    paper: str
    url: str
    initializer: str
    limits: tuple[float, float]
    derivative_at_zero: float
    parameters: Mapping[str, float | int] = field(default_factory=dict)

    @property
    def bounded(self) -> bool:
        """Whether the function stays between two finite numbers."""
        return all(math.isfinite(limit) for limit in self.limits)


_INF = math.inf
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946

_ENTRIES = (
    Activation(
        "relu",
        nn.ReLU,
        r"\max(0, x)",
        "Nair and Hinton 2010, Rectified linear units improve restricted Boltzmann machines",
        "https://dl.acm.org/doi/10.5555/3104322.3104425",
        "he_normal_",
        (0.0, _INF),
        0.0,
    ),
    Activation(
        "relu6",
        nn.ReLU6,
        r"\min(\max(0, x), 6)",
        "Krizhevsky 2010, Convolutional deep belief networks on CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/conv-cifar10-aug2010.pdf",
        "he_normal_",
        (0.0, 6.0),
        0.0,
    ),
    Activation(
        "leaky_relu",
        nn.LeakyReLU,
        r"\max(0, x) + a \min(0, x)",
        "Maas, Hannun and Ng 2013, Rectifier nonlinearities improve neural network acoustic models",
        "https://ai.stanford.edu/~amaas/papers/relu_hybrid_icml2013_final.pdf",
        "he_normal_",
        (-_INF, _INF),
        0.01,
        {"negative_slope": 0.01},
    ),
    Activation(
        "prelu",
        nn.PReLU,
        r"\max(0, x) + a \min(0, x), \; a \text{ learned}",
        "He et al. 2015, Delving deep into rectifiers",
        "https://arxiv.org/abs/1502.01852",
        "he_normal_",
        (-_INF, _INF),
        0.25,
        {"num_parameters": 1, "init": 0.25},
    ),
    Activation(
        "rrelu",
        nn.RReLU,
        r"\max(0, x) + a \min(0, x), \; a \sim U(l, u)",
        "Xu et al. 2015, Empirical evaluation of rectified activations in convolutional network",
        "https://arxiv.org/abs/1505.00853",
        "he_normal_",
        (-_INF, _INF),
        11 / 48,
        {"lower": 1 / 8, "upper": 1 / 3},
    ),
    Activation(
        "elu",
        nn.ELU,
        r"x \text{ if } x > 0 \text{ else } \alpha (e^x - 1)",
        "Clevert, Unterthiner and Hochreiter 2015, Exponential linear units",
        "https://arxiv.org/abs/1511.07289",
        "he_normal_",
        (-1.0, _INF),
        1.0,
        {"alpha": 1.0},
    ),
    Activation(
        "celu",
        nn.CELU,
        r"\max(0, x) + \min(0, \alpha (e^{x / \alpha} - 1))",
        "Barron 2017, Continuously differentiable exponential linear units",
        "https://arxiv.org/abs/1704.07483",
        "he_normal_",
        (-1.0, _INF),
        1.0,
        {"alpha": 1.0},
    ),
    Activation(
        "selu",
        nn.SELU,
        r"\lambda x \text{ if } x > 0 \text{ else } \lambda \alpha (e^x - 1)",
        "Klambauer et al. 2017, Self-normalizing neural networks",
        "https://arxiv.org/abs/1706.02515",
        "lecun_normal_",
        (-_SELU_SCALE * _SELU_ALPHA, _INF),
        _SELU_SCALE * _SELU_ALPHA,
    ),
    Activation(
        "gelu",
        nn.GELU,
        r"x \, \Phi(x)",
        "Hendrycks and Gimpel 2016, Gaussian error linear units",
        "https://arxiv.org/abs/1606.08415",
        "he_normal_",
        (0.0, _INF),
        0.5,
    ),
    Activation(
        "silu",
        nn.SiLU,
        r"x \, \sigma(x)",
        "Elfwing, Uchibe and Doya 2017, Sigmoid-weighted linear units",
        "https://arxiv.org/abs/1702.03118",
        "he_normal_",
        (0.0, _INF),
        0.5,
    ),
    Activation(
        "mish",
        nn.Mish,
        r"x \tanh(\ln(1 + e^x))",
        "Misra 2019, Mish: a self regularized non-monotonic activation function",
        "https://arxiv.org/abs/1908.08681",
        "he_normal_",
        (0.0, _INF),
        0.6,
    ),
    Activation(
        "hardswish",
        nn.Hardswish,
        r"x \min(\max(0, x + 3), 6) / 6",
        "Howard et al. 2019, Searching for MobileNetV3",
        "https://arxiv.org/abs/1905.02244",
        "he_normal_",
        (0.0, _INF),
        0.5,
    ),
    Activation(
        "softplus",
        nn.Softplus,
        r"\ln(1 + e^{\beta x}) / \beta",
        "Dugas et al. 2000, Incorporating second-order functional knowledge",
        "https://papers.nips.cc/paper/1920",
        "he_normal_",
        (0.0, _INF),
        0.5,
        {"beta": 1.0, "threshold": 20.0},
    ),
    Activation(
        "squared_relu",
        SquaredReLU,
        r"\max(0, x)^2",
        "So et al. 2021, Primer: searching for efficient transformers",
        "https://arxiv.org/abs/2109.08668",
        "he_normal_",
        (0.0, _INF),
        0.0,
    ),
    Activation(
        "absolute",
        Absolute,
        r"|x|",
        "Jarrett et al. 2009, What is the best multi-stage architecture for object recognition?",
        "https://doi.org/10.1109/ICCV.2009.5459469",
        "lecun_normal_",
        (_INF, _INF),
        0.0,
    ),
    Activation(
        "sigmoid",
        nn.Sigmoid,
        r"1 / (1 + e^{-x})",
        "Rumelhart, Hinton and Williams 1986, Learning representations by back-propagating errors",
        "https://doi.org/10.1038/323533a0",
        "xavier_normal_",
        (0.0, 1.0),
        0.25,
    ),
    Activation(
        "tanh",
        nn.Tanh,
        r"\tanh(x)",
        "LeCun et al. 1998, Efficient BackProp",
        "https://doi.org/10.1007/3-540-49430-8_2",
        "xavier_normal_",
        (-1.0, 1.0),
        1.0,
    ),
    Activation(
        "softsign",
        nn.Softsign,
        r"x / (1 + |x|)",
        "Glorot and Bengio 2010, Understanding the difficulty of training deep networks",
        "https://proceedings.mlr.press/v9/glorot10a.html",
        "xavier_normal_",
        (-1.0, 1.0),
        1.0,
    ),
    Activation(
        "step",
        Step,
        r"1 \text{ if } x > 0 \text{ else } 0",
        "McCulloch and Pitts 1943, A logical calculus of the ideas immanent in nervous activity",
        "https://doi.org/10.1007/BF02478259",
        "he_normal_",
        (0.0, 1.0),
        0.0,
    ),
)

REGISTRY: Mapping[str, Activation] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every member of the family by name."""


def activation_names() -> tuple[str, ...]:
    """Return the names of the registry, in its order."""
    return tuple(REGISTRY)


def _nearest(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong.lower(), known, n=3, cutoff=0.4)
    if close:
        return "the nearest known: " + ", ".join(close)
    return "known: " + (", ".join(known) or "none, it takes no parameter")


def activation(name: str, **parameters: float | int | bool) -> nn.Module:
    """Build a member of the family as a module.

    Args:
        name: A name of the registry, such as ``"leaky_relu"``; see :func:`activation_names`.
        **parameters: The module's own parameters, such as ``negative_slope=0.1``; what is not
            given takes torch's default, as listed in ``REGISTRY[name].parameters``.

    Returns:
        The module, in training mode as torch builds it. ``prelu`` holds a parameter of its own.

    Raises:
        ValueError: If the name is unknown, or a parameter is not a finite number.
        TypeError: If the member has no such parameter.

    Example:
        >>> activation("leaky_relu", negative_slope=0.1)
        LeakyReLU(negative_slope=0.1)
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown activation {name!r}; {_nearest(str(name), list(REGISTRY))}")
    entry = REGISTRY[name]
    known = [key for key in inspect.signature(entry.module).parameters if key != "input"]
    for key, value in parameters.items():
        if key not in known:
            raise TypeError(f"{name!r} has no parameter {key!r}; {_nearest(key, known)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} of {name!r} must be a finite number, not {value!r}")
    return entry.module(**parameters)
