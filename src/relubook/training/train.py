"""Train many networks at once with any optimizer of torch, each member as if it were alone.

>>> x = torch.linspace(-1, 1, 64)[:, None]
>>> stack = Recipe(1, 2, 1, hidden=9).stack(50)
>>> run = train(stack, x, x.abs(), steps=20, lr=0.01)
>>> run = train(stack, x, x.abs(), steps=20, lr=0.001, optimizer=torch.optim.SGD)  # goes on

Losses are added up, so that a member's gradient is what it would be alone. ``jobs=`` trains ranges
apart, by joblib: inside ``joblib.parallel_config(backend="dask")`` or ``"ray"`` on a cluster.
"""

import contextlib
import math
import operator
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relubook._optional import require
from relubook.training.data import MemberData
from relubook.training.optimizers import Numbers, make_optimizer, optimizer_maker
from relubook.training.run import TrainingRun, concatenate, crossed, seed_ranges
from relubook.training.stack import Stack, kept_modes

__all__ = ["TrainingRun", "concatenate", "crossed", "seed_ranges", "train"]

ROWS = 256  # rows evaluated at once


def train(
    stack: Stack,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    lr: float | Sequence[float] | Tensor,
    optimizer: Any = "adam",
    loss: Any = None,
    batch_size: int | None = None,
    batch_seed: int | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    record: int | Iterable[int] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    each_step: Callable[[int, Stack, torch.optim.Optimizer], Any] | None = None,
    jobs: int = 1,
    progress: bool | None = None,
    **options: Any,
) -> TrainingRun:
    """Train a stack on from where it stands.

    Args:
        stack: From ``recipe.stack(seeds)`` or ``stack_of(build, seeds)``; changed in place.
        x, y: Inputs, and labels or targets, shape (n, ...), shared, or (members, n, ...).
        steps: Number of optimizer steps.
        lr: One learning rate, or one a member; :func:`relubook.training.run.crossed` makes grids.
        optimizer: A class of ``torch.optim`` or its name, or a function that makes one from groups,
            fresh on each call. Those that mix a tensor's numbers (Muon) get members one by one.
        loss: A loss of torch (``F.huber_loss``, ``nn.L1Loss()``, ``"mse_loss"``) or any function
            of one network's outputs and targets that returns their mean loss. By default
            cross-entropy for integer y, else the mean squared error.
        batch_size: Examples a step, all of them by default; see
            :func:`relubook.training.stack.batch_order`.
        batch_seed: Seed of one batch order for all members; by default each has its own.
        scheduler: Makes a scheduler of ``torch.optim.lr_scheduler`` from the optimizer, such as
            ``functools.partial(CosineAnnealingLR, T_max=steps)``; it steps after every step.
        clip: Largest norm of a member's gradient, as ``torch.nn.utils.clip_grad_norm_`` has it.
        record: Measure every so many steps, or at these (by default 11), at both ends always.
        validation: Inputs and labels or targets of a validation set.
        each_step: ``each_step(step, stack, optimizer)`` is called after every step (1, 2, ...) in
            evaluation mode without gradients; may change parameters in place; False ends the run.
        jobs: Ranges of members to train apart by joblib; not with ``each_step``.
        progress: Whether to show a bar. By default when the standard error is a terminal, or as
            the environment variable ``RELUBOOK_PROGRESS`` says (0 or 1).
        **options: Options of the optimizer, such as ``momentum=0.9, nesterov=True``.

    Returns what was measured, with the stack as ``network``; after Ctrl-C what there is. Raises
    TypeError or ValueError, and changes nothing, if an argument is wrong.
    """
    if not isinstance(stack, Stack):
        kind = type(stack).__name__
        raise TypeError(f"stack must come from recipe.stack(seeds) or stack_of(), not {kind}")
    members = len(stack)
    data = MemberData(stack, x, y, loss)
    check = None
    if validation is not None:
        if not isinstance(validation, Sequence) or len(validation) != 2:
            raise TypeError(f"validation must be a pair (x, y), not {type(validation).__name__}")
        check = MemberData(stack, *validation, loss, "validation ")
    rates = _rates(lr, members)
    steps, jobs = _integer("steps", steps, 0), _integer("jobs", jobs, 1)
    if batch_size is not None and _integer("batch_size", batch_size, 1) > data.n:
        raise ValueError(f"batch_size must be at most {data.n}, the examples, not {batch_size}")
    if batch_seed is not None:
        _integer("batch_seed", batch_seed)
    if 1 in (batch_size, data.n) and any(isinstance(m, nn.BatchNorm1d) for m in stack.modules()):
        raise ValueError("batch_size must be at least 2 for batch normalization, not 1")
    if clip is not None and not (isinstance(clip, int | float) and 0 < clip < math.inf):
        raise ValueError(f"clip must be a positive finite number, not {clip!r}")
    for name, given in (("each_step", each_step), ("scheduler", scheduler)):
        if given is not None and not callable(given):
            raise TypeError(f"{name} must be a function, not {given!r}")
    marks = _marks(record, steps)
    make, elementwise = optimizer_maker(optimizer, options)
    if jobs > 1 and members > 1:
        if each_step is not None:
            raise ValueError("each_step must be None for several jobs: they share no memory")
        return _train_apart(
            stack, data, check, rates, jobs, steps=steps, optimizer=optimizer, loss=loss,
            batch_size=batch_size, batch_seed=batch_seed, scheduler=scheduler, clip=clip,
            record=sorted(marks), **options,
        )  # fmt: skip
    done, ended = 0, False
    with (
        _interruptible() as stop, _bar(progress, members, steps) as bar, kept_modes(stack),
        Numbers(stack) as numbers, torch.enable_grad(),
    ):  # fmt: skip
        made = make_optimizer(make, numbers.groups(rates.tolist(), elementwise), options)
        schedule = None if scheduler is None else scheduler(made)
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("scheduler must go by the step, but ReduceLROnPlateau goes by a loss")
        if schedule is not None and not hasattr(schedule, "step"):
            raise TypeError(f"scheduler must make a torch.optim.lr_scheduler, not {schedule!r}")
        trainer = _Trainer(stack, numbers, data, check, bar)
        batches = data.batches(stack.seeds, batch_size, batch_seed)
        trainer.measure(0)
        for step in range(1, steps + 1):
            if stop.is_set() or ended:
                break
            if not stack.training:
                stack.train()
            trainer.backward(next(batches), step in marks or each_step is not None, clip)
            made.step()
            if schedule is not None:
                schedule.step()
            done = step
            if bar is not None:
                bar.update(members)
            if each_step is not None:
                with torch.no_grad():
                    ended = each_step(step, stack.eval(), made) is False
            if step in marks:
                trainer.measure(step)
        if trainer.steps[-1] != done:
            trainer.measure(done)
    interrupted = done < steps and not ended
    if interrupted:
        warnings.warn(f"stopped after {done} of {steps} steps", RuntimeWarning, stacklevel=2)
    return trainer.run(rates, interrupted)


def _integer(name: str, value: Any, least: float = -math.inf) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def _rates(lr: Any, members: int) -> Tensor:
    try:
        rates = torch.as_tensor(lr, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"lr must be a number or one number a member, not {lr!r}") from None
    if rates.dim() > 1 or (rates.dim() == 1 and len(rates) != members):
        shape = tuple(rates.shape)
        raise ValueError(f"lr must be one number or one a member ({members}), not of shape {shape}")
    rates = rates.expand(members).clone()
    if not (fine := rates.isfinite() & (rates >= 0)).all():
        wrong = int((~fine).nonzero()[0])
        raise ValueError(f"lr must be finite and >= 0; member {wrong} has {rates[wrong].item()}")
    return rates


def _marks(record: int | Iterable[int] | None, steps: int) -> set[int]:
    if record is None:
        marks = {round(k * steps / 10) for k in range(11)}
    elif isinstance(record, Iterable) and not isinstance(record, str):
        marks = {_integer("every step of record", mark) for mark in record}
        if wrong := sorted(mark for mark in marks if not 0 <= mark <= steps):
            raise ValueError(f"record must name steps in 0..{steps}, not {wrong[0]}")
    else:
        marks = set(range(0, steps, _integer("record", record, 1)))
    return marks | {0, steps}


class _Trainer:
    def __init__(self, stack: Stack, numbers: Numbers, data: MemberData, check: Any, bar: Any):
        self.stack, self.numbers, self.data, self.check = stack, numbers, data, check
        self.bar = bar
        members, like = len(stack), numbers.values
        exact = torch.promote_types(like.dtype, torch.float32)
        self.unknown = torch.full((members,), math.nan, dtype=exact, device=like.device)
        self.norms = self.unknown
        self.diverged = torch.full((members,), -1, dtype=torch.int64, device=like.device)
        self.died: list[Tensor] = []
        self.steps: list[int] = []
        self.kept: list[dict[str, Tensor]] = []

    def backward(self, batch: tuple[Tensor, Tensor], measured: bool, clip: float | None) -> None:
        self.numbers.gradient.zero_()
        self.data.each(self.stack(batch[0]), batch[1]).sum().backward()
        if measured or clip is not None:
            self.norms = self.numbers.norms()
        if clip is not None:
            self.numbers.clip(self.norms, clip)

    @torch.no_grad()
    def measure(self, step: int) -> None:
        self.stack.eval()
        loss, accuracy, fires = self._evaluate(self.data, True)
        other = self._evaluate(self.check, False)[:2] if self.check else (self.unknown,) * 2
        finite = loss.isfinite() & self.numbers.finite()
        self.diverged[(self.diverged < 0) & ~finite] = step
        overflowed = self.diverged >= 0
        if not self.steps:
            self.died = [torch.full_like(fire, -1, dtype=torch.int64) for fire in fires]
        for since, fire in zip(self.died, fires, strict=True):
            new = torch.where(fire, -1, torch.where(since < 0, step, since))
            since.copy_(torch.where(overflowed[:, None], since, new))
        shares = [(~fire).to(loss.dtype).mean(1) for fire in fires]
        dead = torch.stack(shares, 1) if shares else loss.new_zeros(len(loss), 0)
        dead[overflowed] = math.nan
        measured = {
            "loss": loss,
            "accuracy": torch.where(loss.isnan(), loss, accuracy),
            "validation_loss": other[0],
            "validation_accuracy": other[1],
            "dead": dead,
            "gradient_norm": self.norms.clone(),
        }
        self.kept.append(measured)
        self.steps.append(step)
        if self.bar is not None:
            state = f"loss={loss.nanmean():.3g}, dead={100 * dead.nanmean():.1f}%"
            self.bar.set_postfix_str(state, refresh=False)

    def _evaluate(self, data: MemberData, watch: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return loss, accuracy and whether each unit outputs anything but 0."""
        fires: list[Tensor] = []
        now: list[Tensor] = []

        def seen(pre: Tensor, post: Tensor) -> None:
            others = [dim for dim in range(1, post.dim()) if dim != min(2, post.dim() - 1)]
            now.append((post != 0).any(others) if others else post != 0)

        loss, hits = self.unknown.new_zeros(2, len(self.unknown))
        for start in range(0, data.n, ROWS):
            x, y = data.rows(slice(start, start + ROWS))
            now.clear()
            out = self.stack.run(x, seen if watch else None)
            fires = [a | b for a, b in zip(fires, now, strict=True)] if fires else [*now]
            loss += data.each(out, y) * (y.shape[1] / data.n)
            if not y.is_floating_point() and out.shape[:-1] == y.shape:  # labels
                hits += (out.argmax(-1) == y).sum(1) / data.n
            else:
                hits = self.unknown
        return loss, hits, fires

    def run(self, rates: Tensor, interrupted: bool) -> TrainingRun:
        names, seeds = self.kept[0], self.stack.seeds
        kept: Any = {name: torch.stack([at[name] for at in self.kept]).cpu() for name in names}
        since = [since.cpu() for since in self.died]
        kept |= {"died": since, "diverged": self.diverged.cpu(), "interrupted": interrupted}
        return TrainingRun(self.stack, seeds, rates, tuple(self.steps), **kept)


def _train_apart(
    stack: Stack, data: MemberData, check: Any, rates: Tensor, jobs: int, **settings: Any
) -> TrainingRun:
    joblib = require("joblib", "training on several processes")
    calls = []
    for part in seed_ranges(len(stack), jobs):
        a, b = part.start, part.stop
        held = None if check is None else check.part(a, b)
        given = settings | {"lr": rates[a:b], "validation": held}
        calls.append(joblib.delayed(_train_part)(stack.range(a, b), *data.part(a, b), given))
    run = concatenate(joblib.Parallel(n_jobs=jobs)(calls))
    stack.take_(run.network)
    return replace(run, network=stack)


def _train_part(stack: Stack, x: Tensor, y: Tensor, settings: dict[str, Any]) -> TrainingRun:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(stack, x, y, progress=False, **settings)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that no step is left half done."""
    stop = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    # Someone else's handling of Ctrl-C stays in force.
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return

    def handler(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _bar(progress: bool | None, members: int, steps: int) -> Any:
    if progress is None:
        chosen = os.environ.get("RELUBOOK_PROGRESS", "")
        if chosen not in ("", "0", "1"):
            raise ValueError(f"RELUBOOK_PROGRESS must be 0 or 1, not {chosen!r}")
        progress = sys.stderr.isatty() if chosen == "" else chosen == "1"
    if not progress:
        return contextlib.nullcontext()
    tqdm, title = require("tqdm", "the progress bar").tqdm, f"{members} members x {steps} steps"
    return tqdm(total=members * steps, desc=title, unit="step", unit_scale=True)
