"""Watch the units of a model while it trains, cheaply, and date their deaths and revivals."""

import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relubook._optional import require
from relubook.units._kinds import Activations, own_kinds
from relubook.units._readings import Audit, Followed, Hook, Peaks, Reader
from relubook.units.diagnosis import unclear
from relubook.units.report import UnitListing
from relubook.units.risk import advice, near_cliff
from relubook.units.sites import AmbiguousUnitsError, tensors_in, unwrapped

__all__ = ["Event", "Watch", "WatchReport", "WatchedSite"]


class Event(NamedTuple):
    """A death or a revival of one unit of a site, by the site's name and the unit's index.

    The window that showed it goes from ``step`` to ``until``. A unit that died was silent from its
    first step on at the latest; one that was revived fired in it for the first time. The kind is
    ``"revival"``, or ``"death"``, also of units silent in the first window that reached the site.
    """

    step: int
    until: int
    site: str
    unit: int
    kind: str


@dataclass(frozen=True, eq=False)
class WatchedSite:
    """One site at the end of a window, named as in :class:`relubook.units.report.SiteReport`.

    ``dead`` (``bool``) and ``peak`` have shape (units,): silent throughout the window, and largest
    pre-activation of it, ``-inf`` if the site was not reached, whose units then stay as they were.
    """

    name: str
    dead: Tensor
    peak: Tensor
    silences = True
    noun = "units"

    @property
    def nonfinite(self) -> Tensor:
        """``bool``, shape (units,): the peak was NaN or infinity. NaN is not silence."""
        return self.peak.isnan() | (self.peak == torch.inf)

    @property
    def at_risk(self) -> Tensor:
        """The tenth of the living units with the lowest peaks: the next to die; ``bool``."""
        return near_cliff(self.peak, ~(self.dead | self.nonfinite | (self.peak == -torch.inf)))

    @property
    def units(self) -> int:
        """Number of units."""
        return self.dead.numel()


@dataclass(frozen=True, eq=False, repr=False)
class WatchReport(UnitListing[WatchedSite]):
    """All sites at the end of the last whole window; ``print`` shows a table.

    Attributes:
        sites: One :class:`WatchedSite` per site that is followed.
        step, window, inputs: The window's last step, its number of steps, and of all inputs.
        unfollowed: Names of the sites and parts that are not followed.
        history: Deaths and revivals up to then, as in :class:`Watch`.
    """

    sites: list[WatchedSite]
    step: int
    window: int
    inputs: int
    unfollowed: list[str]
    history: list[Event] = field(default_factory=list)

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per site and window, from the first window on.

        Its columns are ``site, step`` (the window's last), ``units, deaths, revivals`` (within it),
        ``dead`` and ``dead_fraction`` (at its end).
        """
        pandas = require("pandas", "tables of results")
        steps = range(self.window, self.step + 1, self.window)
        rows = [(site.name, step, site.units) for site in self.sites for step in steps]
        frame = pandas.DataFrame(rows, columns=["site", "step", "units"])
        counts = Counter((event.site, event.until, event.kind) for event in self.history)
        for kind in ("death", "revival"):
            frame[f"{kind}s"] = [counts[name, step, kind] for name, step, _ in rows]
        frame["dead"] = (frame.deaths - frame.revivals).groupby(frame.site).cumsum()
        return frame.assign(dead_fraction=frame.dead / frame.units.clip(1))

    def plot(self) -> Any:
        """Draw the dead share over time, above deaths and revivals; return a matplotlib figure."""
        if not self.sites:
            raise ValueError("no site is followed, so there is nothing to draw")
        pyplot = require("matplotlib.pyplot", "figures")
        options: Any = {"figsize": (5.2, 4.2), "height_ratios": (2, 1), "layout": "constrained"}
        figure, (above, below) = pyplot.subplots(2, 1, sharex=True, **options)
        frame = self.to_frame()
        total = frame.groupby("step").sum(numeric_only=True)
        line: Any = {"edges": [0, *total.index], "baseline": None}
        bars: Any = {"edges": [0, *total.index], "fill": True, "edgecolor": "white"}
        for k, (_, site) in enumerate(frame.groupby("site")):
            label = "_" * min(k, 1) + "each site"  # in the legend once
            above.stairs(site.dead_fraction, color="#999999", label=label, **line)
        shares = total.dead / total.units
        above.stairs(shares, color="black", linewidth=3, label="all units", **line)
        below.stairs(total.deaths, color="#D55E00", label="deaths", **bars)
        below.stairs(-total.revivals, color="#0072B2", hatch="////", label="revivals", **bars)
        above.set_title(f"{self.dead_fraction:.1%} of the units dead at step {self.step:,}")
        above.set(ylabel="dead share", xlim=(0, self.step), ylim=(0, None))
        below.set(ylabel="units", xlabel="step")
        figure.legend(loc="outside lower center", ncols=4, columnspacing=1)
        return figure

    def _remarks(self) -> list[str]:
        steps = f"Steps {self.step - self.window + 1} to {self.step}, n = {self.inputs:,} inputs."
        unfollowed = [f"Not followed: {', '.join(self.unfollowed)}."] * bool(self.unfollowed)
        return [steps, *super()._remarks(), *advice(self), *unfollowed]


class Watch:
    """Follow the largest pre-activation of each unit while a model trains.

    A unit whose peak over a *window* of steps never rose above the level at which its rectifier
    fires (0 for ReLU) counts as dead. So a death is dated to within a window, and rests on as many
    inputs as the window had: a unit that fires on few inputs looks dead in a short window.

    Before the first step the model runs once more on that step's input, without a trace save that
    its own hooks run and what it writes to plain Python attributes stays. That finds the sites;
    hooks then read each one's input where a module gets or returns it, as with ``nn.ReLU`` or
    ``F.relu(self.fc(x))``. Named in ``unfollowed`` and a warning are sites that no hook can read,
    such as a function of a sum; those of a module that a later pass calls more or less often; and
    parts that only a later pass calls (an expert, a layer under stochastic depth).

    A step is a forward pass in training mode with gradients on, or one of the ``optimizer`` if
    given. Eager training gives the same weights to the bit as without it. Autocast works, and
    ``torch.compile`` before or inside the ``with`` block: entry and exit discard all code compiled
    in the process, which would ignore new hooks, and compiled graphs break where the model is
    entered and left (``fullgraph=True`` raises). Under ``torch.distributed`` the peaks of all
    processes, which must take as many steps, are merged after each window. Copies are not watched.

    Attributes:
        step: Number of steps seen.
        history: Deaths and revivals, one :class:`Event` each, in the order of their windows.
        unfollowed: Names of the sites and parts that are not followed.
        notes: What the first pass could not see.

    Args:
        model: Any module. ``torch.compile``'s and the data-parallel wrappers are looked through.
        window: Steps per window.
        optimizer: Count its steps, or those of what it wraps, instead of forward passes.
        unit_dim, batch_dim, activations: As in :func:`relubook.units.diagnosis.diagnose`. Of those
            that only their output tells to be silent, ``peak`` is the largest absolute output.

    Raises TypeError if ``model`` is no module or ``optimizer`` no optimizer, ValueError if
    ``window`` is not positive; at the first step ValueError if no rectifier is called, and
    AmbiguousUnitsError if no site's units can be told.

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
        activations: Activations = None,
    ) -> None:
        self._model = unwrapped(model)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of steps, at least 1, not {window!r}")
        inner = optimizer
        while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
            inner = inner.optimizer
        if optimizer is not None and not isinstance(inner, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or wrap one, not a {kind}")
        self.window, self.optimizer = window, inner
        self.step = 0
        self.history: list[Event] = []
        self.unfollowed, self.notes = list[str](), list[str]()
        own_kinds(activations, {})  # raises what is wrong with it
        self._options: dict[str, Any] = {"unit_dim": unit_dim, "batch_dim": batch_dim}
        self._options["activations"] = activations
        self._handles: list[Any] = []
        self._readers: list[Reader] = []
        self._sites: dict[str, Followed] = {}
        self._peaks = Peaks([])
        # Since the hooks were registered: the steps before, whether there was an audit, and a pass.
        self._start, self._audited, self._seen = 0, False, False
        self._live, self._inputs = False, 0
        self._report: WatchReport | None = None

    def __enter__(self) -> "Watch":
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self) -> "Watch":
        """Register the hooks, as entering ``with`` does; RuntimeError if it is attached already."""
        if self._handles:
            raise RuntimeError("this Watch is attached already")
        torch.compiler.reset()
        self._start, self._audited, self._seen = self.step, False, False
        self.unfollowed, self.notes = [], []
        begin, end = Hook(self._begin), Hook(self._end)
        self._handles = [
            self._model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(end, always_call=True),
        ]
        if self.optimizer is not None:
            self._handles.append(self.optimizer.register_step_post_hook(Hook(self._count_step)))
        return self

    def close(self) -> None:
        """Remove all hooks, as leaving the ``with`` block does. What was computed stays.

        Warns if no step was seen since they were registered, and no exception is the reason.
        """
        if not self._handles:
            return
        for handle in (*self._handles, *(reader.handle for reader in self._readers)):
            handle.remove()
        self._handles, self._readers, self._live = [], [], False
        torch.compiler.reset()
        if not (self._seen and self.step > self._start) and sys.exc_info()[0] is None:
            name = type(self._model).__name__
            warnings.warn(
                f"Watch saw no step: {name} itself was not called in training mode with gradients "
                "on, or the optimizer, if given, took none. A loop may call only parts of it, or "
                "another method (Lightning calls training_step): watch the module that is called. "
                "Code compiled inside the block, for another model, runs without hooks",
                stacklevel=2,
            )

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if Audit.running or not self._handles:  # compiled code calls removed hooks as well
            return
        if module.training and torch.is_grad_enabled():
            self._inputs += self._batch_size(args, kwargs)
            self._live = True
            if not self._audited:
                self._look(args, kwargs)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._live or Audit.running:
            return
        self._live = False
        self._peaks.merge()
        strange = []
        for reader in self._readers:
            if not (reader.usual() and (self._seen or reader.count)):
                strange.append(reader.site.name)
            reader.count, reader.strange = 0, False
        if output is None and sys.exc_info()[0] is not None:  # the forward pass failed
            return
        self._seen = True
        if strange:
            self._leave_out(
                strange, "called more or less often than in the audit, or in other ways"
            )
        if self.optimizer is None:
            self._count_step()

    def _count_step(self, *_: Any) -> None:
        self.step += 1
        if self.step % self.window == 0:
            self._close_window()

    def _batch_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        first: Any = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next(tensors_in((args, kwargs)), None)
        try:
            return first.size(self._options["batch_dim"])
        except (AttributeError, IndexError):
            return 1

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        audit = Audit(self._model, **self._options)
        audit.run(self._model, self._batch_size(args, kwargs), args, kwargs)
        self.notes = list(audit.notes)
        if not audit.found:
            if audit.ambiguous:
                raise AmbiguousUnitsError(unclear(audit.ambiguous))
            raise ValueError("; ".join(["the model called no rectifier", *self.notes]))
        self._audited = True
        for name in audit.modules.keys() - {name for name, _ in audit.counts}:
            meet = Hook(partial(self._meet, name))
            self._handles.append(audit.modules[name].register_forward_pre_hook(meet))
        for key, site in audit.found.items():
            site.name = audit.name_of(key)
            old = self._sites.get(site.name, site)  # from an earlier with block
            if old.peak.shape == site.peak.shape:
                site.peak, site.dead = old.peak, old.dead
            self._sites[site.name] = site
        self._peaks = Peaks(audit.found.values())
        for site in audit.found.values():
            for place in site.ways:
                reader = Reader(self, site, place, audit)
                self._readers.append(reader)
                if place == ("", False):  # the model's input: its call is under way
                    reader(self._model, args)
        unread = [site.name for site in audit.found.values() if site.unread]
        uncalled = [getattr(key, "__name__", str(key)) for key in audit.uncalled]
        self._leave_out(uncalled, "activations names them, but the audit did not call them")
        self._leave_out(unread, "no module gets or returns what they rectify")
        self._leave_out(list(audit.ambiguous), unclear(audit.ambiguous))

    def _meet(self, name: str, *_: Any) -> None:
        """Name a part that the audit did not reach, but none inside of it."""
        inside = any(name.startswith(f"{part}.") for part in self.unfollowed)
        if self._live and not Audit.running and not inside:
            self._leave_out([name], "the audit did not reach it")

    def _leave_out(self, names: Sequence[str], why: str) -> None:
        for reader in [reader for reader in self._readers if reader.site.name in names]:
            reader.handle.remove()
            self._readers.remove(reader)
        self._sites = {name: site for name, site in self._sites.items() if name not in names}
        new = [name for name in dict.fromkeys(names) if name not in self.unfollowed]
        self.unfollowed += new
        if new:
            warnings.warn(f"Watch: hooks cannot follow {', '.join(new)}: {why}", stacklevel=2)

    def _merge(self) -> None:
        for site in self._sites.values():
            site.peak[site.peak.isnan()] = torch.inf
        peaks = {name: (site.level, site.peak.cpu()) for name, site in self._sites.items()}
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, (self._inputs, peaks, self.unfollowed))
        for _, sites, unfollowed in every:
            self.unfollowed += [name for name in unfollowed if name not in self.unfollowed]
            for name, (level, peak) in sites.items():
                if name not in self._sites:  # reached elsewhere only
                    dead = torch.zeros(len(peak), dtype=torch.bool)
                    self._sites[name] = Followed(level, peak.clone(), dead, name)
                site = self._sites[name]
                torch.maximum(site.peak, peak.to(site.peak.device), out=site.peak)
        self._sites = {n: site for n, site in self._sites.items() if n not in self.unfollowed}
        self._inputs = sum(inputs for inputs, _, _ in every)

    @torch.no_grad()
    def _close_window(self) -> None:
        self._peaks.merge()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._merge()
        first = self.step - self.window + 1
        states, events = [], []
        for site in self._sites.values():
            peak = site.peak.to("cpu", copy=True)
            dead = torch.where(peak == -torch.inf, site.dead, peak <= site.level)
            for kind, units in (("death", dead & ~site.dead), ("revival", site.dead & ~dead)):
                for unit in units.nonzero().flatten().tolist():
                    events.append(Event(first, self.step, site.name, unit, kind))
            site.dead = dead
            states.append(WatchedSite(site.name, dead, peak.float()))
            site.peak.fill_(-torch.inf)
            if site.latest is not None:
                site.latest.fill_(-torch.inf)
        self.history = [*self.history, *events]
        unfollowed = list(self.unfollowed)
        self._report = WatchReport(
            states, self.step, self.window, self._inputs, unfollowed, self.history
        )
        self._inputs = 0

    def compute(self) -> WatchReport:
        """Return the state at the end of the last whole window; RuntimeError if there is none yet.

        Under ``torch.distributed`` it is the same on every process, and nothing is sent.
        """
        if self._report is None:
            message = f"no window of {self.window} steps is complete: {self.step} steps were seen"
            raise RuntimeError(f"{message}, in training mode with gradients on")
        return self._report
