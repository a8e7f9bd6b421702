"""Lines fitted under different costs of the error: exactly, and by gradient descent."""

from collections.abc import Callable

import torch
from torch import Tensor

from relubook._optional import require

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
