"""Which units of any model are dead, and on how many inputs that verdict rests."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from operator import methodcaller
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, IterableDataset

from relubook.units._kinds import Activations
from relubook.units.report import Report, SiteReport, silence_bound
from relubook.units.sites import AmbiguousUnitsError, Site, SiteFinder, tensors_in, unwrapped

__all__ = ["AmbiguousUnitsError", "Report", "SiteReport", "diagnose", "silence_bound"]

FORWARD = "forward=lambda model, batch: ..."
EXACT = 2**24  # up to here float32 counts exactly, and several times faster than integers


@dataclass
class _Pass:
    """One pass over one batch, at one site."""

    sites: list[Site] = field(default_factory=list)  # the calls whose inputs can be told apart
    fired: Any = None  # how often: by input of the batch and unit
    loose: Any = 0  # how often in calls whose inputs cannot be told apart, if any: by unit
    seen: int = 0  # number of values per unit


class _Counter(SiteFinder):
    """Counts at every site how often each unit fires."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.counts: dict[tuple[Any, ...], SiteReport] = {}
        self._low: dict[tuple[Any, ...], Tensor] = {}  # smallest pre-activation of each unit
        self._now: dict[tuple[Any, ...], _Pass] = defaultdict(_Pass)

    def before(self, site: Site, x: Tensor) -> None:
        x = x.detach()
        if site.key not in self.counts:
            self.counts[site.key] = self._fresh(site, x)
        count = self.counts[site.key]
        count.calls += 1
        now = self._now[site.key]
        now.seen += x.numel() // site.units
        low = site.per_unit(x, "amin")
        count.peak = torch.maximum(count.peak, site.per_unit(x, "amax"))
        self._low[site.key] = torch.minimum(self._low.get(site.key, low), low)
        if site.kind.by_output:
            return
        dtype = torch.float32 if now.seen < EXACT else torch.bool
        self._add(site, torch.gt(x, site.kind.level, out=torch.empty_like(x, dtype=dtype)))

    def observe(self, site: Site, x: Tensor, out: Tensor) -> None:
        if site.kind.by_output:
            self._add(site, site.kind.fires(x, out.detach()))
        count = self.counts[site.key]
        if site.kind.dim is not None:  # of a maximum that is NaN, no piece is known to lose
            unknown = out.isnan().unsqueeze(site.kind.dim).expand_as(x)
            count.nonfinite |= site.per_unit(unknown, "amax")
        elif count.magnitude is not None:
            count.magnitude += site.per_unit(out.detach().abs().double(), "sum")

    def _fresh(self, site: Site, x: Tensor) -> SiteReport:
        zeros = torch.zeros(site.units, dtype=torch.int64, device=x.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        return SiteReport(
            name="",
            kind=site.kind.name,
            producer=site.producer,
            unit_dim=site.dims[0] if len(site.dims) == 1 else site.dims,
            fired=zeros,
            fired_inputs=zeros.clone(),
            quiet=zeros.clone(),
            peak=torch.full_like(zeros, -torch.inf, dtype=wide),
            nonfinite=zeros.bool(),
            magnitude=zeros.double() if self.smooth and site.kind.dim is None else None,
            silences=site.kind.silences,
            shape=tuple(x.shape),
            location=site.location,
            fixed=not site.data,
        )

    def _add(self, site: Site, fires: Tensor) -> None:
        """Count where the units of a call fired, given as ``bool`` or, up to EXACT, ``float32``."""
        now = self._now[site.key]
        if site.inputs is None:
            now.loose = now.loose + site.per_unit(fires, "sum").long()
            return
        counts = site.per_input(fires)
        if fires.dtype == torch.bool:
            counts = counts.long()
        now.fired = now.fired.to(counts.dtype) + counts if now.sites else counts
        now.sites.append(site)

    def end(self) -> None:
        """Close the pass over one batch."""
        for key, now in self._now.items():
            count = self.counts[key]
            count.observations += now.seen
            fired = now.loose + now.fired.sum(0).long() if now.sites else now.loose
            count.fired += fired
            if isinstance(now.loose, Tensor):
                count.inputs += min(self.batch_size, now.seen)
                count.fired_inputs = None
            elif not now.sites[0].data:  # the same in every pass
                count.inputs, count.fired_inputs = 1, (count.fired > 0).long()
            else:
                whole = any(site.rows[2] for site in now.sites)
                ids = [] if whole else [site.rows[0].flatten() for site in now.sites]
                count.inputs += self.batch_size if whole else len(torch.cat(ids).unique())
                if count.fired_inputs is not None:
                    once = whole and now.seen == self.batch_size
                    count.fired_inputs += fired if once else now.fired.sign().sum(0).long()
            count.quiet = (count.quiet + now.seen) * (fired == 0)
        self._now.clear()

    def reports(self) -> list[SiteReport]:
        """Return what was counted, by site, without those whose units changed their number."""
        told = {key: count for key, count in self.counts.items() if key not in self._unplaced}
        for key, count in told.items():
            count.nonfinite |= ~(count.peak.isfinite() & self._low[key].isfinite())
            count.name = self.name_of(key)
            for name, value in vars(count).items():
                setattr(count, name, value.cpu() if isinstance(value, Tensor) else value)
        return list(told.values())


def diagnose(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    count: Callable[[Any], int] | None = None,
    family: Literal["rectifiers", "all"] = "rectifiers",
    unit_dim: int | Mapping[str, int | None] | None = None,
    batch_dim: int = 0,
    activations: Activations = None,
) -> Report:
    """Count on how many inputs each unit of each rectifier fires, in one pass over the data.

    A unit is *silent* on an input when its output is 0 (for ReLU: when its pre-activation is at
    most 0), and *dead* on the data when it is silent on all of it. NaN is not silence: units that
    data or weights that are not finite reach are *non-finite*, a state of its own.

    Every rectifier is found by call site, however it is written: ``nn.ReLU``, ``F.relu``,
    ``x.relu_()``, ``clamp(min=0)``, ``threshold``, ``torch.maximum(x, 0)``, ReLU6, hardtanh with a
    lower limit of 0, hardswish, hardsigmoid, hardshrink, softshrink; also inside ``nn.RNN``,
    ``nn.TransformerEncoderLayer``, ``autograd.Function``, and scripted, checkpointed and compiled
    parts (which run eagerly). Arithmetic such as ``x * (x > 0)`` is found by ``activations`` only.

    A site is one place in the code fed by one layer, whose calls count as positions: those in a
    loop, such as the time steps of a cell, and those of a shared module that holds both layer and
    place, whoever calls it. Its *name* is the module's, ``"layer1.0.relu"``, with the operator
    where a module calls a function, ``"layer1.0.relu()"``, and ``#1``, ``#2`` and so on if others
    have the same; inside ``nn.RNN`` it is like its weights', ``"rnn.l0"``, ``"rnn.l1_reverse"``.

    *Units* are the channels of a convolution, whose positions count as observations, and the
    features of a linear layer, whatever the leading dimensions, followed from there through views,
    permutations, sums and the like. At a call of :func:`relubook.layers.maxout.maxout` they
    are pieces, and what counts is where each *wins*; see :class:`relubook.units.report.SiteReport`.

    Args:
        model: Any module. It runs without gradients, in training or evaluation mode as it is.
            ``torch.compile``'s and the data-parallel wrappers are looked through, for names too.
        data: Iterable of batches: a tensor; a tuple or list whose first element is the input (a
            tensor, or a mapping of keyword arguments); or a mapping of keyword arguments. A
            single tensor or mapping is one batch. With ``forward``, anything. It is moved to the
            model's device, if it has one only.
        forward: ``forward(model, batch)`` runs the model, for batches of any other kind and such
            as hold NaN or infinity on purpose.
        count: ``count(batch)`` returns the number of independent inputs in a batch. Default: the
            size along ``batch_dim`` on which the tensors of the batch agree, save those of size 1.
        family: ``"rectifiers"``, or ``"all"`` to list leaky and smooth functions too (GELU, SiLU).
            Those are never silent, but may be *dormant*; ``fired`` counts inputs above 0.
        unit_dim: The dimension of units, for all sites, or by a site's name (with or without
            ``#k``) or pattern, such as ``"decoder.*"``; there, ``None`` leaves a site out.
        batch_dim: Dimension of the inputs along which they are batched.
        activations: Activations of your own, each mapped to ``"silent where 0"``, to a function of
            the output that tells where it is silent (bool, of its shape), or to ``"never silent"``
            (smooth: for ``family="all"``). Named are modules (by class, itself, name or pattern)
            and Python functions (told by their code) or ``autograd.Function`` that the model calls.
            Rectifiers inside are part of it. Units and ``peak`` are those of its input if it has
            the output's shape, else (half the width, a layer inside) those of its output.

    Returns the report. Afterwards, also after an exception, the model's mode, hooks, gradients and
    buffers, the random state and the gradient mode are what they were.

    Raises:
        TypeError: If ``model`` is no module, ``activations`` names what is none, or data or a batch
            is of an unknown kind, looks like inputs and targets, or holds an unknown key.
        ValueError: If the data hold no batch, an empty one, or NaN or infinity without a
            ``forward`` to answer for them; if the number of inputs cannot be told; if no rectifier
            was called, nor maxout; if ``unit_dim`` names no site or no dimension, ``activations``
            no rule or what was not called; or if a parameter has no values yet.
        RuntimeError: If ``activations`` names a function, and a profiler runs.
        AmbiguousUnitsError: If the units can be told at no site; the report notes it of some.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> report = diagnose(model, [torch.randn(8, 3) for _ in range(10)])
    >>> report["1"].fired.shape, report["1"].inputs
    (torch.Size([4]), 80)
    """
    inner = unwrapped(model)
    if family not in ("rectifiers", "all"):
        raise ValueError(f"family must be 'rectifiers' or 'all', not {family!r}")
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        if tensor.is_meta or isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise ValueError(f"{name} has no values yet: load the model, or run it on one batch")
    options: dict[str, Any] = {"unit_dim": unit_dim, "batch_dim": batch_dim}
    counter = _Counter(inner, smooth=family == "all", activations=activations, **options)
    call = forward or (lambda _, x: inner(**x) if isinstance(x, Mapping) else inner(x))
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    device = devices.pop() if len(devices) == 1 else None
    inputs, done, example = 0, 0, None
    with counter.attached(model):
        for index, batch in enumerate(_batches(data)):
            given = batch if forward is not None else _model_input(batch, index)
            size = _size(given, index, batch_dim) if count is None else int(count(batch))
            if size < 1:
                raise ValueError(f"batch {index} is empty: it holds {size} inputs")
            if forward is None and not all(map(_finite, tensors_in(given))):
                what = f"batch {index} holds NaN, infinity or a meta tensor"
                raise ValueError(f"{what}; leave it out, or pass {FORWARD} if it is meant")
            if forward is None and not done:
                example = given
            if device is not None:
                move = methodcaller("to", device)
                given = move(given) if hasattr(given, "to") else tree_map_only(Tensor, move, given)
            counter.begin(size, given)
            try:
                with counter:
                    call(model, given)
            except Exception as error:
                what = f"relubook.diagnose was running the model on batch {index}"
                error.add_note(f"{what}; {FORWARD} runs it in another way")
                raise
            counter.end()
            inputs, done = inputs + size, done + 1
    if not done:
        raise ValueError("data holds no batch, or is an exhausted iterator: pass a list of batches")
    notes = _notes(counter)
    if not (sites := counter.reports()):
        if counter.ambiguous:
            raise AmbiguousUnitsError(unclear(counter.ambiguous))
        raise ValueError("; ".join(["the model called no rectifier", *notes]))
    return Report(sites, inputs, done, notes, example)


def _batches(data: Any) -> Iterable[Any]:
    if isinstance(data, Tensor | Mapping):
        return [data]
    items = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    if items or isinstance(data, str) or not isinstance(data, Iterable):
        what = f"data is a {type(data).__name__}, not an iterable of batches"
        raise TypeError(f"{what}; if it is a data set, wrap it in a DataLoader")
    if isinstance(data, tuple | list) and data and all(isinstance(x, Tensor) for x in data):
        pair = isinstance(data, tuple) and len(data) == 2
        if pair or len({(x.ndim, x.dtype) for x in data}) > 1:
            what = "data looks like one batch of inputs and targets: wrap it: [(x, y)]; a list of"
            raise TypeError(
                f"{what} batches must hold tensors of one dtype and number of dimensions"
            )
    return data


def _model_input(batch: Any, index: int) -> Any:
    given = batch[0] if type(batch) in (tuple, list) and batch else batch
    if isinstance(given, Tensor):
        return given
    if isinstance(given, Mapping):
        return dict(given)
    what = f"batch {index}: the input is a {type(given).__name__}, not a tensor or a mapping of"
    raise TypeError(f"{what} keyword arguments; convert it, or pass {FORWARD} to run it")


def _size(given: Any, index: int, batch_dim: int) -> int:
    sizes = {x.shape[batch_dim] for x in tensors_in(given) if -x.ndim <= batch_dim < x.ndim}
    sizes = sizes - {1} or sizes  # one row, such as position ids, serves all inputs
    if len(sizes) != 1:
        found = f"sizes {sorted(sizes)}" if sizes else "no tensor"
        what = f"batch {index}: cannot tell how many inputs it holds ({found} along dimension"
        raise ValueError(f"{what} {batch_dim}); pass count=lambda batch: ... or another batch_dim")
    return sizes.pop()


def _finite(x: Tensor) -> bool:
    if x.layout != torch.strided:
        x = x.coalesce().values() if x.is_sparse else x.values()
    if x.is_meta or not x.is_floating_point():
        return not x.is_meta
    return isfinite(float(x.sum())) or bool(x.isfinite().all())  # a sum may overflow


def unclear(sites: Mapping[str, str]) -> str:
    """Say of which sites the units cannot be told, why, and what helps."""
    listed = "".join(f"\n  {name!r}: {why}" for name, why in sites.items())
    help = "a dimension of that shape; None to leave the site out; a pattern such as 'decoder.*'"
    what = f"cannot tell along which dimension the units lie:{listed}"
    return f"{what}\nPass unit_dim={{{next(iter(sites), '')!r}: 1}} ({help} for many)"


def _notes(counter: _Counter) -> list[str]:
    """Return what could not be seen, sites of unknown units first."""
    names = [*map(counter.name_of, counter.counts), *counter.ambiguous]
    given = counter.unit_dim if isinstance(counter.unit_dim, Mapping) else {}
    if unknown := [name for name in given if name not in counter.used_overrides]:
        sites = ", ".join(names) or "none"
        raise ValueError(f"unit_dim names {unknown}, which the model did not call; sites: {sites}")
    if counter.uncalled:
        raise ValueError(f"activations names {[*counter.uncalled]}, which the model did not call")
    notes = [f"SKIPPED: {unclear(counter.ambiguous)}."] * bool(counter.ambiguous)
    notes += counter.notes
    if counter.seen_smooth:
        listed = ", ".join(f"{kind} ({calls} calls)" for kind, calls in counter.seen_smooth.items())
        notes.append(f"Without a silent region, so listed by family='all' only: {listed}.")
    return notes
