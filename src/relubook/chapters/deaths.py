"""Follow units through their deaths: one outlier, every date, and units dead from the start.

>>> import torch
>>> from relubook.training.recipe import Recipe
>>> from relubook.training.train import train
>>> x = torch.linspace(-1, 1, 64)[:, None]
>>> stack = Recipe(1, 8, 1).stack(30)
>>> history = History(stack, x)
>>> run = train(stack, x, x.abs(), steps=20, lr=0.1, optimizer="sgd", each_step=history)
>>> history.layer(1).shape
torch.Size([21, 30, 8])
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    """Say which units have a positive pre-activation on at least one input.

    Args:
        network: A stack of networks.
        x: Inputs, shape (n, inputs) or (members, n, inputs).

    Returns:
        For each hidden layer truth values of shape (members, width). A unit whose pre-activations
        are NaN counts as not firing: ask for diverged members apart.
    """
    return [pre.amax(1) > 0 for pre, _ in network.hidden(x)]


def gets_gradient(network: RecipeStack, x: Tensor, y: Tensor, loss: Any = None) -> list[Tensor]:
    """Say to which units' incoming weights or biases a batch sends a gradient other than 0.

    Args:
        network: A stack of networks with biases.
        x: The batch's inputs, shape (n, inputs).
        y: Its labels or targets, shape (n, ...).
        loss: As for :func:`relubook.training.train.train`.

    Returns:
        For each hidden layer truth values of shape (members, width).
    """
    layers = [_linear(network, layer + 1) for layer in range(len(network.recipe.hidden_widths))]
    parameters = [p for linear in layers for p in (linear.weight, linear.bias)]
    each = of_each_member(loss_function(loss, y))
    losses = each(network(x), y.expand(len(network), *y.shape))
    gradients = torch.autograd.grad(losses.sum(), parameters)
    pairs = zip(gradients[::2], gradients[1::2], strict=True)
    return [(weight != 0).any(1) | (bias != 0) for weight, bias in pairs]


def network_shares(what: Tensor, among: Tensor) -> Tensor:
    """Return, network by network, the share of some units for which something is true.

    Args:
        what: Truth values of shape (members, width).
        among: Which units count, (members, width).

    Returns:
        One share for each network that has any such unit, shape (k,), k <= members.

    Example:
        >>> network_shares(torch.tensor([[True, False]]), torch.tensor([[True, True]]))
        tensor([0.5000])
    """
    counts = among.sum(1)
    return ((what & among).sum(1) / counts)[counts > 0]


@torch.no_grad()
def rebuilt_variance(network: Stack, x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Ask how much of the inputs a linear map can rebuild from the first hidden layer's outputs.

    Args:
        network: A stack of networks.
        x: Inputs to fit the map on, by ridge regression, shape (n, inputs).
        new: Inputs to judge it on, shape (m, inputs).

    Returns:
        The share of the variance of the new inputs that is rebuilt, (members,), and the rank of
        the layer's outputs on the first 300 inputs of x, (members,).
    """
    seen, judged = (network.hidden(v)[0][1].double() for v in (x, new))
    rank = torch.linalg.matrix_rank(seen[:, :300].float()).to(seen.dtype)
    seen, judged = (torch.cat([h, torch.ones_like(h[..., :1])], 2) for h in (seen, judged))
    ridge = seen.mT @ seen + 1e-3 * len(x) * torch.eye(seen.shape[2], dtype=seen.dtype)
    error = judged @ torch.linalg.solve(ridge, seen.mT @ x.double()) - new
    total = (new - x.mean(0)).double().square().sum()
    return 1 - error.square().sum((1, 2)) / total, rank


def lost_units(network: Stack, x: Tensor) -> list[Tensor]:
    """Say which units have an activation function with derivative exactly 0 on every input.

    For ReLU these are the dead units; for sigmoid and tanh those that are saturated so far, to
    either side, that the derivative rounds to 0. It is the same test for all: no gradient from
    these inputs reaches the unit's weights. A unit with NaN pre-activations does not count as lost.

    Args:
        network: A stack of networks.
        x: Inputs, shape (n, inputs) or (members, n, inputs).

    Returns:
        For each hidden layer truth values of shape (members, width).
    """
    pairs = network.hidden(x)
    slopes = [torch.autograd.grad(post.sum(), pre)[0] for pre, post in pairs]
    return [(slope == 0).all(1) for slope in slopes]


class History:
    """Which units fire at each step; give it to ``train`` as ``each_step``.

    Args:
        network: The stack that will be trained; the first look is at its start.
        x: Inputs that decide whether a unit fires, shape (n, inputs).
        every: Look after every so many steps.

    Attributes:
        steps: Steps at which was looked, R of them, 0 being the start.
    """

    def __init__(self, network: Stack, x: Tensor, every: int = 1):
        self.x, self.every = x, every
        self.steps, self.looks = [0], [fires(network, x)]

    def __call__(self, step: int, network: Stack, optimizer: torch.optim.Optimizer) -> None:
        """Look, if it is time."""
        if step % self.every == 0:
            self.steps.append(step)
            self.looks.append(fires(network, self.x))

    def layer(self, layer: int) -> Tensor:
        """Return which units of a hidden layer, counted from 1, fired: (R, members, width)."""
        return torch.stack([look[layer - 1] for look in self.looks])


def sigmoid_recovery(
    starts: Any, steps: int, *, rate: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Let saturated sigmoid units with target 0 recover by their biases alone.

    Each unit follows the gradient of half its squared error by plain steps.

    Args:
        starts: Pre-activations to start from, shape (k,).
        steps: Number of steps.
        rate: The rate.
        dtype: Type of the computation.

    Returns:
        The step at which each unit is back at 2 or below, -1 for never, and whether it has moved
        at all, both of shape (k,).
    """
    start = torch.as_tensor(starts, dtype=dtype)
    z, back = start.clone(), torch.full(start.shape, -1)
    for step in range(1, steps + 1):
        s = torch.sigmoid(z)
        z = z - rate * s * ((1 - s) * s)
        back[(z <= 2) & (back < 0)] = step
    return back, z != start


@dataclass(frozen=True)
class Dates:
    """When units died and came back; see :func:`dates`.

    Attributes:
        death: Step of the first look at which a unit that had fired did not, (M, width); -1 for
            none.
        revival: Step of the first look after that at which it fired again; -1 for none.
    """

    death: Tensor
    revival: Tensor


def dates(history: History, layer: int) -> Dates:
    """Find each unit's first death and first revival.

    Args:
        history: What was seen.
        layer: Hidden layer, counted from 1.

    Returns:
        The dates. A unit born dead that fires later and then dies counts with that death.
    """
    on, when = history.layer(layer), torch.tensor(history.steps)
    down = on.int().cummax(0).values.bool() & ~on
    back = down.int().cummax(0).values.bool() & on
    return Dates(_first(down, when), _first(back, when))


def revived_after(history: History, layer: int, step: int) -> tuple[Tensor, Tensor]:
    """Take a census of the dead at one step, and find when each fires again.

    Args:
        history: What was seen.
        layer: Hidden layer, counted from 1.
        step: Step of the census, one of those looked at.

    Returns:
        Which units are dead at that step although they had fired before, (M, width); and the
        number of steps until each fires again, (M, width), -1 for those that do not, and for
        units not in the census.
    """
    at, on = history.steps.index(step), history.layer(layer)
    dead = on[: at + 1].any(0) & ~on[at]
    again = _first(on[at:], torch.tensor(history.steps[at:])) - step
    return dead, torch.where(dead & (again > 0), again, -1)


def _first(event: Tensor, when: Tensor) -> Tensor:
    at = when[event.int().argmax(0)]
    return torch.where(event.any(0), at, -1)


@dataclass(frozen=True)
class Autopsy:
    """Why the units of one hidden layer are silent; all truth values of shape (M, width).

    Attributes:
        died: Units that fired on the data at the start and do not now.
        negative_bias: Units whose bias is below 0.
        without_bias: Units that would fire with bias 0.
        with_first_weights: Units that would fire with the incoming weights they had at the start
            and the bias they have now.
        bias_share: How much of the mean pre-activation is the bias: ``|b| / (|b| + |mean w x|)``,
            a number for each unit.
    """

    died: Tensor
    negative_bias: Tensor
    without_bias: Tensor
    with_first_weights: Tensor
    bias_share: Tensor


@torch.no_grad()
def autopsy(network: Stack, start: Stack, x: Tensor, layer: int) -> Autopsy:
    """Ask of each unit whether its bias or its weights keep it silent.

    The inputs of the layer are those of today in every case, but for ``died``.

    Args:
        network: Trained networks.
        start: The same networks before training.
        x: Inputs, shape (n, inputs).
        layer: Hidden layer, counted from 1.

    Returns:
        What would make each unit fire on at least one input.
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
    """Kill the same share of units in each network, for good.

    A chosen unit gets incoming weights 0 and bias -1. Its pre-activation is then -1 on every
    input, so that no plain gradient ever moves it; the units are drawn by the member's seed.

    Args:
        network: A stack of networks; changed in place. Optimizers that carry momentum from
            before may move what was planted: start a fresh one, or use plain SGD.
        share: Share of the units of each layer, in [0, 1]; the number is rounded.
        layers: Hidden layers, counted from 1.

    Returns:
        For each of these layers the chosen units, truth values of shape (members, width).

    Raises:
        ValueError: If the share lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie between 0 and 1, not {share!r}")
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


@dataclass(frozen=True)
class OutlierTrial:
    """What one outlier did to trained networks; see :func:`outlier_trial`.

    Attributes:
        lost: Share of the units of each hidden layer that the step lost: derivative exactly 0 on
            all inputs after it, but not before, (M, layers). NaN for a member whose parameters
            are no longer finite.
        harm: Loss on the data right after the step, divided by that of the same network after an
            ordinary batch, (M,); infinite if it overflowed.
        lasting_harm: The same after the ordinary steps that follow.
        by_bias: Of the first layer's ReLUs that the step silenced, the share that would fire if
            only their biases were put back, (M,); NaN if it silenced none.
        by_weights: The same if only their weights were put back.
        overflowed: Members that are not finite in the end, (M,).
    """

    lost: Tensor
    harm: Tensor
    lasting_harm: Tensor
    by_bias: Tensor
    by_weights: Tensor
    overflowed: Tensor


def outlier_trial(
    network: RecipeStack,
    x: Tensor,
    y: Tensor,
    *,
    size: float,
    kind: str,
    loss: Callable[[Tensor, Tensor], Tensor] | str = half_squared_error,
    lr: float = 0.1,
    after: int = 0,
    batch_size: int = 8,
) -> OutlierTrial:
    """Put one outlier into one batch of a plain SGD step, and train on.

    A twin of each member sees the same batches without the outlier.

    Args:
        network: Trained networks; not changed.
        x: Inputs, shape (n, inputs).
        y: Targets, shape (n, outputs).
        size: Factor on the inputs of the batch's first example; or what is taken from its target.
        kind: ``"input"`` or ``"target"``.
        loss: As for :func:`relubook.training.train.train`.
        lr: The rate.
        after: Ordinary steps that follow.
        batch_size: Examples a step.

    Returns:
        What was lost.

    Raises:
        ValueError: If the kind is neither.
    """
    if kind not in ("input", "target"):
        raise ValueError(f"kind must be 'input' or 'target', not {kind!r}")
    index = torch.stack([batch_order(s + 10**6, len(x), batch_size, 1)[0] for s in network.seeds])
    bx, by = x[index], y[index]
    spoiled_x, spoiled_y = bx.clone(), by.clone()
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

    at_once = go(hit, spoiled_x, spoiled_y) / go(twin, bx, by)
    was, now = lost_units(network, x), lost_units(hit, x)
    share = torch.stack([(b & ~a).to(x.dtype).mean(1) for a, b in zip(was, now, strict=True)], 1)
    share[~hit.parameter_vectors().isfinite().all(1)] = math.nan
    old, new = _linear(network, 1), _linear(hit, 1)
    silenced = now[0] & ~was[0]
    back = []
    for weight, bias in ((new.weight, old.bias), (old.weight, new.bias)):
        would_fire = (x @ weight + bias[:, None]).amax(1) > 0
        # 0 / 0 is NaN: no unit, no share.
        back.append((would_fire & silenced).sum(1) / silenced.sum(1))
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
