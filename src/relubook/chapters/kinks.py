"""What happens at a kink: the slopes there, exact zeros, and networks that choose ReLU'(0)."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.evidence.data import Dataset
from relubook.layers.activations import REGISTRY, activation, relu_with_derivative_at_zero
from relubook.training.recipe import Recipe
from relubook.training.stack import RecipeStack, member_seeds
from relubook.training.train import train

__all__ = [
    "Slopes",
    "ZeroCount",
    "chosen_at_zero",
    "collapses",
    "constant_at_zero",
    "exact_zeros",
    "gradient_changes",
    "kinks",
    "normalized_zeros",
    "slopes_at",
    "structural_zeros",
    "train_choices",
]

Rule = Callable[[Tensor, Tensor], Tensor]
"""A ReLU of an input and of the value that stands for its derivative at 0."""


class Slopes(NamedTuple):
    """The slopes of a function of one number at a point.

    Attributes:
        left: Its left derivative.
        right: Its right derivative.
        returned: What automatic differentiation returns; NaN is possible.
    """

    left: float
    right: float
    returned: float

    @property
    def is_kink(self) -> bool:
        """Whether left and right differ, by more than 1e-6."""
        return abs(self.left - self.right) >= 1e-6

    @property
    def least(self) -> float:
        """The number of least absolute value between the two slopes, as torch documents."""
        least = min(self.left, self.right, key=abs)
        return 0.0 if self.left * self.right <= 0 else least

    @property
    def is_one_sided(self) -> bool:
        """Whether one of the two one-sided derivatives is returned, to within 1e-6."""
        return min(abs(self.returned - self.left), abs(self.returned - self.right)) < 1e-6


def slopes_at(
    function: Callable[[Tensor], Tensor], point: float, dtype: torch.dtype = torch.float64
) -> Slopes:
    """Compare a function's one-sided derivatives with what automatic differentiation returns.

    The one-sided derivatives are difference quotients over 2^-26 in float64, exact for functions
    that are linear on either side.

    Args:
        function: Maps a tensor of shape (n,) elementwise.
        point: Where.
        dtype: Type in which automatic differentiation runs.

    Returns:
        The three slopes.
    """
    step = 2.0**-26
    with torch.no_grad():
        low, here, high = function(point + step * torch.arange(-1.0, 2.0, dtype=torch.float64))
    at = torch.tensor([point], dtype=dtype, requires_grad=True)
    (returned,) = torch.autograd.grad(function(at).sum(), at)
    return Slopes((here - low).item() / step, (high - here).item() / step, returned.item())


def kinks() -> dict[str, tuple[Callable[[Tensor], Tensor], float]]:
    """Return functions by name, each with a point where it may have a kink.

    They are the members of the registry at 0 (the step function, which jumps there, left out),
    the corners of torch's other piecewise linear functions, and ways to write ReLU or the
    absolute value with operations on numbers.
    """
    zero = torch.zeros_like
    registry = {
        name: (activation(name).double().eval(), 0.0) for name in REGISTRY if name != "step"
    }
    return registry | {
        "elu, alpha = 2": (nn.ELU(2.0), 0.0),
        "relu6 at 6": (F.relu6, 6.0),
        "threshold": (lambda x: F.threshold(x, 0, 0), 0.0),
        "hardtanh at 1": (F.hardtanh, 1.0),
        "hardsigmoid at 3": (F.hardsigmoid, 3.0),
        "hardswish at -3": (F.hardswish, -3.0),
        "hardswish at 3": (F.hardswish, 3.0),
        "softshrink at 0.5": (F.softshrink, 0.5),
        "clamp(x, min=0)": (lambda x: x.clamp(min=0), 0.0),
        "maximum(x, 0)": (lambda x: torch.maximum(x, zero(x)), 0.0),
        "where(x > 0, x, 0)": (lambda x: torch.where(x > 0, x, 0), 0.0),
        "where(x >= 0, x, 0)": (lambda x: torch.where(x >= 0, x, 0), 0.0),
        "stack (x, 0), max": (lambda x: torch.stack([x, zero(x)]).max(0).values, 0.0),
        "stack (0, x), max": (lambda x: torch.stack([zero(x), x]).max(0).values, 0.0),
        "stack (x, 0), amax": (lambda x: torch.stack([x, zero(x)]).amax(0), 0.0),
        "(x + |x|) / 2": (lambda x: (x + x.abs()) / 2, 0.0),
        "sqrt(x * x)": (lambda x: (x * x).sqrt(), 0.0),
    }


class ZeroCount(NamedTuple):
    """Exact zeros among the pre-activations of networks.

    Attributes:
        share: Share of the pre-activations that are exactly 0, a number a network.
        rounded: Share of these zeros that are rounded numbers, not exact sums; NaN without zeros.
    """

    share: Tensor
    rounded: Tensor


def exact_zeros(
    x: Tensor, seeds: Iterable[int], *, one_sum: bool, width: int = 512, bias: float = 0.1
) -> ZeroCount:
    """Count exact zeros in random layers, in the precision of their inputs.

    Weights are normal with He's variance for half of the inputs (as many digits' pixels are
    black), biases uniform. For each zero the sum is looked up in float64.

    Args:
        x: Inputs, shape (n, features), in the type whose rounding is in question.
        seeds: One a layer.
        one_sum: Whether weights, inputs and bias are summed in one go and rounded once; otherwise
            the sum is rounded before the bias is added.
        width: Units a layer.
        bias: Largest absolute bias.

    Returns:
        The count, shapes (seeds,).
    """
    counts = []
    features = x.shape[1]
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(width, features, generator=draw) / (features / 2) ** 0.5
        weight = weight.to(x.dtype)
        shift = (2 * bias * torch.rand(width, generator=draw) - bias).to(x.dtype)
        z = F.linear(x, weight, shift) if one_sum else F.linear(x, weight) + shift
        row, unit = (z == 0).nonzero().T
        exact = (x.double()[row] * weight.double()[unit]).sum(1) + shift.double()[unit]
        counts.append((len(row) / z.numel(), (exact != 0).double().mean().item()))
    return ZeroCount(*torch.tensor(counts, dtype=torch.float64).T)


def normalized_zeros(recipe: Recipe, x: Tensor, seeds: int | Iterable[int]) -> Tensor:
    """Return each network's share of exact zeros behind its batch normalizations.

    Args:
        recipe: Networks with batch normalization.
        x: Inputs, shape (n, inputs), in the type of the computation.
        seeds: One a network; a number m stands for ``range(m)``.

    Returns:
        Shape (networks,), float64.

    Raises:
        ValueError: If the recipe has no batch normalization.
    """
    if recipe.normalization != "batch":
        raise ValueError(f"normalization must be 'batch', not {recipe.normalization!r}")
    with torch.no_grad():
        layers = recipe.stack(seeds, dtype=x.dtype).hidden(x)
    shares = [(z == 0).double().mean((1, 2)) for z, _ in layers]
    return torch.stack(shares).mean(0)


def structural_zeros(recipe: Recipe, x: Tensor, seeds: int | Iterable[int]) -> ZeroCount:
    """Count exact zeros behind the first layer, where whole layers can be silent on an input.

    Args:
        recipe: Plain networks of two hidden layers or more.
        x: Inputs, shape (n, inputs).
        seeds: One a network; a number m stands for ``range(m)``.

    Returns:
        The count, shapes (networks,). A zero counts as rounded unless all units of the layer
        before it are silent.

    Raises:
        ValueError: If the networks have fewer than two hidden layers.
    """
    if recipe.hidden < 2:
        raise ValueError(f"two hidden layers are needed, the recipe has {recipe.hidden}")
    stack = recipe.stack(seeds, dtype=x.dtype)
    zeros, rounded = torch.zeros(2, len(stack), dtype=torch.float64)
    all_units = 0
    with torch.no_grad():
        layers = stack.hidden(x)
    for (_, before), (z, _) in itertools.pairwise(layers):
        at_zero = z == 0
        zeros = zeros + at_zero.double().sum((1, 2))
        rounded = rounded + (at_zero & (before != 0).any(2, keepdim=True)).double().sum((1, 2))
        all_units += z[0].numel()
    return ZeroCount(zeros / all_units, rounded / zeros)


class _ConstantAtZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.save_for_backward(x, value)
        return torch.relu(x)

    @staticmethod
    def backward(ctx, incoming):
        x, value = ctx.saved_tensors
        return torch.where(x == 0, value, incoming * (x > 0)), None


def constant_at_zero(input: Tensor, value: Tensor) -> Tensor:
    """ReLU whose backward pass puts the value itself where the input is 0: not the chain rule.

    For comparison with :func:`relubook.layers.activations.relu_with_derivative_at_zero`, which multiplies
    the value by the incoming gradient.

    Args:
        input: Any shape, floating point.
        value: Can be expanded to that shape.

    Returns:
        Same shape as the input.

    Source:
        ``relu.py`` of github.com/deel-ai/relu-prime, read at commit aa204578.
    """
    return _ConstantAtZero.apply(input, value)


class _Chosen(nn.Module):
    def __init__(self, rule: Rule, values: Tensor):
        super().__init__()
        self.rule, self.values = rule, values

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.values)


def chosen_at_zero(
    recipe: Recipe,
    seeds: int | Iterable[int],
    values: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    rule: Rule = relu_with_derivative_at_zero,
) -> RecipeStack:
    """Stack the networks of all seeds once for each value of ReLU'(0).

    Args:
        recipe: Networks with ReLU.
        seeds: One a network; a number m stands for ``range(m)``.
        values: Values of the derivative at 0.
        dtype: Type of the parameters.
        rule: What the backward pass does with the value.

    Returns:
        ``len(values) * networks`` members, value by value.

    Raises:
        ValueError: If the recipe's activation is not ReLU.
    """
    if recipe.activation != "relu":
        raise ValueError(f"the activation must be 'relu', not {recipe.activation!r}")
    seeds = member_seeds(seeds)
    stack = recipe.stack([*seeds] * len(values), dtype=dtype)
    each = torch.tensor(values, dtype=dtype).repeat_interleave(len(seeds))[:, None, None]
    for layer in range(1, recipe.hidden + 1):
        setattr(stack, f"act{layer}", _Chosen(rule, each))
    return stack


def gradient_changes(
    recipe: Recipe,
    x: Tensor,
    cost: Callable[[Tensor], Tensor],
    seeds: int | Iterable[int],
) -> Tensor:
    """Return which networks' gradient differs between ReLU'(0) = 0 and 1, at the start.

    Args:
        recipe: Networks with ReLU.
        x: Inputs, shape (n, inputs), in the type of the computation.
        cost: Maps the outputs of all members to one number, their sum of costs.
        seeds: One a network; a number m stands for ``range(m)``.

    Returns:
        Bool, shape (networks,).
    """
    stack = chosen_at_zero(recipe, seeds, (0, 1), dtype=x.dtype)
    parts = torch.autograd.grad(cost(stack(x)), list(stack.parameters()))
    at_zero, at_one = torch.cat([g.flatten(1) for g in parts], 1).chunk(2)
    return (at_zero != at_one).any(1)


def train_choices(
    recipe: Recipe,
    data: Dataset,
    seeds: int | Iterable[int],
    *,
    lr: float,
    steps: int,
    batch_size: int,
    values: Sequence[float] = (0, 0.5, 1),
    rule: Rule = relu_with_derivative_at_zero,
) -> tuple[Tensor, Tensor]:
    """Train classifiers by SGD that differ in the value of ReLU'(0) alone.

    Every value gets the same starts and the same batches, in the type of the data; the
    cross-entropy is computed in float32.

    Args:
        recipe: Networks with ReLU.
        data: A classification data set.
        seeds: One a network; a number m stands for ``range(m)``.
        lr: Learning rate.
        steps: Number of steps.
        batch_size: Examples a step.
        values: Values of the derivative at 0.
        rule: What the backward pass does with the value.

    Returns:
        Test accuracy, shape (values, networks); a non-finite network counts by what its
        ``argmax`` says. And which networks end with other weights under the last value than
        under the first, bool, shape (networks,).
    """
    seeds = member_seeds(seeds)
    stack = chosen_at_zero(recipe, seeds, values, dtype=data.train.x.dtype, rule=rule)
    train(
        stack, data.train.x, data.train.y, steps=steps, lr=lr, optimizer="sgd",
        batch_size=batch_size, record=[], progress=False,
        loss=lambda out, y: F.cross_entropy(out.float(), y),
    )  # fmt: skip
    with torch.no_grad():
        right = stack.eval()(data.test.x).argmax(-1) == data.test.y
    weights = stack.parameter_vectors().chunk(len(values))
    accuracy = right.double().mean(1).view(len(values), len(seeds))
    return accuracy, (weights[0] != weights[-1]).any(1)


def collapses(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    seeds: int | Iterable[int],
    *,
    lr: float,
    steps: int,
    values: Sequence[float] = (0, 1),
) -> Tensor:
    """Return which networks end as a constant, for each value of ReLU'(0).

    Full batches, Adam, squared error. Constant means that the outputs differ by less than 1e-3.

    Args:
        recipe: Networks with ReLU and one output.
        x: Inputs, shape (n, inputs).
        y: Targets, shape (n, 1).
        seeds: One a network; a number m stands for ``range(m)``.
        lr: Learning rate.
        steps: Number of steps.
        values: Values of the derivative at 0.

    Returns:
        Bool, shape (values, networks).
    """
    stack = chosen_at_zero(recipe, seeds, values, dtype=x.dtype)
    train(stack, x, y, steps=steps, lr=lr, record=[], progress=False)
    with torch.no_grad():
        outputs = stack(x)[..., 0]
    return (outputs.amax(1) - outputs.amin(1) < 1e-3).view(len(values), -1)
