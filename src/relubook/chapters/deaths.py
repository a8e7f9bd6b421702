"""Follow units through their deaths: one outlier, every date, and units dead from the start.

The book's other trainer, ``train_many``, starts from seeds and measures now and then. Here a stack
of networks is trained on from wherever it stands, with any optimizer of torch and its memory, and
every step can be watched: so one can hit a trained network with one outlier, or go on with other
data after units have died.

>>> import torch
>>> from relubook.training.stack import Recipe
>>> x = torch.linspace(-1, 1, 64)[:, None]
>>> network = Recipe(1, 8, 1, depth=2).stack(30)
>>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
>>> history = train_on_(network, optimizer, x, x.abs(), steps=20, loss="mse")
>>> history.fires[0].shape
torch.Size([21, 30, 8])
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook.training.stack import Recipe, StackedLinear, StackedNetwork
from relubook.training.train import batch_order

__all__ = [
    "Autopsy",
    "Dates",
    "History",
    "OutlierTrial",
    "autopsy",
    "best_rate",
    "dates",
    "fires",
    "gets_gradient",
    "lost_units",
    "member_accuracy",
    "member_losses",
    "network_shares",
    "outlier_trial",
    "plant_dead_",
    "practice",
    "pre_activations",
    "rebuilt_variance",
    "revived_after",
    "sigmoid_recovery",
    "train_on_",
]


def pre_activations(network: StackedNetwork, x: Tensor) -> list[Tensor]:
    """Return what reaches the units of each hidden layer.

    Args:
        network: A stack of plain networks: no normalization, no residual connections.
        x: Inputs, shape (n, inputs), shared, or (members, n, inputs).

    Returns:
        For each hidden layer a tensor of shape (members, n, width), with its graph.

    Raises:
        ValueError: If the networks are not plain.
    """
    recipe = network.recipe
    if recipe.normalization != "none" or recipe.residual != "none" or recipe.dropout:
        raise ValueError(
            "deaths are followed in plain networks: no normalization, residual, dropout"
        )
    result, h = [], x
    for layer in range(1, recipe.hidden + 1):
        z = network.get_submodule(f"linear{layer}")(h)
        h = network.get_submodule(f"act{layer}")(z)
        result.append(z)
    return result


def _linear(network: StackedNetwork, layer: int) -> StackedLinear:
    linear = network.get_submodule(f"linear{layer}")
    assert isinstance(linear, StackedLinear)
    return linear


@torch.no_grad()
def fires(network: StackedNetwork, x: Tensor) -> list[Tensor]:
    """Say which units have a positive pre-activation on at least one input.

    Args:
        network: A stack of plain networks.
        x: Inputs, shape (n, inputs) or (members, n, inputs).

    Returns:
        For each hidden layer truth values of shape (members, width). A unit whose pre-activations
        are NaN counts as not firing: ask for diverged members apart.
    """
    return [z.amax(1) > 0 for z in pre_activations(network, x)]


def gets_gradient(
    network: StackedNetwork, x: Tensor, y: Tensor, loss: str = "cross_entropy"
) -> list[Tensor]:
    """Say to which units' incoming weights or biases a batch sends a gradient other than 0.

    Args:
        network: A stack of plain networks.
        x: The batch's inputs, shape (n, inputs).
        y: Its labels or targets.
        loss: See :func:`member_losses`.

    Returns:
        For each hidden layer truth values of shape (members, width).
    """
    layers = [_linear(network, layer) for layer in range(1, network.recipe.hidden + 1)]
    parameters = [p for linear in layers for p in (linear.weight, linear.bias)]
    gradients = torch.autograd.grad(member_losses(network(x), y, loss).sum(), parameters)
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
def rebuilt_variance(network: StackedNetwork, x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Ask how much of the inputs a linear map can rebuild from the first hidden layer's outputs.

    Args:
        network: A stack of plain networks.
        x: Inputs to fit the map on, by ridge regression, shape (n, inputs).
        new: Inputs to judge it on, shape (m, inputs).

    Returns:
        The share of the variance of the new inputs that is rebuilt, (members,), and the rank of
        the layer's outputs on the first 300 inputs of x, (members,).
    """
    act = network.get_submodule("act1")
    seen, judged = (act(pre_activations(network, v)[0]).double() for v in (x, new))
    rank = torch.linalg.matrix_rank(seen[:, :300].float()).to(seen.dtype)
    seen, judged = (torch.cat([h, torch.ones_like(h[..., :1])], 2) for h in (seen, judged))
    ridge = seen.mT @ seen + 1e-3 * len(x) * torch.eye(seen.shape[2], dtype=seen.dtype)
    error = judged @ torch.linalg.solve(ridge, seen.mT @ x.double()) - new
    total = (new - x.mean(0)).double().square().sum()
    return 1 - error.square().sum((1, 2)) / total, rank


@torch.no_grad()
def lost_units(network: StackedNetwork, x: Tensor) -> list[Tensor]:
    """Say which units have an activation function with derivative exactly 0 on every input.

    For ReLU these are the dead units; for sigmoid and tanh those that are saturated so far, to
    either side, that the derivative rounds to 0. It is the same test for all: no gradient from
    these inputs reaches the unit's weights. A unit with NaN pre-activations does not count as lost.

    Args:
        network: A stack of plain networks.
        x: Inputs, shape (n, inputs) or (members, n, inputs).

    Returns:
        For each hidden layer truth values of shape (members, width).
    """
    result = []
    for layer, z in enumerate(pre_activations(network, x), 1):
        act = network.get_submodule(f"act{layer}")
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(act(z).sum(), z)
        result.append((slope == 0).all(1))
    return result


def member_losses(output: Tensor, y: Tensor, loss: str) -> Tensor:
    """Return each member's mean loss.

    Args:
        output: Shape (members, batch, outputs).
        y: Labels of shape (batch,) or (members, batch) for cross-entropy; else targets of shape
            (batch, outputs) or (members, batch, outputs).
        loss: ``"cross_entropy"``, ``"mse"`` (halved, so that its derivative is the error),
            ``"mae"`` or ``"huber"`` (with its corner at 1).

    Returns:
        Shape (members,).

    Raises:
        ValueError: If the loss is unknown.
    """
    members, batch, outputs = output.shape
    if loss == "cross_entropy":
        flat = F.cross_entropy(
            output.reshape(-1, outputs), y.expand(members, batch).reshape(-1), reduction="none"
        )
        return flat.view(members, batch).mean(1)
    error = output - y
    if loss == "mse":
        each = error.square() / 2
    elif loss == "mae":
        each = error.abs()
    elif loss == "huber":
        each = F.huber_loss(error, torch.zeros_like(error), reduction="none")
    else:
        raise ValueError(f"unknown loss {loss!r}; known: cross_entropy, mse, mae, huber")
    return each.flatten(1).mean(1)


@dataclass(frozen=True)
class History:
    """What :func:`train_on_` saw.

    Attributes:
        steps: Steps at which was looked, R of them, 0 being the start.
        fires: For each hidden layer which units fire on the watched inputs, (R, M, width).
        loss: Mean loss on that step's batch, before the step, (R, M); NaN at step 0.
    """

    steps: tuple[int, ...]
    fires: list[Tensor]
    loss: Tensor


def train_on_(
    network: StackedNetwork,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    loss: str = "cross_entropy",
    batch_size: int | None = None,
    shift: int = 0,
    every: int = 1,
    watch: Tensor | None = None,
) -> History:
    """Train a stack on from where it stands, and look which units fire.

    The members' losses are added up, so that each is trained as it would be alone.

    Args:
        network: A stack of plain networks; changed in place.
        optimizer: Any optimizer of torch over its parameters; its memory is used and kept.
        x: Inputs, shape (n, inputs), shared, or (members, n, inputs).
        y: Labels (n,), or targets (n, outputs); with a dimension for members in front if x has.
        steps: Number of steps.
        loss: See :func:`member_losses`.
        batch_size: Examples a step; all by default. The batches are those of
            ``batch_order(seed + shift, ...)``.
        shift: Added to the members' seeds for the order of the batches: choose another in a
            second stretch of training.
        every: Look after every so many steps; 0 for the first and last only.
        watch: Inputs that decide whether a unit fires; the training inputs by default.

    Returns:
        When which unit fired.
    """
    watch = x if watch is None else watch
    order: Tensor | None = None
    own = x.dim() == 3
    if batch_size is not None:
        n = x.shape[-2]
        order = torch.stack([batch_order(s + shift, n, batch_size, steps) for s in network.seeds])
    rows = torch.arange(len(network))[:, None]
    kept: list[list[Tensor]] = []
    losses: list[Tensor] = []
    marks: list[int] = []

    def look(step: int, loss_now: Tensor) -> None:
        kept.append(fires(network, watch))
        losses.append(loss_now)
        marks.append(step)

    look(0, torch.full((len(network),), math.nan))
    for step in range(steps):
        if order is None:
            bx, by = x, y
        else:
            index = order[:, step]
            bx, by = (x[rows, index], y[rows, index]) if own else (x[index], y[index])
        optimizer.zero_grad()
        each = member_losses(network(bx), by, loss)
        each.sum().backward()
        optimizer.step()
        if step + 1 == steps or (every and (step + 1) % every == 0):
            look(step + 1, each.detach())
    layers = [torch.stack(layer) for layer in zip(*kept, strict=True)]
    return History(tuple(marks), layers, torch.stack(losses))


def practice(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Sequence[int],
    loss: str = "mse",
    lr: float = 0.1,
    steps: int = 300,
    batch_size: int = 8,
) -> StackedNetwork:
    """Build networks and train them by plain SGD.

    Args:
        recipe: A plain network.
        x: Inputs, shape (n, inputs).
        y: Labels or targets.
        seeds: The members' seeds.
        loss: See :func:`member_losses`.
        lr: The rate.
        steps: Number of steps.
        batch_size: Examples a step.

    Returns:
        The trained stack.
    """
    network: StackedNetwork = recipe.stack(seeds, dtype=x.dtype)
    sgd = torch.optim.SGD(network.parameters(), lr=lr)
    settings: dict[str, Any] = {"loss": loss, "batch_size": batch_size, "watch": x[:1]}
    train_on_(network, sgd, x, y, steps=steps, every=0, **settings)
    return network


def best_rate(
    recipe: Recipe,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    loss: str = "mse",
    steps: int = 300,
    batch_size: int = 8,
) -> float:
    """Choose the rate of plain SGD with the least mean loss on data held out.

    Args:
        recipe: A plain network.
        train: Inputs and targets to train on.
        held_out: Inputs and targets to judge on.
        rates: The grid, rising.
        seeds: Seeds of the tuning, other than those of the comparison.
        loss: See :func:`member_losses`.
        steps: Number of steps.
        batch_size: Examples a step.

    Returns:
        The rate. A rate at which a member overflows is out.

    Raises:
        ValueError: If the best lies at the edge of the grid: extend it.
    """
    costs = []
    for lr in rates:
        network = practice(
            recipe, *train, seeds=seeds, loss=loss, lr=lr, steps=steps, batch_size=batch_size
        )
        with torch.no_grad():
            cost = member_losses(network(held_out[0]), held_out[1], loss).mean().item()
        costs.append(cost if math.isfinite(cost) else math.inf)
    best = min(range(len(rates)), key=costs.__getitem__)
    if best in (0, len(rates) - 1):
        raise ValueError(f"the best rate {rates[best]:g} lies at the edge of the grid; extend it")
    return rates[best]


@torch.no_grad()
def member_accuracy(network: StackedNetwork, x: Tensor, y: Tensor) -> Tensor:
    """Return the share of inputs that each member classifies rightly, float64, (members,)."""
    return (network(x).argmax(2) == y).double().mean(1)


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
        born_dead: Units that did not fire at the first look, (M, width).
        death: Step of the first look at which a unit that had fired did not, (M, width); -1 for
            none.
        revival: Step of the first look after that at which it fired again; -1 for none.
        dead_at_end: Units that did not fire at the last look.
    """

    born_dead: Tensor
    death: Tensor
    revival: Tensor
    dead_at_end: Tensor


def dates(history: History, layer: int) -> Dates:
    """Find each unit's first death and first revival.

    Args:
        history: What :func:`train_on_` saw.
        layer: Hidden layer, counted from 1.

    Returns:
        The dates. A unit born dead that fires later and then dies counts with that death.
    """
    on = history.fires[layer - 1]
    when = torch.tensor(history.steps)
    had_fired = on.int().cummax(0).values.bool()
    down = had_fired & ~on
    fell = down.int().cummax(0).values.bool()
    back = fell & on
    return Dates(~on[0], _first(down, when), _first(back, when), ~on[-1])


def revived_after(history: History, layer: int, step: int) -> tuple[Tensor, Tensor]:
    """Take a census of the dead at one step, and find when each fires again.

    Args:
        history: What :func:`train_on_` saw.
        layer: Hidden layer, counted from 1.
        step: Step of the census, one of those looked at.

    Returns:
        Which units are dead at that step although they had fired before, (M, width); and the
        number of steps until each fires again, (M, width), -1 for those that do not, and for
        units not in the census.

    Raises:
        ValueError: If nobody looked at that step.
    """
    if step not in history.steps:
        raise ValueError(f"nobody looked at step {step}; known: 0 to {history.steps[-1]}")
    at = history.steps.index(step)
    on = history.fires[layer - 1]
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
        with_first_bias: Units that would fire with the bias they had at the start.
        with_first_weights: Units that would fire with the incoming weights they had at the start
            and the bias they have now.
        bias_share: How much of the mean pre-activation is the bias: ``|b| / (|b| + |mean w x|)``,
            a number for each unit.
    """

    died: Tensor
    negative_bias: Tensor
    without_bias: Tensor
    with_first_bias: Tensor
    with_first_weights: Tensor
    bias_share: Tensor


@torch.no_grad()
def autopsy(network: StackedNetwork, start: StackedNetwork, x: Tensor, layer: int) -> Autopsy:
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
    h = x.expand(len(network), *x.shape)
    if layer > 1:
        act = network.get_submodule(f"act{layer - 1}")
        h = act(pre_activations(network, x)[layer - 2])
    now, then = _linear(network, layer), _linear(start, layer)
    drive = h @ now.weight
    top, middle, bias = drive.amax(1), drive.mean(1).abs(), now.bias
    return Autopsy(
        died=fires(start, x)[layer - 1] & (top + bias <= 0),
        negative_bias=bias < 0,
        without_bias=top > 0,
        with_first_bias=top + then.bias > 0,
        with_first_weights=(h @ then.weight).amax(1) + bias > 0,
        bias_share=bias.abs() / (bias.abs() + middle),
    )


@torch.no_grad()
def plant_dead_(network: StackedNetwork, share: float, *, layers: Sequence[int]) -> list[Tensor]:
    """Kill the same share of units in each network, for good.

    A chosen unit gets incoming weights 0 and bias -1. Its pre-activation is then -1 on every
    input, so that no plain gradient ever moves it; the units are drawn by the member's seed.

    Args:
        network: A stack of plain networks; changed in place. Optimizers that carry momentum from
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
    network: StackedNetwork,
    x: Tensor,
    y: Tensor,
    *,
    size: float,
    kind: str,
    loss: str = "mse",
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
        loss: See :func:`member_losses`.
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
    common: dict[str, Any] = {"loss": loss, "every": 0, "watch": x[:1]}

    def go(stack: StackedNetwork, x: Tensor, y: Tensor, steps: int, size: int | None) -> Tensor:
        sgd = torch.optim.SGD(stack.parameters(), lr=lr)
        train_on_(stack, sgd, x, y, steps=steps, batch_size=size, shift=2 * 10**6, **common)
        with torch.no_grad():
            return member_losses(stack(data[0]), data[1], loss)

    data = (x, y)
    at_once = go(hit, spoiled_x, spoiled_y, 1, None) / go(twin, bx, by, 1, None)
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
        lasting = go(hit, x, y, after, batch_size) / go(twin, x, y, after, batch_size)
    overflowed = ~hit.parameter_vectors().isfinite().all(1) | ~lasting.isfinite()
    return OutlierTrial(
        lost=share,
        harm=at_once.nan_to_num(math.inf, math.inf),
        lasting_harm=torch.where(overflowed, math.inf, lasting),
        by_bias=back[0],
        by_weights=back[1],
        overflowed=overflowed,
    )
