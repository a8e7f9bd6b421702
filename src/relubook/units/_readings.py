"""Find out where in a model hooks can read what each site gets, and read its peaks there."""

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, amax, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map_only

from relubook.units._kinds import LONG, Site, by_unit
from relubook.units.sites import SiteFinder

Place = tuple[str, bool]  # the input of a module, by its name, or (if true) its output


@dataclass(eq=False)
class Followed:
    """A site, and the largest pre-activation of each unit since the window began."""

    level: float  # its rectifier is silent up to this pre-activation
    peak: Tensor  # (units,)
    dead: Tensor  # bool, (units,), on the CPU: silent in the last window that reached it
    name: str = ""
    # For each place that feeds it, and each call there (from 1) that does, the dimension of the
    # units in the tensor, counted from the end.
    ways: dict[Place, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    unread: bool = False  # whether a call was fed from where no hook sees it
    fires: Callable[[Tensor, Tensor], Tensor] | None = None  # if its output is read, not its input
    latest: Tensor | None = None  # (units,): peaks of the last pass, which ``Peaks`` merges


class Peaks:
    """Peaks of all sites side by side, so that one call merges what a pass read."""

    def __init__(self, sites: Iterable[Followed]) -> None:
        self.rows: list[Sequence[Tensor]] = []  # for each device: peaks, and the latest
        alike = defaultdict[Any, list[Followed]](list)
        for site in sites:
            if site.peak.dtype == torch.float32:
                alike[site.peak.device].append(site)
        for group in alike.values():
            peaks = torch.cat([site.peak for site in group])
            latest = torch.full_like(peaks, -torch.inf)
            sizes = [len(site.peak) for site in group]
            for site, *views in zip(group, peaks.split(sizes), latest.split(sizes), strict=True):
                site.peak, site.latest = views
            self.rows.append((peaks, latest))

    def merge(self) -> None:
        """Take the latest peaks into the window's."""
        for peaks, latest in self.rows:
            torch.maximum(peaks, latest, out=peaks)


class Hook:
    """Calls a function, never compiled; but a copy of it, saved or not, does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.eager = function, torch.compiler.disable(function)

    def __call__(self, *args: Any) -> None:
        # The wrapper takes longer than this question.
        (self.eager if is_compiling() else self.function)(*args)

    def __reduce__(self) -> Any:
        # Takes anything, returns None, and loads where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Reader(Hook):
    """Feeds one site from one place, while the watch's ``_live`` is true."""

    def __init__(self, watch: Any, site: Followed, place: Place, audit: "Audit") -> None:
        self.watch, self.site, self.ways = watch, site, site.ways[place]
        self.calls, self.units = audit.counts[place], len(site.peak)
        # If all of several calls are the site's, they are a loop, whose length may change.
        self.loop = len(self.ways) == self.calls > 1 and len(set(self.ways.values())) == 1
        # What a single call a pass reads can wait for the merge of all sites at its end.
        alone = len(site.ways) == self.calls == 1 and site.fires is None
        self.latest = site.latest if alone else None
        self.shape: Any = None  # of an input that one reduction, over ``dims``, is fast for
        self.dims: tuple[int, ...] = ()
        self.count = 0
        self.strange = False
        self.handle = audit.hook(place, self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if not self.watch._live or Audit.running:
            return
        self.count += 1
        x: Any = output[0] if output else args[0] if args else None
        latest = self.latest
        fits = isinstance(x, Tensor) and x.shape == self.shape
        if fits and latest is not None and self.count == 1 and x.dtype == latest.dtype:
            amax(x.detach(), self.dims, out=latest)
        else:
            self.read(x)

    def read(self, x: Any) -> None:
        """Take into the peaks what a call is given, whatever it is."""
        way, site = self.ways.get(1 if self.loop else self.count), self.site
        if way is None:
            return
        if not isinstance(x, Tensor) or x.ndim < -way or x.shape[way] != self.units:
            self.strange = True
        elif x.numel():
            long = x.is_contiguous() and x.shape[2:].numel() >= LONG
            if x.ndim + way == 1 and (x.ndim == 2 or long):
                self.shape, self.dims = x.shape, (0, *range(2, x.ndim))
            x = x.detach()
            if site.fires is not None:
                x = x.abs() * site.fires(x, x)
            torch.maximum(site.peak, by_unit(x, way), out=site.peak)

    def usual(self) -> bool:
        """Tell whether the pass called the module as the audit's did, or not at all."""
        return not self.strange and (self.loop or self.count in (0, self.calls))


class Audit(SiteFinder):
    """Lists the sites of a pass, and where hooks can read them."""

    running: ClassVar[bool] = False  # any audit's pass, which no watch may count

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        scripted = torch.jit.ScriptModule
        # Those that can have hooks, by name.
        self.modules = {k: m for k, m in self._modules.items() if not isinstance(m, scripted)}
        self.found: dict[Any, Followed] = {}  # by key, in the order of their first calls
        self.counts: Counter[Place] = Counter()  # how often each place was passed
        self._seen: dict[int, list[tuple[Place, int, Tensor, int]]] = defaultdict(list)
        self._outputs: list[tuple[Site, Tensor, int]] = []  # those that places will see

    def run(self, module: nn.Module, batch_size: int, args: Any, kwargs: Any) -> None:
        """Call the model, or a part of it, on a copy of its input, and leave no trace."""
        Audit.running = True
        try:
            with self.attached(module):
                args, kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
                self.begin(batch_size, (args, kwargs))
                with self:
                    module(*args, **kwargs)
            for output in self._outputs:
                self._find(*output)
        finally:
            Audit.running = False
            self._seen.clear()
            self._outputs.clear()

    def attach(self) -> None:
        super().attach()
        for place in [(name, output) for name in self.modules for output in (False, True)]:
            self._handles.append(self.hook(place, partial(self._see, place)))

    def hook(self, place: Place, function: Callable[..., None]) -> Any:
        module = self.modules[place[0]]
        register = module.register_forward_hook if place[1] else module.register_forward_pre_hook
        return register(function)

    def _see(self, place: Place, module: nn.Module, args: Any, *output: Any) -> None:
        self.counts[place] += 1
        x = output[0] if output else args[0] if args else None
        if isinstance(x, Tensor):
            self._seen[_address(x)].append((place, self.counts[place], x, x._version))

    def before(self, site: Site, x: Tensor) -> None:
        """Note a call of a site, and the latest place that saw its input as it is now."""
        if site.kind.dim is not None:
            return self._note("Which pieces of maxout win is not followed: diagnose counts it.")
        band = site.kind.level == -math.inf
        if site.key not in self.found:
            wide = x.dtype if x.dtype == torch.float64 else torch.float32
            peak = torch.full((site.units,), -torch.inf, dtype=wide, device=x.device)
            dead = torch.zeros(site.units, dtype=torch.bool, device="cpu")
            self.found[site.key] = Followed(0.0 if band else site.kind.level, peak, dead)
            self.found[site.key].fires = site.kind.fires if band else None
        if not band:
            self._find(site, x, x._version)

    def observe(self, site: Site, x: Tensor, out: Tensor) -> None:
        if site.kind.level == -math.inf:
            self._outputs.append((site, out, out._version))

    def _find(self, site: Site, x: Tensor, version: int) -> None:
        followed = self.found[site.key]
        for place, call, seen, then in reversed(self._seen[_address(x)]):
            way = _way(site, x, seen) if then == version else None
            if way is not None:
                followed.ways[place][call] = way
                return
        followed.unread = True


def _address(x: Tensor) -> int:
    try:
        return x.data_ptr()
    except RuntimeError:  # sparse, or under a transform such as vmap
        return -1


def _way(site: Site, x: Tensor, seen: Tensor) -> int | None:
    """Return the dimension of a site's units in another view of its input; ``None`` if unknown."""
    if len(site.dims) != 1 or site.order is not None:
        return None
    dim = site.dims[0]
    if x.shape == seen.shape and x.stride() == seen.stride():
        return dim - x.ndim
    place = (x.shape[dim], x.stride(dim))
    same = [d for d in range(-seen.ndim, 0) if (seen.shape[d], seen.stride(d)) == place]
    return same[0] if len(same) == 1 and x.numel() == seen.numel() else None
