"""Watch the units of a model while it trains, cheaply, and date their deaths and revivals."""

import contextlib
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from relubook.units.report import SiteListing, plain_table
from relubook.units.sites import (
    UNIT,
    AmbiguousUnitsError,
    Site,
    SiteFinder,
    tensors_in,
    undisturbed,
    unwrapped,
)

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

    @property
    def dead_fraction(self) -> float:
        """Share of dead units."""
        return int(self.dead.sum()) / max(self.units, 1)


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


def channel_peak(x: Tensor, dim: int) -> Tensor:
    """Return the largest value along every other dimension, in one pass over the memory.

    Args:
        x: Any shape, not empty.
        dim: The dimension to keep, counted from the end: negative.

    Returns:
        Shape ``(x.shape[dim],)``. NaN where there was one.
    """
    if x.ndim == 1:
        return x
    if dim == 1 - x.ndim and x.ndim > 2 and x.is_contiguous():
        # Reduce first along what is long enough to be fast.
        if x[0, 0].numel() >= 64:
            return x.flatten(2).amax(-1).amax(0)
        return x.amax(0).flatten(1).amax(1)
    x = x.movedim(dim, -1)
    units = x.shape[-1]
    group = 64 // units
    if group > 1 and x.is_contiguous() and x.numel() % (group * units) == 0:
        # A reduction over narrow rows is slow.
        return x.view(-1, group * units).amax(0).view(group, units).amax(0)
    return x.amax(list(range(x.ndim - 1)))


@dataclass(eq=False)
class _Followed:
    """The running peaks of a site."""

    name: str
    level: float
    peak: Tensor
    dead: Tensor


class _Hook:
    """Calls a function; but a copy of it, saved or not, does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __reduce__(self) -> Any:
        # Takes anything, returns None, and loads where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


Place = tuple[str, bool]
"""A module's name, and whether its output is meant rather than its input."""


class _Reader(_Hook):
    """Feeds one site from the input or the output of a module.

    Args:
        watch: Counts only while this watch is live.
        site: The site.
        dims: The dimension of its units in each call of a pass that belongs to it, by number.
        calls: How often the audit's pass called the module.
    """

    def __init__(self, watch: "Watch", site: _Followed, dims: dict[int, int], calls: int) -> None:
        self.watch, self.site, self.dims, self.calls = watch, site, dims, calls
        # All of several calls are the site's: a loop, which may have another length next time.
        self.loop = calls > 1 and list(dims.values()) == [dims[1]] * calls if 1 in dims else False
        self.count = 0
        self.strange = False
        self.handle: Any = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if not self.watch._live or Watch._auditing:
            return
        self.count += 1
        dim = self.dims.get(1 if self.loop else self.count)
        if dim is None:
            return
        x, peak = _tensor(args, output), self.site.peak
        if x is None or x.ndim < -dim or x.shape[dim] != len(peak):
            self.strange = True
        elif x.numel():
            torch.maximum(peak, channel_peak(x.detach(), dim), out=peak)

    def end(self) -> bool:
        """Tell whether the pass that ends called the module as the audit's did, or not at all."""
        usual = not self.strange and (self.loop or self.count in (0, self.calls))
        self.count, self.strange = 0, False
        return usual


def _tensor(args: tuple[Any, ...], output: tuple[Any, ...]) -> Tensor | None:
    """Return the tensor that a hook sees."""
    x = output[0] if output else args[0] if args else None
    return x if isinstance(x, Tensor) else None


class _Audit(SiteFinder):
    """Lists the sites of a pass, and for each call of one the place where a hook can read it."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if not hasattr(module, "_orig_mod")
        }
        self.found: dict[Any, tuple[_Followed, list[tuple[Place, int, int] | None]]] = {}
        self.counts: Counter[Place] = Counter()
        self._seen: dict[int, list[tuple[Place, int, Tensor, int]]] = defaultdict(list)

    def run(self, module: nn.Module, batch_size: int, args: Any, kwargs: Any) -> None:
        """Call the model, or a part of it, on a copy of its input, and leave no trace."""
        self.found.clear()
        self.counts.clear()
        handles = []
        try:
            with undisturbed(module):
                args, kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
                self.attach()
                for place in [(name, out) for name in self.modules for out in (False, True)]:
                    handles.append(self.hook(place, partial(self._see, place)))
                self.begin(batch_size, (args, kwargs))
                with self:
                    module(*args, **kwargs)
        finally:
            self.detach()
            self._seen.clear()
            for handle in handles:
                handle.close()

    def hook(
        self, place: Place, function: Callable[..., None], **options: bool
    ) -> contextlib.ExitStack:
        """Register a hook, unless it is for a part of a scripted module, which cannot have one."""
        module, stack = self.modules[place[0]], contextlib.ExitStack()
        with contextlib.suppress(RuntimeError, TypeError):
            register = (
                module.register_forward_hook if place[1] else module.register_forward_pre_hook
            )
            stack.callback(register(function, **options).remove)
        return stack

    def _see(self, place: Place, module: nn.Module, args: Any, *output: Any) -> None:
        self.counts[place] += 1
        x = _tensor(args, output)
        if x is not None:
            self._seen[_start(x)].append((place, self.counts[place], x, x._version))

    def before(self, site: Site, x: Tensor) -> None:
        """Take note of a call of a site, and of the latest place that saw its input unchanged."""
        dim = _unit_dim(site)
        if site.key not in self.found:
            wide = x.dtype if x.dtype == torch.float64 else torch.float32
            units = x.shape[dim] if dim else 0
            peak = torch.full((units,), -torch.inf, dtype=wide, device=x.device)
            dead = torch.zeros(units, dtype=torch.bool, device=x.device)
            self.found[site.key] = (_Followed("", site.kind.level, peak, dead), [])
        readings = (
            (place, call, _same_dim(x, dim, seen))
            for place, call, seen, version in reversed(self._seen[_start(x)])
            if dim and x._version == version
        )
        reading = next((reading for reading in readings if reading[2]), None)
        self.found[site.key][1].append(reading)


def _unit_dim(site: Site) -> int:
    """Return the dimension, from the end, that the units fill; 0 if they fill no single one."""
    dims = [dim for dim, parts in enumerate(site.layout) if any(role == UNIT for _, role in parts)]
    alone = len(dims) == 1 and all(role == UNIT for _, role in site.layout[dims[0]])
    return dims[0] - len(site.layout) if alone else 0


def _start(x: Tensor) -> int:
    """Return the address of the first element, or -1."""
    try:
        return x.data_ptr()
    except RuntimeError:  # sparse, or under a transform such as vmap
        return -1


def _same_dim(x: Tensor, dim: int, seen: Tensor) -> int:
    """Return the dimension in another view of the same elements, 0 if it has none."""
    if x.shape == seen.shape and x.stride() == seen.stride():
        return dim
    place = (x.shape[dim], x.stride(dim))
    same = [d for d in range(-seen.ndim, 0) if (seen.shape[d], seen.stride(d)) == place]
    return same[0] if len(same) == 1 and x.numel() == seen.numel() else 0


class Watch:
    """Follow the largest pre-activation of each unit while a model trains.

    One running peak per unit and site is kept over a *window* of steps. A unit whose peak never
    rose above the level at which its rectifier fires (0 for ReLU) was silent throughout the
    window and counts as dead. So a date of death is exact to within a window, and rests on as
    many inputs as the window had: a unit that fires on few inputs looks dead in a short window.

    Sites are found by one audit: before the first step, the model runs once more on that step's
    input, without gradients and without a trace (see :func:`relubook.units.sites.undisturbed`).
    A part that this pass left out (an expert, a layer under stochastic depth) is audited by
    itself when it is first called. Hooks then read each site's input where a module receives or
    returns it: ``nn.ReLU``, or ``F.relu(self.fc(x))``. What hooks cannot read, such as a function
    of a sum, is named in ``unfollowed`` and in a warning, and so is a module that serves several
    sites as soon as it is called more or less often than in the audit.

    A step is a forward pass of the model in training mode with gradients on, or, if an
    ``optimizer`` is given, one step of it. Under ``torch.distributed`` the peaks of all processes
    are merged by their maximum at the end of each window, so all must take as many steps; late
    parts are then named only. Autocast and ``torch.compile`` (before or inside the ``with``
    block) work. Since compiled code ignores hooks that came later, entry and exit discard
    everything that was compiled in the process. A compiled graph breaks where the model is
    entered and left, so with ``fullgraph=True`` torch raises.

    In eager execution, training with and without it gives bit-identical weights. The audit runs
    the model's own hooks once more, and changes to plain Python attributes stay. A copy of a
    watched model is not watched.

    Args:
        model: Any module. Wrappers of ``torch.compile`` and of data parallelism are looked
            through.
        window: Steps per window.
        optimizer: Count this optimizer's steps instead of forward passes. A wrapper that has the
            optimizer as its ``optimizer`` is looked through.
        unit_dim: As in :func:`relubook.units.diagnosis.diagnose`.
        batch_dim: As in :func:`relubook.units.diagnosis.diagnose`.
        process_group: Processes to merge over. Default: all.

    Attributes:
        step: Number of steps seen.
        unfollowed: Names of the sites and parts that are not followed.
        notes: What the audit could not see.

    Raises:
        TypeError: If ``model`` is no module or ``optimizer`` no optimizer.
        ValueError: If ``window`` is not positive, or (at the first step) the model calls no
            rectifier.
        AmbiguousUnitsError: At the first step, if the units of a site cannot be told.

    Example:
        >>> with Watch(model, window=100) as watch:
        ...     train(model)
        >>> watch.compute()      # which units are dead now
        >>> watch.history        # when each died, and which came back
    """

    _auditing: ClassVar[bool] = False

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
        self.batch_dim = batch_dim
        self.process_group = process_group
        self.step = 0
        self.unfollowed: list[str] = []
        self.notes: list[str] = []
        self._model = unwrapped(model)
        self._options = {"unit_dim": unit_dim, "batch_dim": batch_dim}
        self._hooks: contextlib.ExitStack | None = None
        self._audit: _Audit | None = None
        self._readers: list[_Reader] = []
        self._sites: dict[str, _Followed] = {}
        self._live = False
        self._passes: Counter[str] = Counter()
        self._inputs = 0
        self._events: list[tuple[int, int, str, list[int], Any]] = []
        self._late: dict[str, Any] = {}
        self._report: WatchReport | None = None

    # Attaching.

    def __enter__(self) -> "Watch":
        return self.attach()

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self._passes["raised"] += 1
        self.close()

    def attach(self) -> "Watch":
        """Register the hooks, as entering the ``with`` block does.

        Returns:
            Itself.

        Raises:
            RuntimeError: If it is attached already.
        """
        if self._hooks is not None:
            raise RuntimeError("this Watch is attached already")
        torch.compiler.reset()
        off = torch.compiler.disable
        self._passes.clear()
        self.unfollowed, self.notes = [], []
        self._hooks = contextlib.ExitStack()
        for handle in (
            self._model.register_forward_pre_hook(
                _Hook(off(self._begin)), with_kwargs=True, prepend=True
            ),
            self._model.register_forward_hook(_Hook(off(self._end)), always_call=True),
        ):
            self._hooks.callback(handle.remove)
        if self.optimizer is not None:
            handle = self.optimizer.register_step_post_hook(off(lambda *_: self._count_step()))
            self._hooks.callback(handle.remove)
        return self

    def close(self) -> None:
        """Remove all hooks, as leaving the ``with`` block does. What was computed stays.

        Warns and says why if no step was seen while it was attached, unless an error ended it.
        """
        if self._hooks is None:
            return
        self._hooks.close()
        self._hooks = self._audit = None
        self._readers, self._late = [], {}
        self._live = False
        torch.compiler.reset()
        passes, name = self._passes, type(self._model).__name__
        if passes["raised"] or (passes["seen"] and passes["step"]):
            return
        if passes["seen"]:
            why = "the optimizer took none; it must be the one that the training loop steps"
        elif passes["idle"]:
            why = f"each call of {name} was in evaluation mode or with gradients off"
        else:
            why = (
                f"{name} itself was not called. Watch what the training loop calls: Lightning's "
                "training_step, for one, may call parts of a module or its methods only, and "
                "code that was compiled inside the block for another model passes hooks by"
            )
        warnings.warn(f"Watch saw no step: {why}", UserWarning, stacklevel=2)

    # One forward pass.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if Watch._auditing or self._hooks is None:  # compiled code calls removed hooks as well
            return
        if not (module.training and torch.is_grad_enabled()):
            self._passes["idle"] += 1
            return
        self._inputs += self._batch_size(args, kwargs)
        self._live = True
        if self._audit is None:
            self._look(module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._live or Watch._auditing:
            return
        self._live = False
        first = not self._passes["seen"]
        missed = [r for r in self._readers if (first and not r.count) | (not r.end())]
        if output is None and sys.exc_info()[0] is not None:  # the forward pass failed
            return
        self._passes["seen"] += 1
        if missed:
            why = "it was called more or less often than in the audit, or otherwise"
            self._leave_out([reader.site.name for reader in missed], why)
        if self.optimizer is None:
            self._count_step()

    def _count_step(self) -> None:
        self._passes["step"] += 1
        self.step += 1
        if self.step % self.window == 0:
            self._close_window()

    def _batch_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        first = args[0] if args else None
        if isinstance(first, nn.utils.rnn.PackedSequence):
            return int(first.batch_sizes[0])
        if not isinstance(first, Tensor):
            first = next(iter(tensors_in((args, kwargs))), None)
        if first is None or not -first.ndim <= self.batch_dim < first.ndim:
            return 1
        return first.shape[self.batch_dim]

    # The audit.

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the sites in the model, or in a part of it, and hook them."""
        assert self._hooks is not None
        audit = self._audit or _Audit(self._model, **self._options)
        Watch._auditing = True
        try:
            audit.run(module, self._batch_size(args, kwargs), args, kwargs)
        finally:
            Watch._auditing = False
        if audit.ambiguous:
            listed = "; ".join(f"{name}: {why}" for name, why in audit.ambiguous.items())
            raise AmbiguousUnitsError(
                f"cannot tell along which dimension the units lie: {listed}. Pass "
                "unit_dim={name: dimension}, or None for one to leave out"
            )
        self.notes = list(audit.notes)
        if not audit.found and self._audit is None:
            raise ValueError("; ".join(["the model called no rectifier", *self.notes]))
        self._audit = audit
        unfollowed = []
        for key, (site, readings) in audit.found.items():
            site.name = audit.name_of(key)
            if None in readings:
                unfollowed.append(site.name)
                continue
            before = self._sites.get(site.name)
            if before is not None and before.peak.shape == site.peak.shape:
                site = before
            self._sites[site.name] = site
            places: dict[Place, dict[int, int]] = defaultdict(dict)
            for place, call, dim in filter(None, readings):
                places[place][call] = dim
            for place, dims in places.items():
                reader = _Reader(self, site, dims, audit.counts[place])
                reader.handle = self._hooks.enter_context(audit.hook(place, reader))
                self._readers.append(reader)
                if audit.modules[place[0]] is module and not place[1]:  # its call is under way
                    reader(module, args)
        if module is self._model:
            for name in audit.modules:
                late = _Hook(torch.compiler.disable(partial(self._meet, name)))
                handle = audit.hook((name, False), late, with_kwargs=True)
                self._late[name] = self._hooks.enter_context(handle)
        for name, _ in audit.counts:
            self._late.pop(name, contextlib.nullcontext()).__exit__(None, None, None)
        if unfollowed:
            self._leave_out(unfollowed, "no module receives or returns what they rectify")

    def _meet(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Audit a part that no pass has called so far."""
        if not self._live or Watch._auditing or name not in self._late:
            return
        if self._processes() == 1:
            self._look(module, args, kwargs)
        else:  # an extra pass of one process might wait for the others
            self._late.pop(name).close()
            self._leave_out([name], "the audit did not reach it")

    def _leave_out(self, names: Sequence[str], why: str) -> None:
        """Follow sites no longer, or not at all, and say so."""
        for reader in self._readers:
            if reader.site.name in names:
                reader.handle.close()
        self._readers = [r for r in self._readers if r.site.name not in names]
        self._sites = {name: site for name, site in self._sites.items() if name not in names}
        self.unfollowed += names
        listed = ", ".join(dict.fromkeys(names))
        warnings.warn(f"Watch: hooks cannot follow {listed}: {why}", UserWarning, stacklevel=2)

    # Windows.

    def _processes(self) -> int:
        here = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_world_size(self.process_group) if here else 1

    def _merge(self, inputs: int) -> int:
        """Merge the peaks of all processes, and return the number of their inputs."""
        for site in self._sites.values():
            site.peak[site.peak.isnan()] = torch.inf
        mine = {name: (site.level, site.peak.cpu()) for name, site in self._sites.items()}
        every: list[Any] = [None] * self._processes()
        torch.distributed.all_gather_object(
            every, (inputs, mine, self.unfollowed), group=self.process_group
        )
        left = {name for _, _, names in every for name in names}
        self._sites = {name: site for name, site in self._sites.items() if name not in left}
        self.unfollowed += sorted(left.difference(self.unfollowed))
        for _, sites, _ in every:
            for name, (level, peak) in sites.items():
                if name not in self._sites and name not in left:  # reached elsewhere only
                    dead = torch.zeros(len(peak), dtype=torch.bool)
                    self._sites[name] = _Followed(name, level, peak.clone(), dead)
                elif name not in left:
                    site = self._sites[name]
                    torch.maximum(site.peak, peak.to(site.peak.device), out=site.peak)
        return sum(count for count, _, _ in every)

    @torch.no_grad()
    def _close_window(self) -> None:
        inputs = self._inputs if self._processes() == 1 else self._merge(self._inputs)
        first = self.step - self.window + 1
        states = []
        for site in self._sites.values():
            silent = site.peak <= site.level
            changed = (silent != site.dead) & (site.peak != -torch.inf)
            if bool(changed.any()):
                for kind, mask in (("death", changed & silent), ("revival", changed & ~silent)):
                    units = mask.nonzero().flatten().tolist()
                    self._events += [(first, self.step, site.name, units, kind)]
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
        for state in self._report or ():
            held += [state.peak, state.dead]
        return sum(tensor.nbytes for tensor in held)
