"""Train many networks at once: every member with its own seed, rate, batches and fate.

>>> import torch
>>> from relubook.training.stack import Recipe
>>> from relubook.training.train import train_many
>>> x = torch.linspace(-1, 1, 64)[:, None]
>>> run = train_many(Recipe(1, 2, 1, depth=10), x, x.abs(), seeds=50, steps=20, lr=0.01)
>>> run.loss.shape == (len(run.steps), 50)
True

**Beyond one machine.** A member's fate does not depend on who stands beside it, so that ranges of
members can be trained apart and put together; with one thread each the result is bit for bit that
of one run. With joblib, on the processes of one machine::

    from joblib import Parallel, delayed

    parts = Parallel(n_jobs=2)(
        delayed(train_many)(recipe, x, y, seeds=range(start, start + 500), steps=1000, lr=0.01)
        for start in (0, 500)
    )
    run = concatenate(parts)

On a cluster the same lines run under Ray (``pip install ray``; ``from ray.util.joblib import
register_ray; register_ray()``) or Dask (``pip install distributed``; ``Client(address)``), inside
``with joblib.parallel_config(backend="ray"):`` or ``backend="dask"``. :func:`seed_ranges` cuts the
seeds.
"""

import contextlib
import difflib
import itertools
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook._optional import require
from relubook.evidence.statistics import mean_interval
from relubook.training._engine import (
    FEATURES,
    MEMBERS,
    ROWS,
    STATES,
    Data,
    Engine,
    Optimizer,
    Plan,
    evaluate,
    is_narrow,
    round_up,
)
from relubook.training.stack import Recipe, StackedNetwork, _seeds, _stream

__all__ = [
    "LOSSES",
    "OPTIMIZERS",
    "SCHEDULES",
    "TrainingRun",
    "batch_order",
    "concatenate",
    "crossed",
    "memory_needed",
    "seed_ranges",
    "train_many",
]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "adamax": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adadelta": {"rho": 0.9, "eps": 1e-6, "weight_decay": 0.0},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0},
}
"""The optimizers of :func:`train_many` with their options and torch's defaults."""

LOSSES = ("cross_entropy", "mse", "mae")
"""The losses of :func:`train_many`; each is a mean over a member's batch, as in torch."""

SCHEDULES = ("constant", "cosine", "linear")
"""The schedules of :func:`train_many`: factors 1, (1 + cos(pi t / T)) / 2 and 1 - t / T."""


@dataclass
class TrainingRun:
    """What :func:`train_many` measured; the network is the sample.

    Attributes:
        recipe: What the networks are made of.
        seeds: The members' seeds, M of them.
        lr: Their learning rates, shape (M,).
        steps: Steps at which was measured, R of them, 0 being the start.
        loss: On the whole training set in evaluation mode, shape (R, M). NaN or infinite once a
            member has overflowed.
        accuracy: Share of the training set classified rightly, (R, M); NaN for other losses.
        validation_loss: The same on the validation set, (R, M); NaN without one.
        validation_accuracy: Likewise.
        dead: Share of the units of each hidden layer that are silent on the whole training set,
            (R, M, layers). NaN once a member has overflowed: non-finite is a state of its own.
            0 for leaky and smooth functions and for maxout, which have no silent region.
        died: For each hidden layer the measured step since which a unit has been dead without
            interruption, (M, width), int64: 0 when born dead, -1 when it fires at the end. Of an
            overflowed member it holds what was last seen before.
        gradient_norm: Norm of the gradient of the last step before the measurement, over the
            whole network and before clipping, (R, M); NaN at step 0.
        diverged: First measured step with a non-finite loss or parameter, (M,), int64; -1 for
            none.
        network: The trained stack.
        interrupted: Whether the run was stopped by Ctrl-C; it then holds what there is.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    lr: Tensor
    steps: tuple[int, ...]
    loss: Tensor
    accuracy: Tensor
    validation_loss: Tensor
    validation_accuracy: Tensor
    dead: Tensor
    died: list[Tensor]
    gradient_norm: Tensor
    diverged: Tensor
    network: StackedNetwork = field(repr=False)
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        last = self.loss[-1][self.diverged < 0]
        loss = f"{last.mean():.4g}" if len(last) else "none finite"
        state = ", interrupted" if self.interrupted else ""
        return (
            f"TrainingRun({len(self)} members, {self.steps[-1]} steps, mean loss {loss}, "
            f"{int((self.diverged >= 0).sum())} diverged{state})"
        )

    def member(self, index: int) -> nn.Module:
        """Take one trained member out as a plain module in evaluation mode."""
        return self.network.member(index).eval()

    def to_frame(self, by: str = "member") -> Any:
        """Return the measurements as a tidy table.

        Args:
            by: ``"member"`` for one row a member and step; ``"layer"`` for one row a member, step
                and hidden layer (counted from 1), with the layer's share of dead units.

        Returns:
            A ``pandas.DataFrame``; ``dead`` is the share among all hidden units by member, that
            among the layer's by layer.

        Raises:
            ValueError: If ``by`` is neither.
        """
        if by not in ("member", "layer"):
            raise ValueError(f"by must be 'member' or 'layer', not {by!r}")
        pd = require("pandas", "tables of results")
        count, members = len(self.steps), len(self)
        keys = {
            "member": torch.arange(members).repeat(count),
            "seed": list(self.seeds) * count,
            "lr": self.lr.repeat(count),
            "step": torch.tensor(self.steps).repeat_interleave(members),
        }
        if by == "layer":
            layers = self.recipe.hidden
            table = {
                name: [v for v in _listed(column) for _ in range(layers)]
                for name, column in keys.items()
            }
            table["layer"] = list(range(1, layers + 1)) * (count * members)
            return pd.DataFrame(table | {"dead": self.dead.flatten().tolist()})
        measured = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "validation_loss": self.validation_loss,
            "validation_accuracy": self.validation_accuracy,
            "dead": self._dead_share(),
            "gradient_norm": self.gradient_norm,
        }
        table = {name: _listed(column) for name, column in keys.items()}
        table |= {name: value.flatten().tolist() for name, value in measured.items()}
        at = (self.diverged >= 0) & (self.diverged <= torch.tensor(self.steps)[:, None])
        return pd.DataFrame(table | {"diverged": at.flatten().tolist()})

    def summary(self, step: int | None = None, *, confidence: float = 0.95) -> Any:
        """Return mean and interval of each measured quantity over the members.

        Args:
            step: A measured step; the last by default.
            confidence: Coverage of Student's interval.

        Returns:
            A ``pandas.DataFrame`` with one row a learning rate and quantity, and the columns
            ``mean, low, high, n, diverged``: n members are finite and count, the diverged are
            left out and counted apart. The interval is NaN for fewer than two members.

        Raises:
            ValueError: If that step was not measured.
        """
        pd = require("pandas", "tables of results")
        step = self.steps[-1] if step is None else step
        if step not in self.steps:
            raise ValueError(f"step {step} was not measured; measured are {list(self.steps)}")
        table = self.to_frame()
        table = table[table["step"] == step]
        rows = []
        for lr, group in table.groupby("lr", sort=True):
            finite = group[~group["diverged"]]
            for name in group.columns.drop(["member", "seed", "lr", "step", "diverged"]):
                values = finite[name].to_numpy()
                values = values[values == values]
                if not len(values) and not group["diverged"].all():
                    continue
                mean = low = high = math.nan
                if len(values) > 1:
                    estimate = mean_interval(values, confidence=confidence)
                    mean, low, high = estimate.value, estimate.low, estimate.high
                elif len(values):
                    mean = float(values[0])
                counts = {"n": len(values), "diverged": int(group["diverged"].sum())}
                rows.append(
                    {"lr": lr, "quantity": name, "mean": mean, "low": low, "high": high} | counts
                )
        return pd.DataFrame(rows).set_index(["lr", "quantity"])

    def _dead_share(self) -> Tensor:
        widths = self.dead.new_tensor(self.recipe.hidden_widths)
        return (self.dead * widths).sum(-1) / max(1.0, float(widths.sum()))


def _listed(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, Tensor) else list(column)


def concatenate(runs: Iterable[TrainingRun]) -> TrainingRun:
    """Put runs over disjoint ranges of members together.

    Args:
        runs: Runs of one recipe, measured at the same steps, in the order of the members.

    Returns:
        The run of all members; bit for bit what one run gives, if each used one thread.

    Raises:
        ValueError: If there is none, or recipe or steps differ.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("nothing to concatenate")
    first = runs[0]
    if len(runs) == 1:
        return first
    for run in runs[1:]:
        if run.recipe != first.recipe or run.steps != first.steps:
            raise ValueError("runs of different recipes or steps do not belong together")
    seeds = tuple(seed for run in runs for seed in run.seeds)
    dtype = next(first.network.parameters()).dtype
    with torch.no_grad():
        network = StackedNetwork(first.recipe, seeds, dtype=dtype, initialize=False)
        states = [run.network.state_dict() for run in runs]
        network.load_state_dict(
            {
                key: torch.cat([state[key].cpu() for state in states]) if value.dim() else value
                for key, value in states[0].items()
            }
        )
    network.train(first.network.training)
    for name, module in network.named_modules():
        if hasattr(module, "calls"):
            module.calls = first.network.get_submodule(name).calls
    merged: dict[str, Any] = {}
    for entry in fields(TrainingRun):
        values = [getattr(run, entry.name) for run in runs]
        if entry.name in ("lr", "diverged"):
            merged[entry.name] = torch.cat(values)
        elif entry.name == "died":
            merged[entry.name] = [torch.cat(layer) for layer in zip(*values, strict=True)]
        elif isinstance(values[0], Tensor):
            merged[entry.name] = torch.cat(values, 1)
        else:
            merged[entry.name] = values[0]
    merged |= {
        "seeds": seeds,
        "network": network,
        "interrupted": any(run.interrupted for run in runs),
    }
    return TrainingRun(**merged)


def crossed(seeds: int | Iterable[int], lr: Iterable[float]) -> tuple[list[int], list[float]]:
    """Cross seeds with learning rates, so that a whole grid is one call.

    Args:
        seeds: The seeds; a number m stands for ``range(m)``.
        lr: The rates.

    Returns:
        Seeds and rates of the members, rate by rate, for ``train_many(..., seeds=s, lr=r)``.

    Example:
        >>> crossed(2, [0.1, 0.2])
        ([0, 1, 0, 1], [0.1, 0.1, 0.2, 0.2])
    """
    seeds, rates = _seeds(seeds), list(lr)
    return list(seeds) * len(rates), [rate for rate in rates for _ in seeds]


def seed_ranges(members: int, parts: int) -> list[range]:
    """Cut ``range(members)`` into at most ``parts`` ranges of nearly equal length.

    Example:
        >>> seed_ranges(10, 3)
        [range(0, 4), range(4, 7), range(7, 10)]
    """
    if members < 1 or parts < 1:
        raise ValueError(f"members and parts must be at least 1, not {members} and {parts}")
    parts = min(parts, members)
    size, more = divmod(members, parts)
    cuts = [part * size + min(part, more) for part in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def batch_order(seed: int, n: int, batch_size: int, steps: int) -> Tensor:
    """Return the batches that :func:`train_many` gives the member of a seed.

    Every epoch is a fresh permutation of the n examples, cut into whole batches; what is left
    over at its end is dropped.

    Args:
        seed: The member's seed.
        n: Number of examples.
        batch_size: Examples a step, at most n.
        steps: Number of steps.

    Returns:
        Indices of the examples, shape (steps, batch_size).
    """
    generator = torch.Generator().manual_seed(_stream(seed, "batches"))
    a_epoch = n // batch_size
    epochs = [
        torch.randperm(n, generator=generator)[: a_epoch * batch_size].view(a_epoch, batch_size)
        for _ in range(-(-steps // a_epoch))
    ]
    return torch.cat([torch.empty(0, batch_size, dtype=torch.int64), *epochs])[:steps]


def train_many(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    *,
    seeds: int | Iterable[int],
    steps: int,
    lr: float | Sequence[float] | Tensor,
    optimizer: str = "adam",
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    batch_seed: int | None = None,
    schedule: str | Callable[[int], float] = "constant",
    warmup: int = 0,
    clip: float | None = None,
    record: int | Iterable[int] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    memory_limit: float | None = None,
    **options: Any,
) -> TrainingRun:
    """Train many networks at once and record what becomes of each.

    The members' losses are added up, not averaged, so that every member is trained exactly as it
    would be alone. A member that overflows stays alone with its NaN.

    Args:
        recipe: What a network is made of.
        x: Inputs, shape (n, inputs), shared, or (members, n, inputs).
        y: Labels, integers of shape (n,) or (members, n); or targets, shape (n,), (n, outputs) or
            (members, n, outputs).
        seeds: The members' seeds; a number m stands for ``range(m)``. A seed fixes a member's
            weights, batches and dropout.
        steps: Number of optimizer steps.
        lr: One learning rate, or one a member; see :func:`crossed` for a grid.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"adamax"``, ``"adadelta"`` or
            ``"rmsprop"``, each as in ``torch.optim``.
        loss: ``"cross_entropy"``, ``"mse"`` or ``"mae"``, or a function of outputs (members,
            batch, outputs) and targets (members, batch, ...) that returns the members' losses,
            shape (members,), each a mean over the batch. By default cross-entropy for integer y,
            else the mean squared error.
        batch_size: Examples a step; all of them (full batch) by default. See
            :func:`batch_order`.
        batch_seed: Seed of one batch order that all members share; by default every member has
            its own from its seed.
        schedule: ``"constant"``, ``"cosine"`` or ``"linear"``, or a function of the step, from 0,
            that returns the factor on the rates.
        warmup: Steps over which the rates rise linearly to their value.
        clip: Largest norm of a member's gradient; a longer one is scaled down as by
            ``torch.nn.utils.clip_grad_norm_``, member by member.
        record: Measure every so many steps, or at these steps; at 11 steps from first to last by
            default. The first and the last step are always measured.
        validation: Inputs and labels or targets of a validation set.
        chunk: Train at most so many members at a time, to save memory.
        dtype: Type of the computation; that of ``x`` by default.
        device: Where to compute; where ``x`` is by default.
        progress: Whether to show a bar. By default when the standard error is a terminal, or as
            the environment variable ``RELUBOOK_PROGRESS`` says (0 or 1).
        memory_limit: Bytes that may be used; by default what the machine has free.
        **options: Options of the optimizer, as listed in :data:`OPTIMIZERS`, such as
            ``momentum=0.9, nesterov=True`` or ``weight_decay=1e-4``.

    Returns:
        The record and the trained networks. Ctrl-C ends the run early and returns what there is.

    Raises:
        ValueError: If an argument is unknown, not finite or does not fit; names it. Nothing has
            been computed then.
        TypeError: If the optimizer has no such option.
        MemoryError: If the stack would need more than there is; says how much, and which
            ``chunk=`` would do. Nothing has been allocated then.
    """
    plan = _check(
        recipe, x, y, seeds, steps, lr, optimizer, loss, batch_size, batch_seed, schedule, warmup,
        clip, record, validation, dtype, device, options,
    )  # fmt: skip
    members = len(plan.seeds)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    size = min(chunk or members, members)
    _check_memory(plan, size, memory_limit)
    runs = []
    with _interruptible() as stop, _bar(progress, members, plan) as bar:
        for start in range(0, members, size):
            part = plan.part(start, min(start + size, members))
            runs.append(_train(part, stop, bar))
            if stop.is_set():
                break
    if stop.is_set():
        done, last = len(runs[:-1]), runs[-1]
        # Chunks of different lengths cannot be put together: the finished ones count.
        runs = runs[:-1] if done and last.steps != runs[0].steps else runs
        for run in runs:
            run.interrupted = True
        warnings.warn(
            f"stopped after {runs[-1].steps[-1]} of {steps} steps "
            f"with {sum(map(len, runs))} of {members} members",
            RuntimeWarning,
            stacklevel=2,
        )
    return concatenate(runs)


def _check(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    seeds: int | Iterable[int],
    steps: int,
    lr: float | Sequence[float] | Tensor,
    optimizer: str,
    loss: Any,
    batch_size: int | None,
    batch_seed: int | None,
    schedule: str | Callable[[int], float],
    warmup: int,
    clip: float | None,
    record: int | Iterable[int] | None,
    validation: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    options: dict[str, Any],
) -> Plan:
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe must be a relubook.training.stack.Recipe, not {type(recipe).__name__}"
        )
    seeds = _seeds(seeds)
    members = len(seeds)
    if loss is None:
        loss = "mse" if y.is_floating_point() else "cross_entropy"
    elif not callable(loss) and loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; {_nearest(loss, LOSSES)}")
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.get_default_dtype())
    device = x.device if device is None else torch.device(device)
    x, y = _data(recipe, x, y, loss, members, dtype, device, "")
    n = x.shape[-2]
    if validation is not None:
        validation = _data(recipe, *validation, loss, members, dtype, device, "validation ")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, not {steps}")
    rates = torch.as_tensor(lr, dtype=torch.float64)
    if rates.dim() > 1 or (rates.dim() == 1 and len(rates) != members):
        raise ValueError(
            f"lr must be one number or one a member ({members}), not of shape {tuple(rates.shape)}"
        )
    rates = rates.expand(members).clone()
    if not (rates.isfinite() & (rates >= 0)).all():
        wrong = int((~(rates.isfinite() & (rates >= 0))).nonzero()[0])
        raise ValueError(f"lr must be finite and >= 0; member {wrong} has {rates[wrong].item()}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; {_nearest(optimizer, OPTIMIZERS)}")
    for key, value in options.items():
        if key not in OPTIMIZERS[optimizer]:
            raise TypeError(
                f"{optimizer!r} has no option {key!r}; {_nearest(key, OPTIMIZERS[optimizer])}"
            )
        numbers = value if isinstance(value, tuple | list) else [value]
        bounded = key in ("betas", "rho", "alpha", "momentum")
        if not all(math.isfinite(v) and v >= 0 and (not bounded or v < 1) for v in numbers):
            limits = "in [0, 1)" if bounded else "finite and >= 0"
            raise ValueError(f"{key} must be {limits}, not {value!r}")
    options = OPTIMIZERS[optimizer] | options
    if options.get("eps") == 0:
        raise ValueError("eps must be above 0: a dead unit's step would be 0 / 0")
    if options.get("nesterov") and not options["momentum"]:
        raise ValueError("nesterov=True wants momentum above 0")
    if batch_size is not None and not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be in 1..{n}, the size of the data, not {batch_size}")
    if recipe.normalization == "batch" and (batch_size or n) < 2:
        raise ValueError("batch normalization wants at least 2 examples a batch")
    if not callable(schedule) and schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; {_nearest(schedule, SCHEDULES)}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, not {warmup}")
    if clip is not None and not (clip > 0 and math.isfinite(clip)):
        raise ValueError(f"clip must be a positive finite number, not {clip!r}")
    if record is None:
        marks = {round(k * steps / 10) for k in range(11)}
    elif isinstance(record, int):
        if record < 1:
            raise ValueError(f"record must be at least 1, not {record}")
        marks = set(range(0, steps, record))
    else:
        marks = {int(mark) for mark in record}
        if wrong_marks := sorted(mark for mark in marks if not 0 <= mark <= steps):
            raise ValueError(f"record names step {wrong_marks[0]}, outside 0..{steps}")
    return Plan(
        recipe=recipe,
        x=x,
        y=y,
        seeds=seeds,
        lr=rates,
        steps=steps,
        optimizer=optimizer,
        options=options,
        loss=loss,
        batch_size=batch_size,
        batch_seed=batch_seed,
        factor=_factor(schedule, warmup, steps),
        clip=clip,
        record=tuple(sorted(marks | {0, steps})),
        validation=validation,
        device=device,
    )


def _nearest(wrong: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(wrong).lower(), list(known), n=3, cutoff=0.4)
    return f"the nearest known: {', '.join(close)}" if close else f"known: {', '.join(known)}"


def _data(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    loss: Any,
    members: int,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Check inputs and targets and bring them to type, device and shape."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and len(x) != members) or x.shape[-2] < 1:
        raise ValueError(
            f"{kind}x must have the shape (n, inputs) or ({members}, n, inputs), "
            f"not {tuple(x.shape)}"
        )
    if x.shape[-1] != recipe.inputs:
        raise ValueError(f"{kind}x has {x.shape[-1]} features, the recipe takes {recipe.inputs}")
    n = x.shape[-2]
    if not x.isfinite().all():
        raise ValueError(f"{kind}x has {int((~x.isfinite()).sum())} non-finite entries")
    if loss == "cross_entropy":
        if y.is_floating_point():
            raise ValueError(f"{kind}y must hold integers for cross-entropy, not {y.dtype}")
        if tuple(y.shape) not in ((n,), (members, n)):
            raise ValueError(
                f"{kind}y must have the shape ({n},) or ({members}, {n}), not {tuple(y.shape)}"
            )
        if int(y.min()) < 0 or int(y.max()) >= recipe.outputs:
            raise ValueError(
                f"labels of {kind}y must be in 0..{recipe.outputs - 1}, "
                f"not {int(y.min())}..{int(y.max())}"
            )
        return x.to(device, dtype), y.to(device, torch.int64)
    if not y.isfinite().all():
        raise ValueError(f"{kind}y has {int((~y.isfinite()).sum())} non-finite entries")
    if callable(loss):
        if y.dim() < 1 or n not in y.shape[:2]:
            raise ValueError(f"{kind}y must hold one target for each of {n} inputs")
        y = y[:, None] if y.dim() == 1 else y
        return x.to(device, dtype), y.to(device, dtype if y.is_floating_point() else y.dtype)
    if y.dim() == 1:
        y = y[:, None]
    k = recipe.outputs
    if tuple(y.shape) not in ((n, k), (members, n, k)):
        raise ValueError(
            f"{kind}y must have the shape ({n}, {k}) or ({members}, {n}, {k}), not {tuple(y.shape)}"
        )
    return x.to(device, dtype), y.to(device, dtype)


def _factor(
    schedule: str | Callable[[int], float], warmup: int, steps: int
) -> Callable[[int], float]:
    def factor(t: int) -> float:
        rise = min(1.0, (t + 1) / warmup) if warmup else 1.0
        if callable(schedule):
            return rise * float(schedule(t))
        if schedule == "cosine":
            return rise * (1 + math.cos(math.pi * t / steps)) / 2
        return rise * (1 - t / steps) if schedule == "linear" else rise

    return factor


def memory_needed(
    recipe: Recipe,
    members: int,
    n: int,
    *,
    batch_size: int | None = None,
    optimizer: str = "adam",
    momentum: bool = False,
    records: int = 11,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Estimate the memory that :func:`train_many` takes, in bytes.

    Args:
        recipe: What a network is made of.
        members: Networks trained at a time.
        n: Examples in the training set.
        batch_size: Examples a step; all by default.
        optimizer: Name of the optimizer.
        momentum: Whether it keeps a momentum.
        records: Number of measurements.
        dtype: Type of the computation.

    Returns:
        Bytes, a little more than measured peaks; the library itself not counted.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    narrow = is_narrow(recipe)

    def wide(features: int) -> int:
        return features if narrow else round_up(features, FEATURES)

    places = round_up(members, MEMBERS) if narrow else members
    weights = sum(wide(ins) * wide(outs) + wide(outs) for ins, outs in recipe.maps)
    units = [wide(width * recipe.pieces) for width in recipe.hidden_widths]
    if recipe.normalization != "none":
        weights += 4 * sum(units)
    batch = batch_size or n
    # Parameters, gradient, rates, two scratch buffers and the network that is returned.
    flat = weights * places * size * (6 + STATES.get(optimizer, 2) + momentum)
    kept = 1 + (recipe.residual != "none") + 2 * (recipe.activation != "relu")
    kept += 5 * (recipe.normalization != "none") + 5 * (recipe.dropout > 0) + (recipe.pieces > 1)
    ends = wide(recipe.inputs) + 3 * wide(recipe.outputs)
    widest = max([*units, wide(recipe.inputs), wide(recipe.outputs)])
    pass_through = (sum(units) * kept + ends + 4 * widest) * batch * places * size
    if narrow:
        pass_through += 2 * widest * batch * places * size
    evaluation = 4 * widest * min(n, ROWS) * places * size
    # The order of an epoch, twice over, and two generators of random numbers a member.
    order = members * 20_000 + (0 if batch_size is None else 2 * n * places * 8)
    kept_records = records * members * (6 + recipe.hidden) * size + sum(units) * members * 9
    return int(1.1 * (flat + max(pass_through, evaluation)) + order + kept_records)


def _check_memory(plan: Plan, members: int, limit: float | None) -> None:
    def needed(count: int) -> int:
        return memory_needed(
            plan.recipe,
            count,
            plan.x.shape[-2],
            batch_size=plan.batch_size,
            optimizer=plan.optimizer,
            momentum=bool(plan.options.get("momentum")),
            records=len(plan.record),
            dtype=plan.x.dtype,
        )

    limit = _free_memory(plan.device) if limit is None else limit
    if limit is None or needed(members) <= limit:
        return
    low, high = 0, members
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= limit else (low, middle)
    advice = f"chunk={low} would do" if low else "not even one member fits"
    raise MemoryError(
        f"training {members} members at once needs about {needed(members) / 2**30:.3g} GiB "
        f"and {limit / 2**30:.3g} GiB are free; {advice}"
    )


def _free_memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that no step is left half done."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:
        # Someone else's handling of Ctrl-C stays in force.
        yield stop
        return

    def handler(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


class _Bar:
    """A progress bar, or nothing."""

    def __init__(self, bar: Any):
        self.bar = bar
        self.members = 0

    def advance(self, members: int) -> None:
        if self.bar is not None:
            self.bar.update(members)

    def show(self, loss: Tensor, dead: Tensor) -> None:
        if self.bar is not None:
            self.bar.set_postfix(
                loss=f"{loss.nanmean():.3g}", dead=f"{100 * dead.nanmean():.1f}%", refresh=False
            )


@contextlib.contextmanager
def _bar(progress: bool | None, members: int, plan: Plan) -> Iterator[_Bar]:
    if progress is None:
        wanted = os.environ.get("RELUBOOK_PROGRESS", "")
        if wanted not in ("", "0", "1"):
            raise ValueError(f"RELUBOOK_PROGRESS must be 0 or 1, not {wanted!r}")
        progress = sys.stderr.isatty() if wanted == "" else wanted == "1"
    if not progress:
        yield _Bar(None)
        return
    tqdm = require("tqdm", "the progress bar").tqdm
    with tqdm(
        total=members * plan.steps,
        desc=f"{members} members x {plan.steps} steps",
        unit="step",
        unit_scale=True,
    ) as bar:
        yield _Bar(bar)


def _batches(plan: Plan, engine: Engine) -> Iterator[Tensor | None]:
    """Yield the indices of each step, (M, B) or with the members last (B, places)."""
    n, size, members = plan.x.shape[-2], plan.batch_size, engine.members
    if size is None:
        while True:
            yield None
    shared = plan.batch_seed is not None
    seeds = plan.seeds if plan.batch_seed is None else (plan.batch_seed,)
    generators = [torch.Generator().manual_seed(_stream(s, "batches")) for s in seeds]
    order = torch.zeros(len(seeds), n, dtype=torch.int64)
    rows = list(order)
    while True:
        for row, generator in zip(rows, generators, strict=True):
            torch.randperm(n, generator=generator, out=row)
        epoch = order.expand(members, -1) if shared else order
        if engine.narrow:
            epoch = F.pad(epoch, (0, 0, 0, engine.places - members)).t().contiguous()
        epoch = epoch.to(engine.device)
        for start in range(0, n - size + 1, size):
            yield epoch[start : start + size] if engine.narrow else epoch[:, start : start + size]


def _train(plan: Plan, stop: threading.Event, bar: _Bar) -> TrainingRun:
    """Train the members of a plan."""
    recipe, members = plan.recipe, len(plan.seeds)
    network = StackedNetwork(recipe, plan.seeds, dtype=plan.x.dtype).to(plan.device)
    engine = Engine(plan, network)
    data = Data(engine, plan.x, plan.y)
    check = None if plan.validation is None else Data(engine, *plan.validation)
    optimizer = Optimizer(engine)
    died = [
        torch.full((members, width), -1, dtype=torch.int64, device=plan.device)
        for width in recipe.hidden_widths
    ]
    diverged = torch.full((members,), -1, dtype=torch.int64, device=plan.device)
    unknown = torch.full((members,), math.nan, dtype=plan.x.dtype, device=plan.device)
    norms = unknown
    names = (
        "loss", "accuracy", "validation_loss", "validation_accuracy", "dead", "gradient_norm"
    )  # fmt: skip
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    steps: list[int] = []

    def measure(step: int) -> None:
        loss, accuracy, peaks = evaluate(engine, data, True)
        finite = loss.isfinite()
        for name, value in engine.values.items():
            real = engine._real(value, dict(network.named_parameters())[name].shape)
            finite &= real.isfinite().flatten(1).all(1)
        diverged[(diverged < 0) & ~finite] = step
        shares = []
        silent = [peak == 0 for peak in peaks] or [since >= 0 for since in died]
        for since, dead in zip(died, silent, strict=True):
            new = torch.where(dead, torch.where(since < 0, step, since), -1)
            since.copy_(torch.where((diverged < 0)[:, None], new, since))
            shares.append(dead.to(loss.dtype).mean(1))
        share = torch.stack(shares, 1) if shares else loss.new_zeros(members, 0)
        share[diverged >= 0] = math.nan
        other = (unknown, unknown) if check is None else evaluate(engine, check, False)[:2]
        accuracy = torch.where(loss.isnan(), loss, accuracy)
        measured = (loss, accuracy, *other, share, norms)
        for name, value in zip(names, measured, strict=True):
            kept[name].append(value.clone())
        steps.append(step)
        bar.show(loss, share)

    marks = set(plan.record)
    measure(0)
    batches = _batches(plan, engine)
    for step in range(plan.steps):
        if stop.is_set():
            break
        index = next(batches)
        x, y = data.rows(0, data.n) if index is None else data.batch(index)
        for name in engine.leaves:
            engine.grads[name].zero_()
        engine.step = step
        data.total(engine.run(x), y).backward()
        engine.step = step + 1
        with torch.no_grad():
            wanted = step + 1 in marks
            if wanted or plan.clip is not None:
                every = engine.norms()
                norms = every[:members]
                if plan.clip is not None:
                    engine.clip(every, plan.clip)
            optimizer.step(plan.factor(step))
        bar.advance(members)
        if wanted:
            measure(step + 1)
    if stop.is_set() and steps[-1] != engine.step:
        norms = unknown if plan.clip is None else norms
        measure(engine.step)
    engine.store()
    return TrainingRun(
        recipe=recipe,
        seeds=plan.seeds,
        lr=plan.lr,
        steps=tuple(steps),
        **{name: torch.stack(values).cpu() for name, values in kept.items()},
        died=[since.cpu() for since in died],
        diverged=diverged.cpu(),
        network=network.cpu(),
        interrupted=False,
    )
