"""Find out where in a model hooks can read what each site gets, and read its peaks there."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from relubook.units.sites import Site, SiteFinder, undisturbed

Place = tuple[str, bool]
"""The input of a module, by its name, or (if true) its output."""


@dataclass(eq=False)
class Followed:
    """A site, and the largest pre-activation of each unit since the window began.

    Attributes:
        level: Its rectifier is silent up to this pre-activation.
        peak: Shape (units,).
        dead: ``bool``, shape (units,): silent in the last window that reached it.
        name: The site's name.
        readings: Place, call (from 1) and dimension of the units in the tensor there, for each
            time that the audit's pass reached the site; ``None`` where no hook sees it.
    """

    level: float
    peak: Tensor
    dead: Tensor
    name: str = ""
    readings: list[tuple[Place, int, int] | None] = field(default_factory=list)


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


class Hook:
    """Calls a function; but a copy of it, saved or not, does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __reduce__(self) -> Any:
        # Takes anything, returns None, and loads where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Reader(Hook):
    """Feeds one site from one place.

    Args:
        watch: Nothing is read while its ``_live`` is false.
        site: The site.
        dims: The dimension of its units in each call that belongs to it, by number from 1.
        calls: How often the audit's pass called the module.
    """

    def __init__(self, watch: Any, site: Followed, dims: dict[int, int], calls: int) -> None:
        self.watch, self.site, self.dims, self.calls = watch, site, dims, calls
        # If all of several calls are the site's, they are a loop, whose length may change.
        self.loop = len(dims) == calls > 1 and len(set(dims.values())) == 1
        self.units = len(site.peak)
        # A place for the peaks of one call; in double precision it would take too much memory.
        self.now = torch.empty_like(site.peak) if site.peak.dtype == torch.float32 else None
        self.count = 0
        self.strange = False
        self.handle: Any = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if not self.watch._live or Audit.running:
            return
        self.count += 1
        dim = self.dims.get(1 if self.loop else self.count)
        if dim is None:
            return
        x = output[0] if output else args[0] if args else None
        if not isinstance(x, Tensor) or x.ndim < -dim or x.shape[dim] != self.units:
            self.strange = True
        elif x.numel():
            x, peak = x.detach(), self.site.peak
            if dim == -1 and x.ndim == 2 and self.now is not None and x.dtype is torch.float32:
                now = torch.amax(x, 0, out=self.now)  # takes less time than a new tensor
            else:
                now = channel_peak(x, dim)
            torch.maximum(peak, now, out=peak)

    def end(self) -> bool:
        """Tell whether the pass that ends called the module as the audit's did, or not at all."""
        usual = not self.strange and (self.loop or self.count in (0, self.calls))
        self.count, self.strange = 0, False
        return usual


class Audit(SiteFinder):
    """Lists the sites of a pass, with their readings.

    Attributes:
        modules: Those that can have hooks, by name.
        found: Sites by key, in the order of their first calls.
        counts: How often each place was passed.
        running: Whether any audit's pass is under way, which no watch may count.
    """

    running: ClassVar[bool] = False

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if not hasattr(module, "_orig_mod") and not isinstance(module, torch.jit.ScriptModule)
        }
        self.found: dict[Any, Followed] = {}
        self.counts: Counter[Place] = Counter()
        self._seen: dict[int, list[tuple[Place, int, Tensor, int]]] = defaultdict(list)

    def run(self, module: nn.Module, batch_size: int, args: Any, kwargs: Any) -> None:
        """Call the model, or a part of it, on a copy of its input, and leave no trace."""
        self.found.clear()
        self.counts.clear()
        handles = []
        Audit.running = True
        try:
            with undisturbed(module):
                args, kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
                self.attach()
                for place in [(name, output) for name in self.modules for output in (False, True)]:
                    handles.append(self.hook(place, partial(self._see, place)))
                self.begin(batch_size, (args, kwargs))
                with self:
                    module(*args, **kwargs)
        finally:
            Audit.running = False
            self.detach()
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def hook(self, place: Place, function: Callable[..., None]) -> Any:
        """Register a hook at a place, and return its handle."""
        module = self.modules[place[0]]
        if place[1]:
            return module.register_forward_hook(function)
        return module.register_forward_pre_hook(function)

    def _see(self, place: Place, module: nn.Module, args: Any, *output: Any) -> None:
        self.counts[place] += 1
        x = output[0] if output else args[0] if args else None
        if isinstance(x, Tensor):
            self._seen[_address(x)].append((place, self.counts[place], x, x._version))

    def before(self, site: Site, x: Tensor) -> None:
        """Note a call of a site, and the latest place that saw its input as it is now."""
        # 0 where the units are spread over several dimensions.
        dim = site.dims[0] - x.ndim if len(site.dims) == 1 and site.order is None else 0
        if site.key not in self.found:
            wide = x.dtype if x.dtype == torch.float64 else torch.float32
            units = x.shape[dim] if dim else 0
            peak = torch.full((units,), -torch.inf, dtype=wide, device=x.device)
            dead = torch.zeros(units, dtype=torch.bool, device=x.device)
            self.found[site.key] = Followed(site.kind.level, peak, dead)
        reading = None
        for place, call, seen, version in reversed(self._seen[_address(x)]):
            there = _same_dim(x, dim, seen) if dim and x._version == version else 0
            if there:
                reading = (place, call, there)
                break
        self.found[site.key].readings.append(reading)


def _address(x: Tensor) -> int:
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
