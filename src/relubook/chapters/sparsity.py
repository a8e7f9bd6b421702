"""Zeros in hidden layers: count them, force them with units of one's own, skip them in products.

>>> import torch
>>> from relubook.training.stack import Recipe
>>> x = torch.linspace(-1, 1, 60)[:, None]
>>> networks = train_units(
...     k_winners(2), Recipe(1, (8,), 1), x, x.abs(), seeds=3, lr=0.01, steps=20, batch_size=20
... )
>>> bool(((networks.hidden(x) > 0).sum(2) <= 2).all())
True
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook._optional import require
from relubook.evidence.statistics import Estimate
from relubook.evidence.timing import interleaved_seconds, ratio_interval
from relubook.training.stack import Recipe, StackedNetwork, _seeds
from relubook.training.train import batch_order

__all__ = [
    "KernelSpeeds",
    "UnitKinds",
    "UnitNetworks",
    "break_even",
    "features_found",
    "hidden_outputs",
    "k_winners",
    "kernel_speeds",
    "mean_correlation",
    "skip_zeros",
    "sparse_mixtures",
    "train_units",
    "tune_units",
    "unit_kinds",
    "with_zeros",
]

Unit = Callable[[Tensor], Tensor]
"""A hidden layer's function: pre-activations (members, n, units) to outputs of that shape."""

SMALLEST = 1e-6
"""Units whose outputs, taken about their mean, have a smaller norm count as constant."""


@torch.no_grad()
def hidden_outputs(network: StackedNetwork, x: Tensor) -> Tensor:
    """Return the outputs of all hidden units, layer beside layer.

    Args:
        network: A stack of plain networks: no normalization, residual connections or dropout.
        x: Inputs, shape (n, inputs), shared, or (members, n, inputs).

    Returns:
        Shape (members, n, units), units counting those of all hidden layers.

    Raises:
        ValueError: If the networks are not plain.
    """
    _check_plain(network.recipe)
    outputs, h = [], x
    for layer in range(1, network.recipe.hidden + 1):
        h = network.get_submodule(f"act{layer}")(network.get_submodule(f"linear{layer}")(h))
        outputs.append(h)
    return torch.cat(outputs, 2)


def _check_plain(recipe: Recipe) -> None:
    for name, plain in (("normalization", "none"), ("residual", "none"), ("dropout", 0)):
        if getattr(recipe, name) != plain:
            raise ValueError(
                f"plain networks are needed, these have {name} {getattr(recipe, name)!r}"
            )


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


@dataclass(frozen=True, eq=False)
class UnitNetworks:
    """Networks with one hidden layer of units of one's own.

    Attributes:
        network: Their weights, a stack; its own activation function is not used.
        unit: What the hidden layer computes.
        lr: The rate they were trained at; None if they were not.
        learned: Step by which each had learned its training set, shape (members,), see
            :func:`train_units`; None if nobody looked.
    """

    network: StackedNetwork
    unit: Unit
    lr: float | None = None
    learned: Tensor | None = None

    def __post_init__(self) -> None:
        recipe = self.network.recipe
        _check_plain(recipe)
        if recipe.hidden != 1:
            raise ValueError(f"one hidden layer is needed, the recipe has {recipe.hidden}")
        width = recipe.hidden_widths[0]
        shape = tuple(self.unit(torch.zeros(1, 1, width)).shape)
        if shape != (1, 1, width):
            raise ValueError(f"unit must keep the shape (1, 1, {width}), it returns {shape}")

    def __call__(self, x: Tensor) -> Tensor:
        """Return the networks' outputs, shape (members, n, outputs), with their graph."""
        return self._after(self._before(x))

    def _before(self, x: Tensor) -> Tensor:
        z: Tensor = self.network.get_submodule("linear1")(x)
        return z

    def _after(self, z: Tensor) -> Tensor:
        out: Tensor = self.network.get_submodule("linear2")(self.unit(z))
        return out

    @torch.no_grad()
    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden units' outputs, shape (members, n, units), without a graph."""
        return self.unit(self._before(x))

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Return each network's share of right labels, float64, shape (members,).

        Args:
            x: Inputs, shape (n, inputs).
            y: Labels, shape (n,).
        """
        return (self(x).argmax(-1) == y).double().mean(1)

    @torch.no_grad()
    def squared_error(self, x: Tensor, y: Tensor) -> Tensor:
        """Return each network's mean squared error, shape (members,).

        Args:
            x: Inputs, shape (n, inputs).
            y: Targets, shape (n, outputs).
        """
        return ((self(x) - y) ** 2).mean((1, 2))

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the accuracy for labels, the negative squared error for targets; (members,)."""
        return -self.squared_error(x, y) if y.is_floating_point() else self.accuracy(x, y)

    def taught(self, x: Tensor, y: Tensor) -> Tensor:
        """Say which units get a gradient from which input.

        Args:
            x: Inputs, shape (n, inputs).
            y: Labels, shape (n,), or targets, shape (n, outputs).

        Returns:
            Whether the loss on an input has a derivative other than 0 by the unit's
            pre-activation there, bool, shape (members, n, units).
        """
        z = self._before(x).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_loss(self._after(z), y.expand(len(z), *y.shape)), z)
        return gradient != 0


def _loss(out: Tensor, y: Tensor) -> Tensor:
    """Return the sum over members of their mean losses."""
    if y.is_floating_point():
        return ((out - y) ** 2).mean((1, 2)).sum()
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]


def train_units(
    unit: Unit,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    *,
    seeds: int | Iterable[int],
    lr: float,
    steps: int,
    batch_size: int,
    learned_at: float | None = None,
    look_every: int = 5,
) -> UnitNetworks:
    """Train networks by Adam whose hidden layer computes any function.

    With a unit that the recipe knows, these are the networks that
    :func:`relubook.training.train.train_many` trains: same starts, same batches.

    Args:
        unit: What the hidden layer computes of its pre-activations (members, n, units), such as
            ``torch.relu`` or :func:`k_winners`; of the same shape, differentiable by autograd.
        recipe: Plain networks with one hidden layer. Its activation function decides about the
            initial weights only.
        x: Inputs, shape (n, inputs).
        y: Labels, integers of shape (n,), for cross-entropy; or targets, shape (n, outputs), for
            the mean squared error.
        seeds: One a network; a number m stands for ``range(m)``.
        lr: Learning rate, above 0.
        steps: Number of steps, at least 1.
        batch_size: Examples a step, at most n.
        learned_at: Accuracy at which the training set counts as learned; nobody looks by default.
        look_every: Steps between two looks at the accuracy.

    Returns:
        The trained networks. ``learned`` holds the first step at which a look found at least that
        accuracy, ``steps`` where none did.

    Raises:
        ValueError: If an argument does not fit; names it. Nothing has been computed then.
    """
    seeds = _seeds(seeds)
    _check_training(recipe, x, y, lr, steps, batch_size, learned_at, look_every)
    stack = recipe.stack(seeds, dtype=x.dtype)
    networks = UnitNetworks(stack, unit)
    optimizer = torch.optim.Adam(stack.parameters(), lr=lr)
    order = torch.stack([batch_order(seed, len(x), batch_size, steps) for seed in seeds], 1)
    learned = torch.full((len(seeds),), float(steps))
    for step, rows in enumerate(order, 1):
        optimizer.zero_grad()
        _loss(networks(x[rows]), y[rows]).backward()
        optimizer.step()
        if learned_at is not None and step % look_every == 0:
            learned[(learned == steps) & (networks.accuracy(x, y) >= learned_at)] = step
    return UnitNetworks(stack, unit, lr, None if learned_at is None else learned)


def _check_training(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    lr: float,
    steps: int,
    batch_size: int,
    learned_at: float | None,
    look_every: int,
) -> None:
    if x.dim() != 2 or x.shape[1] != recipe.inputs:
        raise ValueError(f"x must have the shape (n, {recipe.inputs}), not {tuple(x.shape)}")
    targets = y.is_floating_point()
    wanted = (len(x), recipe.outputs) if targets else (len(x),)
    if tuple(y.shape) != wanted:
        raise ValueError(f"y must have the shape {wanted}, not {tuple(y.shape)}")
    for name, data in (("x", x), ("y", y)):
        if not data.isfinite().all():
            raise ValueError(f"{name} has {int((~data.isfinite()).sum())} non-finite entries")
    if not targets and not 0 <= int(y.min()) <= int(y.max()) < recipe.outputs:
        raise ValueError(f"labels of y must be in 0..{recipe.outputs - 1}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be a finite number above 0, not {lr!r}")
    for name, count in (("steps", steps), ("look_every", look_every)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size must be in 1..{len(x)}, not {batch_size}")
    if learned_at is not None and (targets or not 0 < learned_at <= 1):
        raise ValueError(f"learned_at must be an accuracy in (0, 1] of labels, not {learned_at!r}")


def tune_units(
    unit: Unit,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    rates: Sequence[float],
    *,
    validation: tuple[Tensor, Tensor],
    tuning_seeds: int | Iterable[int],
    seeds: int | Iterable[int],
    learned_at: float | None = None,
    **settings: Any,
) -> UnitNetworks:
    """Train networks at the rate that is best on validation data.

    Args:
        unit: See :func:`train_units`.
        recipe: Likewise.
        x: Likewise.
        y: Likewise.
        rates: Learning rates, three or more, in ascending order.
        validation: Inputs and labels or targets to choose on: by mean accuracy, or mean squared
            error. A rate at which a network's error is NaN is not chosen.
        tuning_seeds: Seeds of the networks that choose; a number m stands for ``range(m)``.
        seeds: Seeds of the networks that are returned, others than those.
        learned_at: See :func:`train_units`.
        settings: Passed on to :func:`train_units`: steps and batch size.

    Returns:
        The networks of ``seeds``, trained at the best rate, which is their ``lr``.

    Raises:
        ValueError: If there are fewer than three rates, seeds are used twice, or the best rate
            stands at an edge of the grid, which then has to be extended.
    """
    if len(rates) < 3 or list(rates) != sorted(rates):
        raise ValueError(f"rates must be three or more in ascending order, not {list(rates)}")
    tuning_seeds, seeds = _seeds(tuning_seeds), _seeds(seeds)
    if twice := sorted(set(tuning_seeds) & set(seeds)):
        raise ValueError(f"seeds and tuning_seeds share {twice}: the choice would favor them")
    scores = []
    for lr in rates:
        tried = train_units(unit, recipe, x, y, seeds=tuning_seeds, lr=lr, **settings)
        score = tried.score(*validation).mean().item()
        scores.append(-math.inf if math.isnan(score) else score)
    best = max(range(len(rates)), key=scores.__getitem__)
    if best in (0, len(rates) - 1):
        raise ValueError(
            f"the best rate, {rates[best]}, stands at the edge of the grid {list(rates)}: extend it"
        )
    return train_units(
        unit, recipe, x, y, seeds=seeds, lr=rates[best], learned_at=learned_at, **settings
    )


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
