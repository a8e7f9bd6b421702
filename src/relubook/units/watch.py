"""Watch the units of a model while it trains, cheaply, and date their deaths and revivals."""

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from relubook.units._readings import Audit, Followed, Hook, Place, Reader
from relubook.units.report import SiteListing, plain_table
from relubook.units.sites import AmbiguousUnitsError, tensors_in, unwrapped

__all__ = ["Event", "Watch", "WatchReport", "WatchedSite"]


class Event(NamedTuple):
    """A death or a revival.

    Attributes:
        step: First step of the window that showed it. A unit that died was silent from this step
            on at the latest; a unit that was revived fired in this window for the first time.
        until: Last step of that window.
        site: Name of the site.
        unit: Index of the unit.
        kind: ``"death"`` or ``"revival"``. Units that are silent throughout the first window that
            reaches their site die in it.
    """

    step: int
    until: int
    site: str
    unit: int
    kind: Literal["death", "revival"]


@dataclass(frozen=True, eq=False)
class WatchedSite:
    """The state of one site at the end of a window.

    Attributes:
        name: The site's name, as :func:`relubook.units.diagnosis.diagnose` gives it.
        dead: ``bool``, shape (units,): silent throughout the window.
        peak: Shape (units,): largest pre-activation of the window. ``-inf`` if the site was not
            reached, whose units then stay as they were.
    """

    name: str
    dead: Tensor
    peak: Tensor

    @property
    def nonfinite(self) -> Tensor:
        """``bool``, shape (units,): the peak was NaN or infinity. NaN is not silence."""
        return self.peak.isnan() | (self.peak == torch.inf)

    @property
    def units(self) -> int:
        """Number of units."""
        return self.dead.numel()


@dataclass(frozen=True, eq=False, repr=False)
class WatchReport(SiteListing[WatchedSite]):
    """The state of all sites at the end of the last whole window.

    Attributes:
        sites: One :class:`WatchedSite` per site that is followed.
        step: Last step of the window.
        window: Number of steps in it.
        inputs: Number of inputs in it, over all processes.
        unfollowed: Names of the sites and parts that are not followed.
    """

    sites: list[WatchedSite]
    step: int
    window: int
    inputs: int
    unfollowed: list[str]

    @property
    def dead_fraction(self) -> float:
        """Share of dead units among those of all sites."""
        units = sum(site.units for site in self.sites)
        return sum(int(site.dead.sum()) for site in self.sites) / max(units, 1)

    def __repr__(self) -> str:
        rows = [["site", "units", "dead", "non-finite"]]
        for site in self.sites:
            counts = (site.units, int(site.dead.sum()), int(site.nonfinite.sum()))
            rows.append([site.name, *(f"{count:,}" for count in counts)])
        first = self.step - self.window + 1
        lines = [
            *plain_table(rows),
            f"Steps {first} to {self.step}, n = {self.inputs:,} inputs.",
        ]
        for site in self.sites:
            if site.units and bool(site.dead.all()):
                lines.append(f"DEAD LAYER: all {site.units} units of {site.name} are dead.")
        if self.unfollowed:
            lines.append(f"Not followed: {', '.join(self.unfollowed)}.")
        return "\n".join(lines)


class Watch:
    """Follow the largest pre-activation of each unit while a model trains.

    One running peak per unit and site is kept over a *window* of steps. A unit whose peak never
    rose above the level at which its rectifier fires (0 for ReLU) was silent throughout the
    window and counts as dead. So a date of death is exact to within a window, and rests on as
    many inputs as the window had: a unit that fires on few inputs looks dead in a short window.

    Sites are found by one audit: before the first step, the model runs once more on that step's
    input, without gradients and without a trace (see :func:`relubook.units.sites.undisturbed`).
    A part that this pass left out (an expert, a layer under stochastic depth) is audited when it
    is first called. Hooks then read each site's input where a module gets or returns it, as with
    ``nn.ReLU`` or ``F.relu(self.fc(x))``. Named in ``unfollowed`` and in a warning are sites that
    hooks cannot read, such as a function of a sum, and the sites of a module that a later pass
    calls more or less often than the audit did.

    A step is a forward pass of the model in training mode with gradients on, or, if an
    ``optimizer`` is given, one step of it. Under ``torch.distributed`` the peaks of all processes
    are merged by their maximum at the end of each window, so all must take as many steps; parts
    that the audit left out are named only. Autocast and ``torch.compile``, before or inside the
    ``with`` block, work: entry and exit discard everything that was compiled in the process, since
    compiled code ignores later hooks, and a compiled graph breaks where the model is entered and
    left (with ``fullgraph=True`` torch raises).

    In eager execution, training with and without it gives bit-identical weights. The audit runs
    the model's own hooks once more, and changes to plain Python attributes stay. A copy of a
    watched model is not watched.

    Attributes:
        step: Number of steps seen.
        unfollowed: Names of the sites and parts that are not followed.
        notes: What the audit could not see.

    Args:
        model: Any module. Wrappers of ``torch.compile`` and of data parallelism are looked
            through.
        window: Steps per window.
        optimizer: Count this optimizer's steps instead of forward passes. A wrapper that has it
            as ``optimizer`` is looked through.
        unit_dim: As in :func:`relubook.units.diagnosis.diagnose`.
        batch_dim: As in :func:`relubook.units.diagnosis.diagnose`.
        process_group: Processes to merge over. Default: all.

    Raises:
        TypeError: If ``model`` is no module or ``optimizer`` no optimizer.
        ValueError: If ``window`` is not positive, or (at the first step) the model calls no
            rectifier.
        AmbiguousUnitsError: At the first step, if no site's units can be told.

    Example:
        >>> with Watch(model, window=100) as watch:
        ...     train(model)
        >>> watch.compute()      # which units are dead now
        >>> watch.history        # when each died, and which came back
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 100,
        optimizer: Any = None,
        unit_dim: int | Mapping[str, int | None] | None = None,
        batch_dim: int = 0,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of steps, at least 1, not {window!r}")
        inner = optimizer
        while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
            inner = inner.optimizer
        if optimizer is not None and not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer or have one as its .optimizer, "
                f"not a {type(optimizer).__name__}"
            )
        self.window = window
        self.optimizer = inner
        self.process_group = process_group
        self.step = 0
        self.unfollowed: list[str] = []
        self.notes: list[str] = []
        self._model = unwrapped(model)
        self._options: dict[str, Any] = {"unit_dim": unit_dim, "batch_dim": batch_dim}
        self._handles: list[Any] = []
        self._late: dict[str, Any] = {}
        self._readers: list[Reader] = []
        self._audit: Audit | None = None
        self._sites: dict[str, Followed] = {}
        self._passes: Counter[str] = Counter()
        self._live = False
        self._inputs = 0
        self._events: list[tuple[int, int, str, list[int], Any]] = []
        self._report: WatchReport | None = None

    # Attaching.

    def __enter__(self) -> "Watch":
        return self.attach()

    def __exit__(self, error: object, *_: object) -> None:
        self._passes["failed"] += error is not None
        self.close()

    def attach(self) -> "Watch":
        """Register the hooks, as entering the ``with`` block does.

        Returns:
            Itself.

        Raises:
            RuntimeError: If it is attached already.
        """
        if self._handles:
            raise RuntimeError("this Watch is attached already")
        torch.compiler.reset()
        self._passes.clear()
        self.unfollowed, self.notes = [], []
        eager = torch.compiler.disable
        begin, end = Hook(eager(self._begin)), Hook(eager(self._end))
        self._handles = [
            self._model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(end, always_call=True),
        ]
        if self.optimizer is not None:
            count = eager(lambda *_: self._count_step())
            self._handles.append(self.optimizer.register_step_post_hook(count))
        return self

    def close(self) -> None:
        """Remove all hooks, as leaving the ``with`` block does. What was computed stays.

        Warns, and says why, if no step was seen since they were registered.
        """
        if not self._handles:
            return
        for handle in (*self._handles, *self._late.values(), *(r.handle for r in self._readers)):
            handle.remove()
        self._handles, self._late, self._readers, self._audit = [], {}, [], None
        self._live = False
        torch.compiler.reset()
        name, passes = type(self._model).__name__, self._passes
        if passes["failed"] or (passes["seen"] and passes["step"]):
            return
        if passes["seen"]:
            why = "the optimizer took none; it must be the one that the training loop steps"
        elif passes["idle"]:
            why = f"each call of {name} was in evaluation mode or with gradients off"
        else:
            why = (
                f"{name} itself was not called. Watch the module that is: a loop may call only "
                "its parts or another method, as Lightning does with training_step, and code that "
                "was compiled inside the block, for another model, runs without hooks"
            )
        warnings.warn(f"Watch saw no step: {why}", UserWarning, stacklevel=2)

    # One forward pass.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if Audit.running or not self._handles:  # compiled code calls removed hooks as well
            return
        if not (module.training and torch.is_grad_enabled()):
            self._passes["idle"] += 1
            return
        self._inputs += self._batch_size(args, kwargs)
        self._live = True
        if self._audit is None:
            self._look(module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._live or Audit.running:
            return
        self._live = False
        first = not self._passes["seen"]
        strange = [r for r in self._readers if (first and not r.count) | (not r.end())]
        if output is None and sys.exc_info()[0] is not None:  # the forward pass failed
            return
        self._passes["seen"] += 1
        if strange:
            names = [reader.site.name for reader in strange]
            self._leave_out(names, "called more or less often than in the audit, or in other ways")
        if self.optimizer is None:
            self._count_step()

    def _count_step(self) -> None:
        self._passes["step"] += 1
        self.step += 1
        if self.step % self.window == 0:
            self._close_window()

    def _batch_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        first, dim = args[0] if args else None, self._options["batch_dim"]
        if isinstance(first, nn.utils.rnn.PackedSequence):
            return int(first.batch_sizes[0])
        if not isinstance(first, Tensor):
            first = next(iter(tensors_in((args, kwargs))), None)
        return 1 if first is None or not -first.ndim <= dim < first.ndim else first.shape[dim]

    # Sites.

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Audit the model, or a part of it, and hook its sites."""
        audit = self._audit or Audit(self._model, **self._options)
        audit.run(module, self._batch_size(args, kwargs), args, kwargs)
        self.notes = list(audit.notes)
        if self._audit is None:
            if audit.ambiguous and not audit.found:
                raise AmbiguousUnitsError(_unclear(audit.ambiguous))
            if not audit.found:
                raise ValueError("; ".join(["the model called no rectifier", *self.notes]))
            for name in audit.modules:
                meet = Hook(torch.compiler.disable(partial(self._meet, name)))
                late = audit.modules[name].register_forward_pre_hook(meet, with_kwargs=True)
                self._late[name] = late
        self._audit = audit
        for name, _ in audit.counts:
            if name in self._late:
                self._late.pop(name).remove()
        unread = []
        for key, site in audit.found.items():
            site.name = audit.name_of(key)
            if None in site.readings:
                unread.append(site.name)
                continue
            dims: dict[Place, dict[int, int]] = defaultdict(dict)
            for place, call, dim in filter(None, site.readings):
                dims[place][call] = dim
            before = self._sites.get(site.name)  # from an earlier with block
            if before is not None and before.peak.shape == site.peak.shape:
                site = before
            self._sites[site.name] = site
            for place in dims:
                reader = Reader(self, site, dims[place], audit.counts[place])
                reader.handle = audit.hook(place, reader)
                self._readers.append(reader)
                if audit.modules[place[0]] is module and not place[1]:  # its call is under way
                    reader(module, args)
        if unread:
            self._leave_out(unread, "no module gets or returns what they rectify")
        if audit.ambiguous:
            self._leave_out(list(audit.ambiguous), _unclear(audit.ambiguous))

    def _meet(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Audit a part that no pass has called so far."""
        if not self._live or Audit.running or name not in self._late:
            return
        if self._processes() == 1:
            self._look(module, args, kwargs)
        else:  # the extra pass of one process might wait for the others
            self._late.pop(name).remove()
            self._leave_out([name], "the audit did not reach it")

    def _leave_out(self, names: Sequence[str], why: str) -> None:
        for reader in [reader for reader in self._readers if reader.site.name in names]:
            reader.handle.remove()
            self._readers.remove(reader)
        self._sites = {name: site for name, site in self._sites.items() if name not in names}
        new = [name for name in dict.fromkeys(names) if name not in self.unfollowed]
        self.unfollowed += new
        if new:
            message = f"Watch: hooks cannot follow {', '.join(new)}: {why}"
            warnings.warn(message, UserWarning, stacklevel=2)

    # Windows.

    def _processes(self) -> int:
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        return 1 if alone else torch.distributed.get_world_size(self.process_group)

    def _merge(self) -> int:
        """Merge the peaks of all processes, and return the number of their inputs."""
        for site in self._sites.values():
            site.peak[site.peak.isnan()] = torch.inf
        mine = {name: (site.level, site.peak.cpu()) for name, site in self._sites.items()}
        every: list[Any] = [None] * self._processes()
        torch.distributed.all_gather_object(
            every, (self._inputs, mine, self.unfollowed), group=self.process_group
        )
        unfollowed = dict.fromkeys(name for _, _, names in every for name in names)
        self.unfollowed = list(unfollowed)
        for _, sites, _ in every:
            for name, (level, peak) in sites.items():
                if name not in self._sites:  # reached elsewhere only
                    dead = torch.zeros(len(peak), dtype=torch.bool)
                    self._sites[name] = Followed(level, peak.clone(), dead, name)
                site = self._sites[name]
                torch.maximum(site.peak, peak.to(site.peak.device), out=site.peak)
        self._sites = {n: site for n, site in self._sites.items() if n not in unfollowed}
        return sum(inputs for inputs, _, _ in every)

    @torch.no_grad()
    def _close_window(self) -> None:
        inputs = self._inputs if self._processes() == 1 else self._merge()
        first = self.step - self.window + 1
        states = []
        for site in self._sites.values():
            silent = site.peak <= site.level
            changed = (silent != site.dead) & (site.peak != -torch.inf)
            if bool(changed.any()):
                for units, kind in ((changed & silent, "death"), (changed & ~silent, "revival")):
                    listed = units.nonzero().flatten().tolist()
                    self._events.append((first, self.step, site.name, listed, kind))
                site.dead ^= changed
            peak = site.peak.to("cpu", torch.float32, copy=True)
            states.append(WatchedSite(site.name, site.dead.to("cpu", copy=True), peak))
            site.peak.fill_(-torch.inf)
        self._inputs = 0
        self._report = WatchReport(states, self.step, self.window, inputs, list(self.unfollowed))

    def compute(self) -> WatchReport:
        """Return the state at the end of the last whole window.

        Under ``torch.distributed`` it is the same on every process, and nothing is sent.

        Returns:
            The report; ``print`` shows it as a table.

        Raises:
            RuntimeError: If no window is complete yet.
        """
        if self._report is None:
            raise RuntimeError(
                f"no window of {self.window} steps is complete: {self.step} steps were seen. "
                "Is the model in training mode, called with gradients on, inside the with block?"
            )
        return self._report

    def reset(self) -> None:
        """Forget peaks, deaths, the history and the step count; stay attached."""
        self.step = self._inputs = 0
        self._report = None
        self._events.clear()
        for site in self._sites.values():
            site.peak.fill_(-torch.inf)
            site.dead.zero_()

    @property
    def history(self) -> list[Event]:
        """Deaths and revivals, in the order of their windows."""
        return [
            Event(first, last, name, unit, kind)
            for first, last, name, units, kind in self._events
            for unit in units
        ]

    def nbytes(self) -> int:
        """Return the bytes held for all units, without the history."""
        held = [tensor for site in self._sites.values() for tensor in (site.peak, site.dead)]
        held += [tensor for state in self._report or () for tensor in (state.peak, state.dead)]
        held += [reader.now for reader in self._readers if reader.now is not None]
        return sum(tensor.nbytes for tensor in held)


def _unclear(ambiguous: Mapping[str, str]) -> str:
    listed = "; ".join(f"{name}: {why}" for name, why in ambiguous.items())
    return (
        f"cannot tell along which dimension the units lie: {listed}. Pass "
        "unit_dim={name: dimension}, or None for one to leave out"
    )
