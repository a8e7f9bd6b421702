"""What the chapter on how units die measures: outliers, dates of deaths, and what is lost."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook.training.losses import loss_function, of_each_member
from relubook.training.stack import RecipeStack, Stack, batch_order
from relubook.training.train import train

__all__ = [
    "Autopsy",
    "Dates",
    "History",
    "OutlierTrial",
    "autopsy",
    "dates",
    "fires",
    "gets_gradient",
    "half_squared_error",
    "lost_units",
    "network_shares",
    "outlier_trial",
    "plant_dead_",
    "rebuilt_variance",
    "revived_after",
    "sigmoid_recovery",
]


def half_squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Return half the mean squared error, whose derivative is the error."""
    return F.mse_loss(output, y) / 2


def _linear(network: Stack, layer: int) -> Any:
    return network.get_submodule(f"linear{layer}")


@torch.no_grad()
def fires(network: Stack, x: Tensor) -> list[Tensor]:
    """Return for each hidden layer which units fire on any input, NaN never, (members, width)."""
    return [pre.amax(1) > 0 for pre, _ in network.hidden(x)]


def gets_gradient(network: RecipeStack, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return for each hidden layer to which units a batch sends any gradient, (members, width)."""
    layers = [_linear(network, layer + 1) for layer in range(len(network.recipe.hidden_widths))]
    parameters = [p for linear in layers for p in (linear.weight, linear.bias)]
    loss = of_each_member(loss_function(None, y))(network(x), y.expand(len(network), *y.shape))
    gradients = torch.autograd.grad(loss.sum(), parameters)
    pairs = zip(gradients[::2], gradients[1::2], strict=True)
    return [(weight != 0).any(1) | (bias != 0) for weight, bias in pairs]


def network_shares(what: Tensor, among: Tensor) -> Tensor:
    """Return the share of the units ``among`` with ``what``, both (members, width).

    Networks without any such unit are left out: shape (k,), k <= members.
    """
    counts = among.sum(1)
    return ((what & among).sum(1) / counts)[counts > 0]


@torch.no_grad()
def rebuilt_variance(network: Stack, x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of the new inputs' variance that the first hidden layer's outputs rebuild.

    By ridge regression fitted on x; and the outputs' rank on 300 inputs of x; both (members,).
    """
    seen, judged = (network.hidden(v)[0][1].double() for v in (x, new))
    rank = torch.linalg.matrix_rank(seen[:, :300].float()).to(seen.dtype)
    seen, judged = (torch.cat([h, torch.ones_like(h[..., :1])], 2) for h in (seen, judged))
    ridge = seen.mT @ seen + 1e-3 * len(x) * torch.eye(seen.shape[2], dtype=seen.dtype)
    error = judged @ torch.linalg.solve(ridge, seen.mT @ x.double()) - new
    total = (new - x.mean(0)).double().square().sum()
    return 1 - error.square().sum((1, 2)) / total, rank


def lost_units(network: Stack, x: Tensor) -> list[Tensor]:
    """Return for each hidden layer which units have derivative 0 on all inputs, (members, width).

    For ReLU these are the dead, for sigmoid and tanh those saturated until it rounds to 0.
    """
    pairs = network.hidden(x)
    slopes = [torch.autograd.grad(post.sum(), pre)[0] for pre, post in pairs]
    return [(slope == 0).all(1) for slope in slopes]


class History:
    """Which units fire on x at the start and after every so many steps: an ``each_step``."""

    def __init__(self, network: Stack, x: Tensor, every: int = 1):
        self.x, self.every = x, every
        self.steps, self.looks = [0], [fires(network, x)]

    def __call__(self, step: int, network: Stack, optimizer: torch.optim.Optimizer) -> None:
        """Look, if it is time."""
        if step % self.every == 0:
            self.steps.append(step)
            self.looks.append(fires(network, self.x))

    def layer(self, layer: int) -> Tensor:
        """Return which units of a hidden layer, counted from 1, fired: (looks, members, width)."""
        return torch.stack([look[layer - 1] for look in self.looks])


def sigmoid_recovery(starts: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Let saturated sigmoid units learn target 0 by their biases: half squared error, rate 1.

    Returns the step at which each is back at 2 or below, -1 for never, and whether it moved.
    """
    start = torch.as_tensor(starts, dtype=torch.float32)
    z, back = start.clone(), torch.full(start.shape, -1)
    for step in range(1, steps + 1):
        s = torch.sigmoid(z)
        z = z - s * ((1 - s) * s)
        back[(z <= 2) & (back < 0)] = step
    return back, z != start


class Dates(NamedTuple):
    """Steps at which units first died and first came back after that, (members, width); or -1."""

    death: Tensor
    revival: Tensor


def dates(history: History, layer: int) -> Dates:
    """Find when the units of a layer that had fired first did not, and when they did again."""
    on, when = history.layer(layer), torch.tensor(history.steps)
    down = on.int().cummax(0).values.bool() & ~on
    back = down.int().cummax(0).values.bool() & on
    return Dates(_first(down, when), _first(back, when))


def revived_after(history: History, layer: int, step: int) -> tuple[Tensor, Tensor]:
    """Return which units are dead at a step that fired before, and when they do again.

    Both (members, width), the second in steps from there; -1 for never and for other units.
    """
    at, on = history.steps.index(step), history.layer(layer)
    dead = on[: at + 1].any(0) & ~on[at]
    again = _first(on[at:], torch.tensor(history.steps[at:])) - step
    return dead, torch.where(dead & (again > 0), again, -1)


def _first(event: Tensor, when: Tensor) -> Tensor:
    return torch.where(event.any(0), when[event.int().argmax(0)], -1)


class Autopsy(NamedTuple):
    """Why the units of one hidden layer are silent, each (members, width)."""

    died: Tensor  # fired at the start and does not now
    negative_bias: Tensor
    without_bias: Tensor  # would fire with bias 0
    with_first_weights: Tensor  # would fire with the first weights and the bias of now
    bias_share: Tensor  # |b| / (|b| + |mean w x|)


@torch.no_grad()
def autopsy(network: Stack, start: Stack, x: Tensor, layer: int) -> Autopsy:
    """Ask of each unit whether its bias or its weights keep it silent on the inputs of today.

    ``start`` are the same networks before training; layers count from 1.
    """
    h = x if layer == 1 else network.hidden(x)[layer - 2][1]
    now, then = _linear(network, layer), _linear(start, layer)
    drive = h @ now.weight
    top, middle, bias = drive.amax(1), drive.mean(1).abs(), now.bias
    return Autopsy(
        died=fires(start, x)[layer - 1] & (top + bias <= 0),
        negative_bias=bias < 0,
        without_bias=top > 0,
        with_first_weights=(h @ then.weight).amax(1) + bias > 0,
        bias_share=bias.abs() / (bias.abs() + middle),
    )


@torch.no_grad()
def plant_dead_(network: Stack, share: float, *, layers: Sequence[int]) -> list[Tensor]:
    """Give a share of the units of each layer weights 0 and bias -1: no plain gradient moves them.

    The units are drawn by the member's seed; returns for each layer which, (members, width).
    """
    chosen = []
    for layer in layers:
        weight, bias = _linear(network, layer).weight, _linear(network, layer).bias
        mask = torch.zeros(bias.shape, dtype=torch.bool)
        for row, seed in zip(mask, network.seeds, strict=True):
            generator = torch.Generator().manual_seed(1000 * seed + layer)
            row[torch.randperm(len(row), generator=generator)[: round(share * len(row))]] = True
        weight.masked_fill_(mask[:, None, :], 0.0)
        bias.masked_fill_(mask, -1.0)
        chosen.append(mask)
    return chosen


class OutlierTrial(NamedTuple):
    """What one outlier did to trained networks, (members,) or, ``lost``, (members, layers)."""

    lost: Tensor  # share of the units lost by the step; NaN for parameters not finite
    harm: Tensor  # loss right after the step over that after an ordinary batch; may be infinite
    lasting_harm: Tensor  # the same after the ordinary steps that follow
    by_bias: Tensor  # of the silenced first-layer ReLUs, how many fire with the old bias; or NaN
    by_weights: Tensor  # the same with the old weights
    overflowed: Tensor  # not finite in the end


def outlier_trial(
    network: RecipeStack,
    x: Tensor,
    y: Tensor,
    *,
    size: float,
    kind: str,
    loss: Any = half_squared_error,
    lr: float = 0.1,
    after: int = 0,
    batch_size: int = 8,
) -> OutlierTrial:
    """Put one outlier into one batch of plain SGD, and train copies on for ``after`` steps.

    ``size`` multiplies the first example's inputs (kind "input") or is taken from its target
    ("target"). A twin of each member sees the same batches without the outlier.
    """
    index = torch.stack([batch_order(s + 10**6, len(x), batch_size, 1)[0] for s in network.seeds])
    spoiled_x, spoiled_y = x[index], y[index]
    if kind == "input":
        spoiled_x[:, 0] *= size
    else:
        spoiled_y[:, 0] -= size
    hit, twin = copy.deepcopy(network), copy.deepcopy(network)

    def go(stack: Stack, *batch: Tensor, steps: int = 1, size: int | None = None) -> Tensor:
        run = train(
            stack, *batch, steps=steps, lr=lr, optimizer="sgd", loss=loss, batch_size=size,
            validation=(x, y), record=[],
        )  # fmt: skip
        return run.validation_loss[-1]

    at_once = go(hit, spoiled_x, spoiled_y) / go(twin, x[index], y[index])
    was, now = lost_units(network, x), lost_units(hit, x)
    share = torch.stack([(b & ~a).to(x.dtype).mean(1) for a, b in zip(was, now, strict=True)], 1)
    share[~hit.parameter_vectors().isfinite().all(1)] = math.nan
    old, new = _linear(network, 1), _linear(hit, 1)
    silenced = now[0] & ~was[0]
    back = []
    for weight, bias in ((new.weight, old.bias), (old.weight, new.bias)):
        would_fire = (x @ weight + bias[:, None]).amax(1) > 0
        back.append((would_fire & silenced).sum(1) / silenced.sum(1))  # NaN: no unit, no share
    lasting = at_once
    if after:
        harmed, ordinary = (go(s, x, y, steps=after, size=batch_size) for s in (hit, twin))
        lasting = harmed / ordinary
    overflowed = ~hit.parameter_vectors().isfinite().all(1) | ~lasting.isfinite()
    return OutlierTrial(
        lost=share,
        harm=at_once.nan_to_num(math.inf, math.inf),
        lasting_harm=torch.where(overflowed, math.inf, lasting),
        by_bias=back[0],
        by_weights=back[1],
        overflowed=overflowed,
    )
