"""Zeros in hidden layers: count them, force them with units of one's own, skip them in products."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook._optional import require
from relubook.evidence.data import Split
from relubook.evidence.statistics import Estimate
from relubook.evidence.timing import interleaved_seconds, ratio_interval
from relubook.training.recipe import Recipe
from relubook.training.run import TrainingRun
from relubook.training.stack import RecipeStack, Stack
from relubook.training.train import train
from relubook.training.tuning import tune_rate

SMALLEST = 1e-6
"""Units whose outputs, taken about their mean, have a smaller norm count as constant."""


@torch.no_grad()
def hidden_outputs(network: Stack, x: Tensor) -> Tensor:
    """Return the outputs of all hidden units, layer beside layer, (members, n, units)."""
    return torch.cat([post for _, post in network.hidden(x)], 2)


class UnitKinds(NamedTuple):
    """Shares of silent answers (one unit on one input) and of units, one number a network.

    Attributes:
        silent: Share of the answers that are not above 0.
        dead: Share of the units that are silent on every input.
        rare: Share of the units that fire, but on a smaller share of the inputs than the limit.
        always_on: Share of the units that fire on every input.
        least_on: Share of the units that fire on the input on which the fewest do.
        most_on: The same for the input on which the most do.
    """

    silent: Tensor
    dead: Tensor
    rare: Tensor
    always_on: Tensor
    least_on: Tensor
    most_on: Tensor


def unit_kinds(outputs: Tensor, *, rare: float = 0.01) -> UnitKinds:
    """Count silent answers, and dead, rare and always-on units.

    Outputs have the shape (..., n, units), the shares (...), float64. A non-finite output is
    refused with a ValueError: a network that overflowed has neither dead nor living units.
    """
    if not outputs.isfinite().all():
        raise ValueError(f"outputs has {int((~outputs.isfinite()).sum())} non-finite entries")
    fires = outputs > 0
    on = fires.double().mean(-1)
    firing, inputs = fires.sum(-2), outputs.shape[-2]
    few = (firing > 0) & (firing < rare * inputs)
    dead, seldom, always = (u.double().mean(-1) for u in (firing == 0, few, firing == inputs))
    return UnitKinds(1 - on.mean(-1), dead, seldom, always, on.amin(-1), on.amax(-1))


def _standardized(outputs: Tensor) -> Tensor:
    """Return outputs about their mean over the inputs, each unit's of length 1, constant ones 0."""
    h = outputs - outputs.mean(-2, keepdim=True)
    norm = h.norm(dim=-2, keepdim=True)
    return torch.where(norm <= SMALLEST, 0, h / norm)


def mean_correlation(outputs: Tensor) -> Tensor:
    """Return the mean absolute correlation over pairs of hidden units whose outputs vary.

    Outputs have the shape (..., n, units), the result (...); NaN with fewer than two such units.
    """
    h = _standardized(outputs)
    alive = (h != 0).any(-2).sum(-1)
    return ((h.mT @ h).abs().sum((-2, -1)) - alive) / (alive * (alive - 1))


def k_winners(k: int) -> Callable[[Tensor], Tensor]:
    """Return a ReLU of which only the k largest outputs of a layer stay; ties all win.

    The others are 0 and get no gradient. Makhzani and Frey 2013, "k-sparse autoencoders",
    https://arxiv.org/abs/1312.5663, there without the ReLU.
    """

    def unit(z: Tensor) -> Tensor:
        h = torch.relu(z)
        last = h.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return torch.where(h >= last, h, 0)

    return unit


def taught(network: RecipeStack, x: Tensor, y: Tensor) -> Tensor:
    """Say which units of the one hidden layer get a gradient from which labeled input.

    Bool (members, n, units): whether the loss there has a derivative other than 0 by the unit's
    pre-activation.
    """
    layers = [network.get_submodule(name) for name in ("linear1", "act1", "linear2")]
    z = layers[0](x).detach().requires_grad_()
    out = layers[2](layers[1](z)).flatten(0, 1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(out, y.repeat(len(z)), reduction="sum"), z)
    return gradient != 0


@torch.no_grad()
def accuracy(network: Stack, x: Tensor, y: Tensor) -> Tensor:
    """Return each network's share of right labels, float64, (members,)."""
    return (network(x).argmax(-1) == y).double().mean(1)


class Learned:
    """An ``each_step`` that notes when each network has learned a set.

    ``steps``, (members,), is the first step, among every fifth, at which the accuracy is at least
    the level; NaN where it never is.
    """

    def __init__(self, x: Tensor, y: Tensor, level: float, every: int = 5):
        self.x, self.y, self.level, self.every = x, y, level, every
        self.steps = torch.tensor(math.nan)

    def __call__(self, step: int, stack: Stack, optimizer: torch.optim.Optimizer) -> None:
        """Look at the accuracy."""
        if step % self.every == 0:
            new = self.steps.isnan() & (accuracy(stack, self.x, self.y) >= self.level)
            self.steps = torch.where(new, float(step), self.steps)


def train_at_best_rate(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    rates: Sequence[float],
    *,
    validation: tuple[Tensor, Tensor],
    tuning_seeds: int | Iterable[int],
    seeds: int | Iterable[int],
    each_step: Callable[..., Any] | None = None,
    **settings: Any,
) -> TrainingRun:
    """Train networks at the rate at which those of other seeds are best on validation data."""
    data = SimpleNamespace(train=Split(x, y), validation=Split(*validation))
    rate, _ = tune_rate(recipe, data, rates, seeds=tuning_seeds, **settings)
    settings = {"record": []} | settings
    return train(recipe.stack(seeds), x, y, lr=rate, each_step=each_step, **settings)


def sparse_mixtures(
    n: int, *, features: int, inputs: int, probability: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw inputs that are sums of few features out of many.

    A feature is a direction, uniform on the sphere; each is present in an input with the given
    probability and a strength from U[0, 1). Returns the inputs (n, inputs), scaled to standard
    deviation 1, and the strengths (n, features), 0 for absent features.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(features, inputs, generator=generator), dim=1)
    present = torch.rand(n, features, generator=generator) < probability
    strength = present * torch.rand(n, features, generator=generator)
    mixed = strength @ directions
    return mixed / mixed.std(), strength


def features_found(outputs: Tensor, strength: Tensor) -> Tensor:
    """Return how well hidden units single out the features of their inputs.

    It is the correlation, in absolute value, of a feature's strength (n, features) with the output
    (..., n, units) of the unit that follows it best, averaged over the features: shape (...).
    """
    return (_standardized(outputs).mT @ _standardized(strength)).abs().amax(-2).mean(-1)


def with_zeros(rows: int, size: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw numbers from U[0, 1), shape (rows, size), and set a share of them to 0."""
    values = torch.rand(rows, size, generator=generator)
    return values * (torch.rand(rows, size, generator=generator) >= share)


def skip_zeros(h: Tensor, weight: Tensor) -> Tensor:
    """Return ``h @ weight`` for one input (inputs,), from copies of the rows where h is not 0."""
    on = h.nonzero()[:, 0]
    return h[on] @ weight[on]


class KernelSpeeds(NamedTuple):
    """How many times as fast one product is as another.

    Attributes:
        ordinary: The ordinary product of a batch with zeros, against a batch without.
        batch: SciPy's sparse product of a batch, against the ordinary one.
        single: ``skip_zeros`` of a single input, against the ordinary product.
    """

    ordinary: Estimate
    batch: Estimate
    single: Estimate


def kernel_speeds(
    weight: Tensor, share: float, *, rows: int, repeats: int, generator: torch.Generator
) -> KernelSpeeds:
    """Time products of inputs with a share of zeros that skip them, against the ordinary one.

    Ratios of processor times, medians over rounds with 95% intervals; above 1 is faster. The
    weight is (inputs, outputs). Turning the batch into SciPy's sparse format is not counted.
    """
    size = len(weight)
    full = with_zeros(rows, size, 0, generator)
    batch = with_zeros(rows, size, share, generator)
    one = with_zeros(1, size, share, generator)[0]
    packed = require("scipy.sparse", "sparse products").csr_matrix(batch.numpy())
    dense = weight.numpy()
    work: dict[str, Callable[[], Any]] = {
        "no zeros": lambda: full @ weight,
        "batch": lambda: batch @ weight,
        "batch, skipping": lambda: packed @ dense,
        "single": lambda: one @ weight,
        "single, skipping": lambda: skip_zeros(one, weight),
    }
    seconds = interleaved_seconds(work, repeats=repeats)
    pairs = [("no zeros", "batch"), ("batch", "batch, skipping"), ("single", "single, skipping")]
    return KernelSpeeds(*(ratio_interval(seconds[a], seconds[b]) for a, b in pairs))


def break_even(speeds: Mapping[float, Estimate]) -> float:
    """Return the share of zeros from which on skipping them is faster; NaN if none is measured.

    Speeds against the ordinary product, by share, are joined by straight lines on axes of log
    speed and log of one minus the share; where they first pass 1 is returned.
    """
    for left, right in itertools.pairwise(sorted(speeds)):
        slow, fast = math.log(speeds[left].value), math.log(speeds[right].value)
        if slow <= 0 < fast:
            dense, sparse = math.log(1 - left), math.log(1 - right)
            return 1 - math.exp(dense - slow / (fast - slow) * (sparse - dense))
    return math.nan
