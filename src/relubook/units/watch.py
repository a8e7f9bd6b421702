"""Watch the units of a model while it trains, cheaply, and date their deaths and revivals."""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from relubook.units.report import SiteListing, plain_table
from relubook.units.sites import (
    UNIT,
    AmbiguousUnitsError,
    Layout,
    Site,
    SiteFinder,
    call_path,
    classify,
    is_compiled,
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
        kind: ``"death"`` or ``"revival"``. Units that are silent throughout the first window
            count as deaths at step 1.
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
        nonfinite: ``bool``, shape (units,): the window's peak was NaN or infinity. NaN is not
            silence.
    """

    name: str
    dead: Tensor
    peak: Tensor
    nonfinite: Tensor

    @property
    def units(self) -> int:
        """Number of units."""
        return self.dead.numel()

    @property
    def dead_fraction(self) -> float:
        """Share of dead units."""
        return int(self.dead.sum()) / max(self.units, 1)

    def tallies(self) -> tuple[int, int]:
        """Return the numbers of dead and of non-finite units."""
        return int(self.dead.sum()), int(self.nonfinite.sum())


@dataclass(frozen=True, eq=False, repr=False)
class WatchReport(SiteListing[WatchedSite]):
    """The state of all sites at the end of the last whole window.

    Attributes:
        sites: One :class:`WatchedSite` per site that is followed.
        step: Last step of the window.
        window: Number of steps in it.
        inputs: Number of inputs in it, over all processes.
        unfollowed: Sites that are not followed.
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
        header = ["site", "units", "dead", "non-finite"]
        rows = [
            [site.name, *(f"{int(count):,}" for count in (site.units, *site.tallies()))]
            for site in self.sites
        ]
        lines = plain_table([header, *rows])
        first = self.step - self.window + 1
        lines.append(f"Steps {first} to {self.step}, n = {self.inputs:,} inputs.")
        for site in self.sites:
            if site.units and bool(site.dead.all()):
                lines.append(f"DEAD LAYER: all {site.units} units of {site.name} are dead.")
        if self.unfollowed:
            lines.append(f"Not followed: {', '.join(self.unfollowed)}.")
        return "\n".join(lines)


class _Followed:
    """A site's place in the buffer of running peaks."""

    def __init__(self, name: str, level: float, units: int) -> None:
        self.name = name
        self.level = level
        self.units = units
        self.dim = 0
        self.layout: Layout = ()
        self.peak = torch.empty(0)
        self.now = torch.empty(0)
        self.last = torch.empty(0)
        self.dead = torch.empty(0, dtype=torch.bool)

    def update(self, x: Tensor) -> None:
        """Take the peaks of one more tensor; they join the window's when the step ends."""
        now = self.now
        if self.dim == -1 and x.ndim == 2 and x.dtype is now.dtype and len(x):
            torch.amax(x.detach(), 0, out=now)
        elif x.numel():
            x = x.detach()
            peak = channel_peak(x, self.dim) if self.dim else factored_peak(x, self.layout)
            torch.maximum(now, peak, out=now)


def factored_peak(x: Tensor, layout: Layout) -> Tensor:
    """Return the largest value of each unit, where units are spread over several dimensions.

    Args:
        x: As many dimensions as the layout; those without units may have another size.
        layout: Factors of each dimension.

    Returns:
        Shape (units,), in row-major order.
    """
    sizes: list[int] = []
    rest: list[int] = []
    for dim, factors in enumerate(layout):
        if not any(role == UNIT for _, role in factors):
            factors = ((x.shape[dim], "position"),)
        for size, role in factors:
            if role != UNIT:
                rest.append(len(sizes))
                if sum(other != UNIT for _, other in factors) == 1:
                    size = x.shape[dim] // math.prod(s for s, other in factors if other == UNIT)
            sizes.append(size)
    x = x.reshape(sizes)
    return (x.amax(rest) if rest else x).reshape(-1)


def channel_peak(x: Tensor, dim: int) -> Tensor:
    """Return the largest value along every other dimension, in one pass over the memory.

    Args:
        x: Any shape, not empty.
        dim: The dimension to keep, counted from the end: negative.

    Returns:
        Shape ``(x.shape[dim],)``. NaN where there was one.
    """
    ndim = x.ndim
    if dim == -1:
        return x.amax(0) if ndim == 2 else x.reshape(-1, x.shape[-1]).amax(0) if ndim > 1 else x
    dim += ndim
    if dim == 1 and x.is_contiguous():
        # Reduce first along what is long enough to be fast.
        if x[0, 0].numel() >= 64:
            return x.flatten(2).amax(-1).amax(0)
        return x.amax(0).flatten(1).amax(1)
    moved = x.movedim(dim, -1)
    if moved.is_contiguous():
        flat = moved.reshape(-1, moved.shape[-1])
        rows, units = flat.shape
        group = 64 // units if units else 0
        if group > 1 and rows % group == 0:  # a reduction over narrow rows is slow
            return flat.view(-1, group * units).amax(0).view(group, units).amax(0)
        return flat.amax(0)
    return x.amax([other for other in range(ndim) if other != dim])


class _Audit(SiteFinder):
    """Lists the sites of one pass in order."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.found: dict[tuple[Any, ...], tuple[Site, int, torch.dtype, torch.device]] = {}
        self._nth: Counter[str] = Counter()

    def begin(self, batch_size: int, inputs: Any) -> None:
        self._nth.clear()
        super().begin(batch_size, inputs)

    def before(self, site: Site, x: Tensor) -> None:
        self._nth[site.module] += 1
        self.found.setdefault(site.key, (site, self._nth[site.module], x.dtype, x.device))


class _Follower(TorchFunctionMode):
    """Sees the functions that hooks cannot, and feeds those sites."""

    def __init__(self, watch: "Watch") -> None:
        super().__init__()
        self.watch = watch
        self.calls: Counter[Any] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = FUNCTIONS.get(getattr(func, "__name__", ""))
        if operator is not None:
            self.watch._follow_function(self.calls, operator, args, kwargs)
        return func(*args, **kwargs)


FUNCTIONS = {
    "relu": ("relu", ("self",)),
    "relu_": ("relu", ("self",)),
    "relu6": ("relu6", ("self",)),
    "relu6_": ("relu6", ("self",)),
    "clamp": ("clamp", ("self", "min", "max")),
    "clamp_": ("clamp", ("self", "min", "max")),
    "clip": ("clamp", ("self", "min", "max")),
    "clip_": ("clamp", ("self", "min", "max")),
    "clamp_min": ("clamp_min", ("self", "min")),
    "clamp_min_": ("clamp_min", ("self", "min")),
    "threshold": ("threshold", ("self", "threshold", "value")),
    "threshold_": ("threshold", ("self", "threshold", "value")),
    "_threshold": ("threshold", ("self", "threshold", "value")),
    "hardtanh": ("hardtanh", ("self", "min_val", "max_val")),
    "hardtanh_": ("hardtanh", ("self", "min_val", "max_val")),
    "hardswish": ("hardswish", ("self",)),
    "hardswish_": ("hardswish", ("self",)),
    "maximum": ("maximum", ("self", "other")),
}
"""Python functions by name: the operator behind each, and its arguments' names."""


MOST_AUDITS = 3
"""How often a call that no audit has seen leads to one more."""


class Watch:
    """Follow the largest pre-activation of each unit while a model trains.

    One running peak per unit and site is kept over a *window* of steps. A unit whose peak never
    rose above the level at which its rectifier fires (0 for ReLU) was silent throughout the
    window and counts as dead. So a date of death is exact to within a window, and rests on as
    many inputs as the window had: a unit that fires on few inputs looks dead in a short window.

    Sites are found by one audit: before the first step, the model runs once more on that step's
    input, without gradients and without a trace (see :func:`relubook.units.sites.undisturbed`).
    Hooks then follow modules such as ``nn.ReLU``, and functions such as ``F.relu`` that get a
    module's output as it is, ``F.relu(self.fc(x))``. Other calls, such as the ReLU after a sum in
    a functional residual block, are named in ``unfollowed`` and in a warning;
    ``functional="follow"`` follows them too, by a function mode that slows every call down.

    A step is a forward pass of the model in training mode with gradients on, or, if an
    ``optimizer`` is given, one step of it. Under ``torch.distributed`` the peaks of all processes
    are merged by their maximum at the end of each window, so all must take as many steps.
    Autocast and ``torch.compile`` (applied before or inside the ``with`` block) work. A compiled
    graph breaks where the model is entered and left, so with ``fullgraph=True`` torch raises. If
    the model is compiled already, everything that was compiled in the process is discarded on
    entry and on exit, since torch ignores hooks that come after the first call.

    In eager execution, training with and without it gives bit-identical weights. The audit runs
    the model's own hooks once more, and changes to plain Python attributes stay.

    Args:
        model: Any module. Wrappers of ``torch.compile`` and of data parallelism are looked
            through.
        window: Steps per window.
        functional: What to do about sites that hooks cannot follow: ``"warn"``, ``"follow"``,
            ``"ignore"`` or ``"raise"``.
        optimizer: Count this optimizer's steps instead of forward passes.
        unit_dim: As in :func:`relubook.units.diagnosis.diagnose`.
        batch_dim: As in :func:`relubook.units.diagnosis.diagnose`.
        process_group: Processes to merge over. Default: all.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If ``window`` is not positive, ``functional`` is none of the above, or (at the
            first step) the model calls no rectifier.
        AmbiguousUnitsError: At the first step, if the units of a site cannot be told.
        RuntimeError: At the first step, with ``functional="raise"``, if a site cannot be followed.

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
        functional: Literal["warn", "follow", "ignore", "raise"] = "warn",
        optimizer: torch.optim.Optimizer | None = None,
        unit_dim: int | Mapping[str, int | None] | None = None,
        batch_dim: int = 0,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
        if window < 1:
            raise ValueError(f"window is a number of steps, at least 1, not {window}")
        if functional not in ("warn", "follow", "ignore", "raise"):
            raise ValueError(
                f"functional is 'warn', 'follow', 'ignore' or 'raise', not {functional!r}"
            )
        self.window = window
        self.functional = functional
        self.optimizer = optimizer
        self.unit_dim = unit_dim
        self.batch_dim = batch_dim
        self.process_group = process_group
        self.unfollowed: list[str] = []
        self.notes: list[str] = []
        self._outer = model
        self._model = unwrapped(model)
        self._handles: list[Any] = []
        self._live = False
        self._auditing = False
        self._audited = False
        self._step = 0
        self._inputs = 0
        self._window_inputs = 0
        self._closed = 0
        self._closed_steps = 0
        self._window_start = 0
        self._sites: list[_Followed] = []
        self._flats: list[tuple[Tensor, Tensor]] = []
        self._calls: list[list[int]] = []
        self._events: list[tuple[int, int, str, Tensor, Literal["death", "revival"]]] = []
        self._site_handles: list[Any] = []
        self._finder: _Audit | None = None
        self._audits = 0
        self._checked = False
        self._entered = False
        self._follower: _Follower | None = None
        self._by_path: dict[tuple[Any, ...], _Followed] = {}
        self._known_paths: set[tuple[Any, ...]] = set()
        self._ignored_paths: set[tuple[Any, ...]] = set()
        self._boundary: Any = None

    # Attaching.

    def __enter__(self) -> "Watch":
        return self.attach()

    def __exit__(self, *error: object) -> None:
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
        if is_compiled(self._outer):
            torch.compiler.reset()
        try:
            self._handles.append(
                self._model.register_forward_pre_hook(
                    torch.compiler.disable(self._begin), with_kwargs=True, prepend=True
                )
            )
            self._handles.append(
                self._model.register_forward_hook(
                    torch.compiler.disable(self._end), always_call=True
                )
            )
            if self.optimizer is not None:
                self._handles.append(
                    self.optimizer.register_step_post_hook(
                        torch.compiler.disable(lambda *_: self._count_step())
                    )
                )
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Remove all hooks, as leaving the ``with`` block does. What was computed stays."""
        self._leave_mode()
        attached = bool(self._handles)
        for handles in (self._site_handles, self._handles):
            while handles:
                handles.pop().remove()
        self._live = self._audited = False
        self._audits = 0
        self._finder = self._follower = None
        if attached and is_compiled(self._outer):
            torch.compiler.reset()

    # One forward pass.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        idle = self._auditing or not self._handles  # compiled code calls removed hooks as well
        if idle or not (module.training and torch.is_grad_enabled()):
            return
        if not self._audited:
            self._audit(args, kwargs)
        for calls in self._calls:
            calls[0] = 0
        first = args[0] if args else None
        if type(first) is Tensor and self.batch_dim == 0 and first.ndim:
            self._inputs += len(first)
        else:
            self._inputs += self._batch_size(args, kwargs)
        self._live = True
        if self._follower is not None:
            self._enter_mode()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._live:
            return
        self._live = False
        if self._follower is not None:
            self._leave_mode()
        for flat, now in self._flats:
            if flat is not now:
                torch.maximum(flat, now, out=flat)
        if output is None and sys.exc_info()[0] is not None:  # the forward pass failed
            return
        if not self._checked:
            self._check_reached()
        if self.optimizer is None:
            self._step += 1
            if self._step - self._window_start >= self.window:
                self._close_window()

    def _count_step(self) -> None:
        self._step += 1
        if self._step - self._window_start >= self.window:
            self._close_window()

    def _batch_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            if isinstance(first, nn.utils.rnn.PackedSequence):
                return int(first.batch_sizes[0])
            first = next(iter(tensors_in((args, kwargs))), None)
        if first is None or not -first.ndim <= self.batch_dim < first.ndim:
            return 1
        return first.shape[self.batch_dim]

    # The audit.

    def _audit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._finder is None:
            self._finder = _Audit(self._model, unit_dim=self.unit_dim, batch_dim=self.batch_dim)
        audit = self._finder
        self._auditing = True
        try:
            with undisturbed(self._model):
                inputs, options = _cloned((args, kwargs))
                audit.attach()
                audit.begin(self._batch_size(args, kwargs), (inputs, options))
                with audit:
                    self._model(*inputs, **options)
        finally:
            self._auditing = False
            audit.detach()
        if audit.ambiguous:
            listed = "; ".join(f"{name}: {why}" for name, why in audit.ambiguous.items())
            raise AmbiguousUnitsError(
                f"cannot tell along which dimension the units lie: {listed}. Pass "
                "unit_dim={name: dimension}, or None for one to leave out"
            )
        if not audit.found:
            raise ValueError("; ".join(["the model called no rectifier", *audit.notes]))
        self.notes = list(audit.notes)
        self._follow(audit)
        self._audited = True
        self._checked = False
        self._audits += 1

    def _follow(self, audit: _Audit) -> None:
        while self._site_handles:
            self._site_handles.pop().remove()
        self._calls.clear()
        by_hook: dict[tuple[str, bool], dict[int, _Followed]] = {}
        by_path: dict[tuple[Any, ...], _Followed] = {}
        placed: list[tuple[_Followed, torch.dtype, torch.device]] = []
        kept = {site.name: site for site in self._sites}
        self.unfollowed = []
        for key, (site, nth, dtype, device) in audit.found.items():
            factors = [factor for dim in site.layout for factor in dim if factor[1] == UNIT]
            size = math.prod(size for size, _ in factors)
            dims = [dim for dim, parts in enumerate(site.layout) if parts == (*factors,)]
            simple = len(factors) == 1 and len(dims) == 1
            name = audit.name_of(key)
            followed = kept.get(name)
            if followed is None or followed.units != size:
                followed = _Followed(name, site.kind.level, size)
            followed.dim = dims[0] - len(site.layout) if simple else 0
            followed.layout = site.layout
            slot: dict[int, _Followed] | None = None
            if not site.function and not site.recurrent:
                module = audit._modules[site.module]
                if type(module).__module__ == nn.ReLU.__module__:
                    slot = by_hook.setdefault((site.module, True), {})
            if slot is None and site.direct and site.call and site.producer and simple:
                slot = by_hook.setdefault((site.producer, False), {})
                followed.dim = site.source_dim
                nth = site.call
            if slot is not None and nth not in slot:
                slot[nth] = followed
            elif self.functional == "follow" and not site.recurrent and key[1]:
                by_path[key[1:]] = followed
                followed.dim = dims[0] - len(site.layout) if simple else 0
            else:
                self.unfollowed.append(name)
                continue
            placed.append((followed, dtype, device))
        if self.unfollowed and self.functional == "raise":
            raise RuntimeError(self._unfollowed_message())
        self._place(placed)
        for (name, is_input), sites in by_hook.items():
            self._hook(audit._modules[name], sites, is_input)
        self._by_path = by_path
        self._ignored_paths = audit.ignored
        self._known_paths = {key[1:] for key in audit._ranks}
        self._follower = _Follower(self) if by_path else None
        if self.unfollowed and self.functional in ("warn", "follow"):
            warnings.warn(self._unfollowed_message(), UserWarning, stacklevel=2)

    def _check_reached(self) -> None:
        """Make sure, once after an audit, that no site that it saw is followed in vain."""
        self._checked = True
        missed = [site.name for site in self._sites if bool((site.peak == -torch.inf).all())]
        if missed and self._audits == 1:
            self.unfollowed += missed
            self._sites = [site for site in self._sites if site.name not in missed]
            if self.functional == "raise":
                raise RuntimeError(self._unfollowed_message())
            if self.functional != "ignore":
                warnings.warn(self._unfollowed_message(), UserWarning, stacklevel=2)

    def _surprise(self, name: str) -> None:
        """Take note of a call that the audit did not see, and audit again at the next step."""
        if self._audits <= MOST_AUDITS:
            self._audited = False
        elif name not in self.unfollowed:
            self.unfollowed.append(name)
            if self.functional != "ignore":
                warnings.warn(self._unfollowed_message(), UserWarning, stacklevel=2)

    def _unfollowed_message(self) -> str:
        hint = "" if self.functional == "follow" else "; functional='follow' can, at a cost"
        return f"Watch: hooks cannot follow {', '.join(self.unfollowed)}{hint}"

    def _place(self, placed: list[tuple[_Followed, torch.dtype, torch.device]]) -> None:
        """Give every site its part of one buffer per device and type."""
        groups: dict[tuple[torch.device, torch.dtype], list[_Followed]] = {}
        for site, dtype, device in placed:
            wide = dtype if dtype == torch.float64 else torch.float32
            groups.setdefault((device, wide), []).append(site)
        self._flats = []
        for (device, dtype), sites in groups.items():
            sizes = [site.units for site in sites]
            flat = torch.full((sum(sizes),), -torch.inf, dtype=dtype, device=device)
            # One maximum a step for all sites together; in float64 it would cost too much memory.
            now = flat.clone() if dtype == torch.float32 else flat
            self._flats.append((flat, now))
            parts = zip(sites, flat.split(sizes), now.split(sizes), strict=True)
            for site, part, current in parts:
                if site.peak.numel() == site.units:
                    part.copy_(site.peak)
                else:
                    site.last = torch.full_like(part, -torch.inf, dtype=torch.float32)
                    site.dead = torch.zeros(site.units, dtype=torch.bool, device=device)
                site.peak, site.now = part, current
        self._sites = [site for site, _, _ in placed]

    def _hook(self, module: nn.Module, sites: Mapping[int, _Followed], is_input: bool) -> None:
        calls = [0]
        self._calls.append(calls)
        updates = {call: site.update for call, site in sites.items()}
        name = next(iter(sites.values())).name

        def follow(x: Tensor) -> None:
            calls[0] += 1
            update = updates.get(calls[0])
            if update is not None:
                update(x)
            elif is_input:
                self._surprise(f"{name} (call {calls[0]})")

        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._live and args:
                follow(args[0])
            elif self._live:
                self._surprise(f"{name} (called by keyword)")

        def post_hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._live:
                follow(output)

        flat = sites[1] if list(sites) == [1] and sites[1].dim == -1 else None
        if flat is not None and is_input:  # the usual case, with the least overhead
            now, dtype, amax = flat.now, flat.now.dtype, torch.amax

            def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if self._live:
                    if not args:
                        self._surprise(f"{name} (called by keyword)")
                        return
                    x = args[0]
                    if calls[0] or x.ndim != 2 or x.dtype is not dtype or not len(x):
                        follow(x)
                    else:
                        calls[0] = 1
                        amax(x.detach(), 0, out=now)

        if is_input:
            handle = module.register_forward_pre_hook(pre_hook)
        else:
            handle = module.register_forward_hook(post_hook)
        self._site_handles.append(handle)

    # Sites that hooks cannot follow.

    def _enter_mode(self) -> None:
        assert self._follower is not None
        self._follower.calls.clear()
        frame = sys._getframe(2)
        while frame.f_code.co_filename == __file__ or "eval_frame" in frame.f_code.co_filename:
            assert frame.f_back is not None
            frame = frame.f_back
        self._boundary = frame
        self._follower.__enter__()
        self._entered = True

    def _leave_mode(self) -> None:
        if self._follower is not None and self._entered:
            self._entered = False
            self._boundary = None
            self._follower.__exit__(None, None, None)

    def _follow_function(
        self,
        counter: Counter[Any],
        function: tuple[str, tuple[str, ...]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        operator, names = function
        bound = dict(zip(names, args, strict=False)) | {
            "self" if name == "input" else name: value for name, value in kwargs.items()
        }
        if not self._live or classify(operator, bound) is None:
            return
        x = bound["self"]
        if operator == "maximum" and bool((x == 0).all()):
            x = bound["other"]
        if not x.is_floating_point():
            return
        path, location = call_path(sys._getframe(2), self._boundary)
        counter[path] += 1
        key = (path, counter[path])
        site = self._by_path.get(key)
        if site is not None:
            site.update(x)
        elif key not in self._known_paths and path not in self._ignored_paths:
            self._surprise(f"{operator}() at {location}")

    # Windows.

    @torch.no_grad()
    def _close_window(self) -> None:
        inputs = self._inputs
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size(self.process_group) > 1:
            for flat, _ in self._flats:
                flat.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
                torch.distributed.all_reduce(
                    flat, torch.distributed.ReduceOp.MAX, group=self.process_group
                )
            device = self._flats[0][0].device if self._flats else "cpu"
            total = torch.tensor(inputs, device=device)
            torch.distributed.all_reduce(total, group=self.process_group)
            inputs = int(total)
        first = self._window_start + 1
        for site in self._sites:
            peak = site.peak
            reached = peak != -torch.inf
            silent = peak <= site.level
            died = silent & ~site.dead & reached
            revived = ~silent & site.dead
            changed = died | revived
            if bool(changed.any()):
                for mask, kind in ((died, "death"), (revived, "revival")):
                    units = mask.nonzero().flatten().cpu()
                    if units.numel():
                        self._events.append((first, self._step, site.name, units, kind))  # type: ignore[arg-type]
                site.dead ^= changed
            site.last.copy_(peak)
        self._clear()
        self._window_inputs = inputs
        self._closed = self._step
        self._closed_steps = self._step - self._window_start
        self._window_start = self._step
        self._inputs = 0

    def _clear(self) -> None:
        for flat, now in self._flats:
            flat.fill_(-torch.inf)
            now.fill_(-torch.inf)

    def compute(self) -> WatchReport:
        """Return the state at the end of the last whole window.

        Under ``torch.distributed`` it is the same on every process, and nothing is sent.

        Returns:
            The report; ``print`` shows it as a table.

        Raises:
            RuntimeError: If no window is complete yet.
        """
        if not self._closed:
            raise RuntimeError(
                f"no window of {self.window} steps is complete: {self._step} steps were seen. "
                "Is the model in training mode, called with gradients on, inside the with block?"
            )
        sites = [
            WatchedSite(
                site.name,
                site.dead.cpu(),
                site.last.cpu(),
                (site.last.isnan() | (site.last == torch.inf)).cpu(),
            )
            for site in self._sites
        ]
        return WatchReport(
            sites, self._closed, self._closed_steps, self._window_inputs, list(self.unfollowed)
        )

    def reset(self) -> None:
        """Forget peaks, deaths, the history and the step count; stay attached."""
        self._step = self._inputs = self._window_inputs = 0
        self._closed = self._closed_steps = self._window_start = 0
        self._events.clear()
        self._clear()
        for site in self._sites:
            site.dead.zero_()
            site.last.fill_(-torch.inf)

    @property
    def step(self) -> int:
        """Number of steps seen."""
        return self._step

    @property
    def history(self) -> list[Event]:
        """Deaths and revivals, in the order of their windows."""
        return [
            Event(first, last, name, unit, kind)
            for first, last, name, units, kind in self._events
            for unit in units.tolist()
        ]

    def nbytes(self) -> int:
        """Return the bytes held for all units, without the history."""
        held = [site.last for site in self._sites] + [site.dead for site in self._sites]
        for flat, now in self._flats:
            held += [flat] if flat is now else [flat, now]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _cloned(value: Any) -> Any:
    """Copy the tensors in nested containers, so that the audit may change them in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cloned(item) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_cloned(item) for item in value)
    if type(value) is dict:
        return {key: _cloned(item) for key, item in value.items()}
    return value
