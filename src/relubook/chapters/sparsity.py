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

__all__ = [
    "KernelSpeeds",
    "Learned",
    "UnitKinds",
    "accuracy",
    "break_even",
    "features_found",
    "hidden_outputs",
    "k_winners",
    "kernel_speeds",
    "mean_correlation",
    "skip_zeros",
    "sparse_mixtures",
    "taught",
    "train_at_best_rate",
    "unit_kinds",
    "with_zeros",
]

Unit = Callable[[Tensor], Tensor]
"""A hidden layer's function: pre-activations (members, n, units) to outputs of that shape."""

SMALLEST = 1e-6
"""Units whose outputs, taken about their mean, have a smaller norm count as constant."""


@torch.no_grad()
def hidden_outputs(network: Stack, x: Tensor) -> Tensor:
    """Return the outputs of all hidden units, layer beside layer.

    Args:
        network: A stack.
        x: Inputs, shape (n, inputs), shared, or (members, n, inputs).

    Returns:
        Shape (members, n, units), units counting those of all hidden layers.
    """
    return torch.cat([post for _, post in network.hidden(x)], 2)


class UnitKinds(NamedTuple):
    """Shares of answers and of units of each kind, one number a network, float64.

    An answer is the output of one unit on one input. All have the shape (...) of the networks.

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

    Args:
        outputs: Outputs of hidden units, shape (..., n, units). A unit fires where its output is
            above 0.
        rare: Share of the inputs below which a unit that fires at all is rare, in [0, 1].

    Returns:
        The shares, each of shape (...).

    Raises:
        ValueError: If there are no inputs or units, ``rare`` is no share, or an output is not
            finite: a network that overflowed has neither dead nor living units.

    Example:
        >>> kinds = unit_kinds(torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 3.0]]))
        >>> [round(share.item(), 2) for share in kinds]
        [0.5, 0.33, 0.0, 0.33, 0.33, 0.67]
    """
    _check_outputs(outputs)
    if not 0 <= rare <= 1:
        raise ValueError(f"rare must be between 0 and 1, not {rare!r}")
    fires = outputs > 0
    on = fires.double().mean(-1)
    firing, inputs = fires.sum(-2), outputs.shape[-2]
    few = (firing > 0) & (firing < rare * inputs)
    shares = (
        1 - on.mean(-1),
        (firing == 0).double().mean(-1),
        few.double().mean(-1),
        (firing == inputs).double().mean(-1),
        on.amin(-1),
        on.amax(-1),
    )
    return UnitKinds(*shares)


def _check_outputs(outputs: Tensor) -> None:
    if outputs.dim() < 2 or 0 in outputs.shape:
        raise ValueError(f"outputs must have the shape (..., n, units), not {tuple(outputs.shape)}")
    if not outputs.isfinite().all():
        raise ValueError(f"outputs has {int((~outputs.isfinite()).sum())} non-finite entries")


def mean_correlation(outputs: Tensor) -> Tensor:
    """Return how strongly units are correlated with each other: the mean absolute correlation.

    Args:
        outputs: Outputs of hidden units, shape (..., n, units).

    Returns:
        The mean over the pairs of different units whose outputs vary, shape (...), between 0 and
        1; NaN with fewer than two such units.

    Raises:
        ValueError: If there are no inputs or units, or an output is not finite.
    """
    _check_outputs(outputs)
    h = outputs - outputs.mean(-2, keepdim=True)
    norm = h.norm(dim=-2, keepdim=True)
    h, alive = h / norm.clamp(min=SMALLEST), (norm > SMALLEST).sum((-2, -1))
    return ((h.mT @ h).abs().sum((-2, -1)) - alive) / (alive * (alive - 1))


def k_winners(k: int) -> Unit:
    """Return a unit function that keeps the k largest outputs of the layer: ReLU, then a contest.

    Args:
        k: How many units of the layer may fire on an input, at least 1.

    Returns:
        A function of pre-activations (..., units), units >= k: those whose ReLU is among the k
        largest keep it, the others output 0 and get no gradient. Ties for the last place all win.

    Raises:
        ValueError: If k is below 1; the function raises it where the layer has fewer units.

    Source:
        Makhzani and Frey 2013, "k-sparse autoencoders", https://arxiv.org/abs/1312.5663, there
        without the ReLU.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")

    def unit(z: Tensor) -> Tensor:
        if z.shape[-1] < k:
            raise ValueError(f"{k} winners need at least {k} units, the layer has {z.shape[-1]}")
        h = torch.relu(z)
        last = h.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return torch.where(h >= last, h, 0)

    return unit


def taught(network: RecipeStack, x: Tensor, y: Tensor) -> Tensor:
    """Say which units of the one hidden layer get a gradient from which input.

    Args:
        network: Networks with one hidden layer.
        x: Inputs, shape (n, inputs).
        y: Labels, shape (n,).

    Returns:
        Whether the loss on an input has a derivative other than 0 by the unit's pre-activation
        there, bool, shape (members, n, units).
    """
    layers = [network.get_submodule(name) for name in ("linear1", "act1", "linear2")]
    z = layers[0](x).detach().requires_grad_()
    out = layers[2](layers[1](z)).flatten(0, 1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(out, y.repeat(len(z)), reduction="sum"), z)
    return gradient != 0


@torch.no_grad()
def accuracy(network: Stack, x: Tensor, y: Tensor) -> Tensor:
    """Return each network's share of right labels, float64, shape (members,)."""
    return (network(x).argmax(-1) == y).double().mean(1)


class Learned:
    """Steps after which each network of a stack has learned a set; ``each_step`` of a run.

    Args:
        x: Inputs, shape (n, inputs).
        y: Labels, shape (n,).
        level: Accuracy that counts as learned.
        every: Steps between two looks.

    Attributes:
        steps: The first look's step that found at least that accuracy, NaN where none did,
            (members,).
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
    """Train networks at the rate that is best on validation data.

    Args:
        recipe: The networks.
        x: Inputs, shape (n, inputs).
        y: Labels or targets.
        rates: Learning rates, three or more, in ascending order.
        validation: Inputs and labels or targets to choose on.
        tuning_seeds: Seeds of the networks that choose.
        seeds: Seeds of the networks that are returned, others than those.
        each_step: For the networks that are returned; see :func:`relubook.training.train.train`.
        settings: Passed on to :func:`relubook.training.train.train`.

    Returns:
        The run of ``seeds`` at the best rate.

    Raises:
        ValueError: As :func:`relubook.training.tuning.tune_rate` does.
    """
    data = SimpleNamespace(train=Split(x, y), validation=Split(*validation))
    rate, _ = tune_rate(recipe, data, rates, seeds=tuning_seeds, **settings)
    settings = {"record": []} | settings
    return train(recipe.stack(seeds), x, y, lr=rate, each_step=each_step, **settings)


def sparse_mixtures(
    n: int, *, features: int, inputs: int, probability: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw inputs that are sums of few features out of many.

    Each feature is a direction of length 1, uniform on the sphere. In an input it is present with
    the given probability, with a strength from U[0, 1), independently of the others.

    Args:
        n: Number of inputs.
        features: Number of features.
        inputs: Dimension of the inputs; it may be smaller than ``features``.
        probability: Of a feature to be present, in (0, 1].
        seed: Of the draw.

    Returns:
        The inputs, shape (n, inputs), all divided by one number so that their entries have
        standard deviation 1; and the strengths of the features, shape (n, features), 0 for those
        absent.

    Raises:
        ValueError: If a number is below 1 (n: below 2), or the probability is none.
    """
    for name, count, least in (("n", n, 2), ("features", features, 1), ("inputs", inputs, 1)):
        if count < least:
            raise ValueError(f"{name} must be at least {least}, not {count}")
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be in (0, 1], not {probability!r}")
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(features, inputs, generator=generator), dim=1)
    present = torch.rand(n, features, generator=generator) < probability
    strength = present * torch.rand(n, features, generator=generator)
    mixed = strength @ directions
    return mixed / mixed.std(), strength


def features_found(outputs: Tensor, strength: Tensor) -> Tensor:
    """Return how well hidden units single out the features of their inputs.

    For each feature the unit is taken whose output is most strongly correlated, in absolute value,
    with the feature's strength.

    Args:
        outputs: Outputs of hidden units, shape (..., n, units).
        strength: Strengths of the features in the same inputs, shape (n, features).

    Returns:
        The mean over the features of that correlation, shape (...), between 0 and 1. A unit that
        is constant has correlation 0.

    Raises:
        ValueError: If the shapes do not fit, an output is not finite, or a feature does not vary.
    """
    _check_outputs(outputs)
    if strength.dim() != 2 or len(strength) != outputs.shape[-2]:
        raise ValueError(
            f"strength must have the shape ({outputs.shape[-2]}, features), "
            f"not {tuple(strength.shape)}"
        )
    h, s = outputs - outputs.mean(-2, keepdim=True), strength - strength.mean(0)
    if not (size := s.norm(dim=0)).all():
        raise ValueError(
            f"feature {int((size == 0).nonzero()[0])} has the same strength everywhere"
        )
    h = h / h.norm(dim=-2, keepdim=True).clamp(min=SMALLEST)
    return (h.mT @ (s / size)).abs().amax(-2).mean(-1)


def with_zeros(rows: int, size: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw numbers from U[0, 1) and set each to 0 with a given probability.

    Args:
        rows: Number of rows.
        size: Numbers a row.
        share: Probability of a 0, in [0, 1].
        generator: Source of the draws.

    Returns:
        Shape (rows, size).

    Raises:
        ValueError: If the share lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, not {share!r}")
    values = torch.rand(rows, size, generator=generator)
    return values * (torch.rand(rows, size, generator=generator) >= share)


def skip_zeros(h: Tensor, weight: Tensor) -> Tensor:
    """Return ``h @ weight``, using only the rows of the weight whose number in h is not 0.

    Args:
        h: One input, shape (inputs,).
        weight: Shape (inputs, outputs).

    Returns:
        Shape (outputs,). The rows are copied first.
    """
    on = h.nonzero()[:, 0]
    return h[on] @ weight[on]


class KernelSpeeds(NamedTuple):
    """How many times as fast one product is as another; see :func:`kernel_speeds`.

    Attributes:
        ordinary: The ordinary product of a batch with zeros, against a batch without.
        batch: SciPy's sparse product of a batch, against the ordinary one.
        single: :func:`skip_zeros` of a single input, against the ordinary product.
    """

    ordinary: Estimate
    batch: Estimate
    single: Estimate


def kernel_speeds(
    weight: Tensor, share: float, *, rows: int, repeats: int, generator: torch.Generator
) -> KernelSpeeds:
    """Time products that skip zeros against the ordinary one, which does not.

    Turning the batch into SciPy's sparse format is not counted.

    Args:
        weight: Shape (inputs, outputs).
        share: Share of zeros in the inputs, in [0, 1).
        rows: Inputs of the batch.
        repeats: Rounds, 2 or more; in each, every product runs once, in turn.
        generator: Source of the inputs.

    Returns:
        Ratios of processor times, medians over the rounds with 95% intervals; above 1 is faster.

    Raises:
        ValueError: If the share lies outside [0, 1), or there are fewer than two rounds.
        ImportError: If SciPy is not installed.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), not {share!r}")
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, not {repeats}")
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
    return KernelSpeeds(
        ordinary=ratio_interval(seconds["no zeros"], seconds["batch"]),
        batch=ratio_interval(seconds["batch"], seconds["batch, skipping"]),
        single=ratio_interval(seconds["single"], seconds["single, skipping"]),
    )


def break_even(speeds: Mapping[float, Estimate]) -> float:
    """Return the share of zeros from which on skipping them is faster.

    Args:
        speeds: Speed against the ordinary product by share of zeros, shares in [0, 1).

    Returns:
        Where the speed passes 1 for the first time, by straight lines between the measurements on
        axes of log speed and log of one minus the share; NaN if it stays on one side.

    Raises:
        ValueError: If there are fewer than two shares, or one lies outside [0, 1).

    Example:
        >>> half, twice = (Estimate(v, v, v, 30, 0.95) for v in (0.5, 2.0))
        >>> round(break_even({0.0: half, 0.75: twice}), 3)
        0.5
    """
    shares = sorted(speeds)
    if len(shares) < 2 or not 0 <= shares[0] <= shares[-1] < 1:
        raise ValueError(f"speeds needs two shares or more, all in [0, 1), not {shares}")
    for left, right in itertools.pairwise(shares):
        slow, fast = math.log(speeds[left].value), math.log(speeds[right].value)
        if slow <= 0 < fast:
            dense, sparse = math.log(1 - left), math.log(1 - right)
            return 1 - math.exp(dense - slow / (fast - slow) * (sparse - dense))
    return math.nan
