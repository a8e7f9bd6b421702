"""What happens at a kink: the slopes there, exact zeros, and networks that choose ReLU'(0)."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook._optional import require
from relubook.evidence.data import Dataset
from relubook.layers.activations import REGISTRY, activation, relu_with_derivative_at_zero
from relubook.training.recipe import Recipe
from relubook.training.stack import RecipeStack, member_seeds
from relubook.training.train import train

Seeds = int | Iterable[int]
Elementwise = Callable[[Tensor], Tensor]
Rule = Callable[[Tensor, Tensor], Tensor]
"""A ReLU of an input and of the value that stands for its derivative at 0."""


class Slopes(NamedTuple):
    """Left and right derivative of a function of one number, and what autograd returns."""

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
        return 0.0 if self.left * self.right <= 0 else min(self.left, self.right, key=abs)

    @property
    def is_one_sided(self) -> bool:
        """Whether one of the two one-sided derivatives is returned, to within 1e-6."""
        return min(abs(self.returned - self.left), abs(self.returned - self.right)) < 1e-6


def slopes_at(function: Elementwise, point: float, dtype: torch.dtype = torch.float64) -> Slopes:
    """Compare a function's one-sided derivatives with what autograd returns in a type.

    The one-sided ones are difference quotients over 2^-26 in float64, exact for functions that
    are linear on either side.
    """
    step = 2.0**-26
    with torch.no_grad():
        low, here, high = function(point + step * torch.arange(-1.0, 2.0, dtype=torch.float64))
    at = torch.tensor([point], dtype=dtype, requires_grad=True)
    (returned,) = torch.autograd.grad(function(at).sum(), at)
    return Slopes((here - low).item() / step, (high - here).item() / step, returned.item())


def kinks() -> dict[str, tuple[Elementwise, float]]:
    """Return functions by name, each with a point where it may have a kink.

    They are the registry's at 0 (without the step function, which jumps), the corners of torch's
    other piecewise linear functions, and ways to write ReLU or the absolute value.
    """
    zero = torch.zeros_like
    names = [name for name in REGISTRY if name != "step"]
    return {name: (activation(name).double().eval(), 0.0) for name in names} | {
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
    """By network: share of pre-activations exactly 0; share of these rounded, not exact sums."""

    share: Tensor
    rounded: Tensor


def exact_zeros(
    x: Tensor, seeds: Iterable[int], *, one_sum: bool, width: int = 512, bias: float = 0.1
) -> ZeroCount:
    """Count exact zeros in random layers, in the precision of their inputs (n, features).

    Weights are normal with He's variance for half of the inputs (as many digits' pixels are
    black), biases uniform up to ``bias``. Weights, inputs and bias are summed in one go and rounded
    once, or the sum is rounded before the bias is added. The exact sum is looked up in float64.
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


@torch.no_grad()
def normalized_zeros(recipe: Recipe, x: Tensor, seeds: Seeds) -> Tensor:
    """Return each network's share of exact zeros behind its batch normalizations, (networks,)."""
    layers = recipe.stack(seeds, dtype=x.dtype).hidden(x)
    return torch.stack([(z == 0).double().mean((1, 2)) for z, _ in layers]).mean(0)


@torch.no_grad()
def structural_zeros(recipe: Recipe, x: Tensor, seeds: Seeds) -> ZeroCount:
    """Count exact zeros behind the first of several hidden layers.

    A zero counts as rounded unless all units of the layer before are silent on that input.
    """
    zeros, rounded, units = [], [], 0
    for (_, before), (z, _) in itertools.pairwise(recipe.stack(seeds, dtype=x.dtype).hidden(x)):
        at_zero = z == 0
        zeros.append(at_zero.double().sum((1, 2)))
        rounded.append((at_zero & (before != 0).any(2, keepdim=True)).double().sum((1, 2)))
        units += z[0].numel()
    found = torch.stack(zeros).sum(0)
    return ZeroCount(found / units, torch.stack(rounded).sum(0) / found)


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

    Source: ``relu.py`` of github.com/deel-ai/relu-prime, read at commit aa204578.
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
    seeds: Seeds,
    values: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    rule: Rule = relu_with_derivative_at_zero,
) -> RecipeStack:
    """Stack the ReLU networks of all seeds once for each value of ReLU'(0), value by value."""
    seeds = member_seeds(seeds)
    stack = recipe.stack([*seeds] * len(values), dtype=dtype)
    each = torch.tensor(values, dtype=dtype).repeat_interleave(len(seeds))[:, None, None]
    for layer in range(1, len(recipe.hidden_widths) + 1):
        setattr(stack, f"act{layer}", _Chosen(rule, each))
    return stack


def gradient_changes(
    recipe: Recipe, x: Tensor, cost: Callable[[Tensor], Tensor], seeds: Seeds
) -> Tensor:
    """Return which networks' first gradient differs between ReLU'(0) = 0 and 1, bool (networks,).

    The cost maps the outputs of all members to their sum of costs.
    """
    stack = chosen_at_zero(recipe, seeds, (0, 1), dtype=x.dtype)
    parts = torch.autograd.grad(cost(stack(x)), list(stack.parameters()))
    at_zero, at_one = torch.cat([g.flatten(1) for g in parts], 1).chunk(2)
    return (at_zero != at_one).any(1)


def train_choices(
    recipe: Recipe,
    data: Dataset,
    seeds: Seeds,
    *,
    values: Sequence[float] = (0, 0.5, 1),
    rule: Rule = relu_with_derivative_at_zero,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Train classifiers by SGD that differ in ReLU'(0) alone; settings are those of ``train``.

    Returns test accuracy (values, networks), and which networks end with other weights under the
    last value than under the first. All in the type of the data, but cross-entropy in float32.
    """
    stack = chosen_at_zero(recipe, seeds, values, dtype=data.train.x.dtype, rule=rule)
    settings |= {"optimizer": "sgd", "loss": lambda out, y: F.cross_entropy(out.float(), y)}
    train(stack, data.train.x, data.train.y, record=[], progress=False, **settings)
    with torch.no_grad():
        right = stack.eval()(data.test.x).argmax(-1) == data.test.y
    weights = stack.parameter_vectors().chunk(len(values))
    return right.double().mean(1).view(len(values), -1), (weights[0] != weights[-1]).any(1)


def collapses(
    recipe: Recipe, x: Tensor, y: Tensor, seeds: Seeds, *, lr: float, steps: int
) -> Tensor:
    """Return which networks of one output end constant, to 1e-3, under ReLU'(0) = 0 and 1.

    Bool (2, networks), after full batches of Adam and the squared error.
    """
    stack = chosen_at_zero(recipe, seeds, (0, 1), dtype=x.dtype)
    train(stack, x, y, steps=steps, lr=lr, record=[], progress=False)
    with torch.no_grad():
        outputs = stack(x)[..., 0]
    return (outputs.amax(1) - outputs.amin(1) < 1e-3).view(2, -1)


NOISES = ("normal", "uniform", "outliers")


def line_data(noise: str, seed: int, n: int = 60) -> tuple[Tensor, Tensor]:
    """Draw x, uniform on [-1, 1], and y = 2 x + 1 with noise, (n,), float64.

    The noise is standard normal; uniform on [-1, 1]; or normal with one point in twenty, on
    average, 20 times as far off (``"outliers"``).
    """
    draw = torch.Generator().manual_seed(seed)
    x, u = 2 * torch.rand(2, n, generator=draw, dtype=torch.float64) - 1
    e = torch.randn(n, generator=draw, dtype=torch.float64)
    shapes = {"normal": e, "uniform": u, "outliers": e * torch.where(u > 0.9, 20, 1)}
    return x, 2 * x + 1 + shapes[noise]


def fit_line(x: Tensor, y: Tensor, power: int) -> Tensor:
    """Return slope and intercept that minimize the sum of the absolute errors' powers, power >= 1.

    Power 1 is solved exactly as a linear program (Koenker and Bassett 1978,
    https://doi.org/10.2307/1913643), 2 by linear equations, higher ones by Newton's method.
    """
    if power == 1:
        linear = require("sklearn.linear_model", "exact fits of the absolute error")
        exact = linear.QuantileRegressor(quantile=0.5, alpha=0).fit(x[:, None].numpy(), y.numpy())
        return torch.tensor([exact.coef_[0], exact.intercept_], dtype=x.dtype)
    inputs = torch.stack([x, torch.ones_like(x)], 1)
    line: Tensor = torch.linalg.lstsq(inputs, y).solution
    for _ in range(60 if power > 2 else 0):
        r = y - inputs @ line
        weighted = inputs * r.abs()[:, None] ** (power - 2)
        line = line + torch.linalg.solve(weighted.T @ inputs, weighted.T @ r) / (power - 1)
    return line


def descend_on_lines(
    cost: Callable[[Tensor], Tensor], *, sets: int, rate: float, decay: float = 1, steps: int = 1000
) -> tuple[Tensor, Tensor]:
    """Fit noise-free lines by gradient descent: all kinks of the cost lie at the solution.

    A set has 30 points; the rate decays by a factor a step. Returns the distance of slope and
    intercept from the solution before each step, (steps, sets), and which sets met an error of 0.
    """
    draw = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(sets, 30, generator=draw, dtype=torch.float64) - 1
    true = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    w = torch.zeros(sets, 2, 1, dtype=torch.float64)
    path, met = [], torch.zeros(sets, dtype=torch.bool)
    for t in range(steps):
        w.requires_grad_()
        e = w[:, 0] * x + w[:, 1] - (2 * x + 1)
        (gradient,) = torch.autograd.grad(cost(e).mean(1).sum(), w)
        path.append((w - true).norm(dim=(1, 2)).detach())
        met |= (e == 0).any(1)
        w = (w - rate * decay**t * gradient).detach()
    return torch.stack(path), met
