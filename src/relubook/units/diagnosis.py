"""Which units of any model are dead, and on how many inputs that verdict rests."""

import html
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from relubook._optional import require
from relubook.units.report import SiteListing, plain_table
from relubook.units.sites import (
    BATCH,
    POSITION,
    RECTIFIERS,
    UNIT,
    AmbiguousUnitsError,
    Site,
    SiteFinder,
    public_name,
    tensors_in,
    undisturbed,
    unwrapped,
)

__all__ = ["AmbiguousUnitsError", "Report", "SiteReport", "diagnose", "silence_bound"]

STATES = ("dead", "rare", "mixed", "always on", "non-finite")
"""The states of a unit of a rectifier; each unit is in exactly one of them."""

RARE = 0.01
"""A unit that fires on fewer than this share of the inputs, and on one at least, is rare."""


def silence_bound(inputs: int, confidence: float = 0.95) -> float:
    """Bound the firing rate of a unit that was silent on every input.

    The exact (Clopper and Pearson 1934) one-sided bound for no success in n independent trials:
    the rate p at which ``(1 - p) ** n == 1 - confidence``. It is close to 3/n at 95%.

    Args:
        inputs: Number n of independent inputs. Positions of one input do not count.
        confidence: Level of the bound.

    Returns:
        The upper bound on the rate; 1 for no input.

    Source:
        https://doi.org/10.1093/biomet/26.4.404
    """
    return 1.0 if inputs < 1 else 1.0 - (1.0 - confidence) ** (1.0 / inputs)


@dataclass(frozen=True, eq=False)
class SiteReport:
    """What one rectifier did: one call site, one entry per unit.

    Attributes:
        name: The site's name, see :func:`diagnose`.
        kind: ``"relu"``, ``"relu6"``, ``"hardtanh"``, ``"threshold"`` or ``"hardswish"``; with
            ``family="all"`` also ``"leaky_relu"``, ``"gelu"`` and so on.
        producer: Qualified name of the module with weights (linear, convolution, normalization
            and so on) whose output reached the rectifier directly, or through shape-only
            operations, pooling or dropout. ``None`` where something else came in between, such as
            the sum of a residual connection.
        unit_dim: The dimension of the rectifier's input along which units lie. A tuple where a
            view spread them over several (attention heads): units are then counted row by row.
        inputs: Number of independent inputs that reached the site.
        observations: Number of values seen per unit: inputs times positions.
        fired: ``int64``, shape (units,): on how many observations the unit was not silent.
        fired_inputs: ``int64``, shape (units,): on how many inputs it fired at one position at
            least. ``None`` where the inputs cannot be told apart at the site.
        peak: Shape (units,): largest pre-activation.
        nonfinite: ``bool``, shape (units,): some pre-activation was NaN or infinite. Such a unit
            is in no other state, since NaN is not silence.
        score: Shape (units,): mean absolute output over its mean across the layer (Sokar et al.
            2023, https://arxiv.org/abs/2302.12902); ``None`` unless asked for by
            ``family="all"``.
        dormant_threshold: A unit with a score up to this one is dormant.
        silences: Whether the function can be silent at all. Leaky and smooth ones are not:
            their units are never dead, but may be dormant.
        shape: Shape of the rectifier's input when the site was first reached.
        location: ``"file.py:12"``, the line of the model that made the call, if known.
    """

    name: str
    kind: str
    producer: str | None
    unit_dim: int | tuple[int, ...]
    inputs: int
    observations: int
    fired: Tensor
    fired_inputs: Tensor | None
    peak: Tensor
    nonfinite: Tensor
    score: Tensor | None = None
    dormant_threshold: float = 0.025
    silences: bool = True
    shape: tuple[int, ...] = ()
    location: str | None = None

    @property
    def units(self) -> int:
        """Number of units."""
        return self.fired.numel()

    @property
    def rate(self) -> Tensor:
        """Share of the observations on which each unit fired, ``float64``, shape (units,)."""
        return self.fired.double() / max(self.observations, 1)

    @property
    def dead(self) -> Tensor:
        """Units silent on every observation, ``bool``, shape (units,)."""
        if not self.silences:
            return torch.zeros_like(self.nonfinite)
        return (self.fired == 0) & ~self.nonfinite

    @property
    def rare(self) -> Tensor:
        """Units that fired, but on fewer than 1% of the inputs, ``bool``, shape (units,).

        Where the inputs cannot be told apart (``fired_inputs`` is ``None``), on fewer than 1% of
        the observations.
        """
        if not self.silences:
            return torch.zeros_like(self.nonfinite)
        if self.fired_inputs is None:
            few = self.fired < RARE * self.observations
        else:
            few = self.fired_inputs < RARE * self.inputs
        return few & (self.fired > 0) & ~self.nonfinite & ~self.always_on

    @property
    def always_on(self) -> Tensor:
        """Units that were never silent, so that they act linearly, ``bool``, shape (units,)."""
        if not self.silences:
            return torch.zeros_like(self.nonfinite)
        return (self.fired == self.observations) & ~self.nonfinite

    @property
    def mixed(self) -> Tensor:
        """Units in none of the other states, ``bool``, shape (units,)."""
        return ~(self.dead | self.rare | self.always_on | self.nonfinite)

    @property
    def dormant(self) -> Tensor | None:
        """Units with a score up to the threshold, ``bool``, shape (units,); ``None`` unscored."""
        return None if self.score is None else self.score <= self.dormant_threshold

    @property
    def upper_bound(self) -> Tensor:
        """95% upper bound on the firing rate of each silent unit, ``float64``, shape (units,).

        See :func:`silence_bound`. It counts inputs, not positions. NaN for units that fired, or
        that saw a non-finite value.
        """
        bound = torch.full((self.units,), silence_bound(self.inputs), dtype=torch.float64)
        return bound.masked_fill(~self.dead, torch.nan)

    @property
    def dead_fraction(self) -> float:
        """Share of dead units."""
        return int(self.dead.sum()) / max(self.units, 1)

    @property
    def dead_layer(self) -> bool:
        """Whether all units are dead; the network is then constant behind the site."""
        return self.units > 0 and bool(self.dead.all())

    def counts(self) -> dict[str, int]:
        """Return how many units are in each state, by the names of ``STATES``."""
        masks = (self.dead, self.rare, self.mixed, self.always_on, self.nonfinite)
        return {state: int(mask.sum()) for state, mask in zip(STATES, masks, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists, ready for JSON (save for NaN)."""
        return {
            "name": self.name,
            "kind": self.kind,
            "producer": self.producer,
            "unit_dim": self.unit_dim,
            "units": self.units,
            "inputs": self.inputs,
            "observations": self.observations,
            "counts": self.counts(),
            "dead_fraction": self.dead_fraction,
            "silence_bound": silence_bound(self.inputs),
            "fired": self.fired.tolist(),
            "fired_inputs": None if self.fired_inputs is None else self.fired_inputs.tolist(),
            "peak": self.peak.tolist(),
            "nonfinite": self.nonfinite.tolist(),
            "score": None if self.score is None else self.score.tolist(),
            "location": self.location,
        }

    def __repr__(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in self.counts().items() if count)
        return (
            f"{self.name} ({self.kind}): {self.units} units, {states}; n = {self.inputs:,} inputs"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Report(SiteListing[SiteReport]):
    """What :func:`diagnose` found. ``print`` shows it as a table, Jupyter as a rich one.

    ``report["name"]`` is one site, ``len(report)`` their number, and iterating gives them in
    execution order.

    Attributes:
        sites: One :class:`SiteReport` per rectifier, in execution order.
        inputs: Number of inputs the model saw.
        batches: Number of batches it saw.
        skipped: Indices of batches that were left out because they held NaN or infinity.
        notes: What could not be seen, or was left out on purpose, in words.
        example: The input of the first batch, as it was given, on which
            :func:`relubook.units.revival.revive_` runs the model; None with ``forward=``.
    """

    sites: list[SiteReport]
    inputs: int = 0
    batches: int = 0
    skipped: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    example: Any = None

    @property
    def dead_fraction(self) -> float:
        """Share of dead units among the units of all rectifiers; dormant ones do not count."""
        rectifiers = [site for site in self.sites if site.silences]
        units = sum(site.units for site in rectifiers)
        return sum(int(site.dead.sum()) for site in rectifiers) / max(units, 1)

    @property
    def dead_layers(self) -> list[str]:
        """Names of the sites whose units are all dead."""
        return [site.name for site in self.sites if site.dead_layer]

    def assert_alive(self, max_dead: float = 0.0) -> None:
        """Raise unless every site is alive: for tests and continuous integration.

        Args:
            max_dead: Largest share of dead units that a site may have, from 0 to 1. A dead layer
                fails at any value below 1.

        Raises:
            AssertionError: If a site has a larger share of dead units, or a unit that saw NaN or
                infinity. Names each.
            ValueError: If ``max_dead`` is not between 0 and 1.
        """
        if not 0 <= max_dead <= 1:
            raise ValueError(f"max_dead is a share of units from 0 to 1, not {max_dead}")
        faults = []
        for site in self.sites:
            if site.dead_fraction > max_dead:
                whole = ", the whole layer" if site.dead_layer else ""
                faults.append(
                    f"{site.name}: {int(site.dead.sum())} of {site.units} units dead{whole} "
                    f"(n = {site.inputs:,} inputs)"
                )
            if site.nonfinite.any():
                faults.append(f"{site.name}: {int(site.nonfinite.sum())} units non-finite")
        if faults:
            raise AssertionError(
                f"more than {max_dead:.1%} dead units in a site, or non-finite ones:\n  "
                + "\n  ".join(faults)
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, lists and dictionaries."""
        return {
            "inputs": self.inputs,
            "batches": self.batches,
            "dead_fraction": self.dead_fraction,
            "dead_layers": self.dead_layers,
            "skipped": list(self.skipped),
            "notes": list(self.notes),
            "sites": [site.to_dict() for site in self.sites],
        }

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per unit.

        Returns:
            Columns ``site, kind, producer, unit, state, fired, observations, rate, inputs,
            fired_inputs, peak, upper_bound`` and ``score`` (NaN where it was not asked for).

        Raises:
            ImportError: If pandas is not installed.
        """
        pandas = require("pandas", "tables of results")
        frames = []
        for site in self.sites:
            state = ["mixed"] * site.units
            masks = (site.dead, site.rare, site.mixed, site.always_on, site.nonfinite)
            for name, mask in zip(STATES, masks, strict=True):
                for unit in mask.nonzero().flatten().tolist():
                    state[unit] = name
            missing = [float("nan")] * site.units
            frames.append(
                pandas.DataFrame(
                    {
                        "site": site.name,
                        "kind": site.kind,
                        "producer": site.producer,
                        "unit": range(site.units),
                        "state": state,
                        "fired": site.fired.tolist(),
                        "observations": site.observations,
                        "rate": site.rate.tolist(),
                        "inputs": site.inputs,
                        "fired_inputs": missing
                        if site.fired_inputs is None
                        else [float(count) for count in site.fired_inputs.tolist()],
                        "peak": site.peak.tolist(),
                        "upper_bound": site.upper_bound.tolist(),
                        "score": missing if site.score is None else site.score.tolist(),
                    }
                )
            )
        return pandas.concat(frames, ignore_index=True)

    def plot(self, axes: Any = None) -> Any:
        """Draw one bar per site, in execution order, split by the state of its units.

        Args:
            axes: ``matplotlib.axes.Axes`` to draw on. Default: a new figure, tall enough.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from relubook.book import COLORS, WIDTH

        if axes is None:
            pyplot = require("matplotlib.pyplot", "figures")
            height = 1.3 + 0.3 * len(self.sites)
            figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
        else:
            figure = axes.figure
        looks = {
            "dead": (COLORS[6], ""),
            "rare": (COLORS[1], "////"),
            "mixed": ("#dddddd", ""),
            "always on": (COLORS[4], ".."),
            "non-finite": (COLORS[3], "xx"),
        }
        shares = [
            {state: count / max(site.units, 1) for state, count in site.counts().items()}
            for site in self.sites
        ]
        left = [0.0] * len(shares)
        for state, (color, hatch) in looks.items():
            widths = [share[state] for share in shares]
            if any(widths):
                axes.barh(
                    range(len(widths)),
                    widths,
                    left=left,
                    height=0.8,
                    color=color,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0,
                    label=state,
                )
                left = [start + width for start, width in zip(left, widths, strict=True)]
        labels = [f"{site.name} ({site.units})" for site in self.sites]
        axes.set_yticks(range(len(labels)), labels, fontsize=9)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(False)
        axes.set_xlabel("share of the site's units")
        axes.set_title(f"{self.dead_fraction:.1%} of the units dead, n = {self.inputs:,} inputs")
        handles, states = axes.get_legend_handles_labels()
        figure.legend(handles, states, loc="outside lower center", ncols=3)
        return figure

    def _table(self) -> tuple[list[str], list[list[str]]]:
        dormant = any(site.score is not None for site in self.sites)
        header = ["site", "kind", "units", "dead", "rare", "always on", "non-finite"]
        header += ["dormant"] * dormant + ["median rate", "n"]
        rows = []
        for site in self.sites:
            counts = site.counts()
            row = [site.name, site.kind, f"{site.units:,}"]
            for state in ("dead", "rare", "always on"):
                row.append(f"{counts[state]:,}" if site.silences else "-")
            row.append(f"{counts['non-finite']:,}")
            if dormant:
                row.append("-" if site.dormant is None else f"{int(site.dormant.sum()):,}")
            rates = site.rate.tolist()
            row += [f"{statistics.median(rates):.3f}" if rates else "-", f"{site.inputs:,}"]
            rows.append(row)
        if not any(int(row[6].replace(",", "")) for row in rows):
            for row in [header, *rows]:
                del row[6]
        return header, rows

    def _remarks(self) -> list[str]:
        remarks = []
        for name in self.dead_layers:
            remarks.append(
                f"DEAD LAYER: all {self[name].units} units of {name} are dead: "
                "the network is constant behind it (save for paths around it)."
            )
        for site in self.sites:
            if site.nonfinite.any():
                remarks.append(
                    f"NON-FINITE: {int(site.nonfinite.sum())} units of {site.name} saw NaN or "
                    "infinity; that is not silence."
                )
        dead = sum(int(site.dead.sum()) for site in self.sites)
        if dead:
            fewest = min(site.inputs for site in self.sites if site.dead.any())
            remarks.append(
                f"{dead:,} dead unit{'s' * (dead != 1)} ({self.dead_fraction:.1%}). Silence on "
                f"n = {fewest:,} independent inputs bounds a unit's firing rate by "
                f"{silence_bound(fewest):.2%} (95%)."
            )
        if self.skipped:
            remarks.append(f"Left out for NaN or infinity: batches {self.skipped}.")
        return remarks + list(self.notes)

    def __repr__(self) -> str:
        header, rows = self._table()
        return "\n".join([*plain_table([header, *rows], words=2), *self._remarks()])

    def _repr_html_(self) -> str:
        header, rows = self._table()

        def cells(tag: str, line: list[str]) -> str:
            return "".join(
                f'<{tag} style="padding:.1em .6em;text-align:{"left" if column < 2 else "right"}">'
                f"{html.escape(cell)}</{tag}>"
                for column, cell in enumerate(line)
            )

        dead = set(self.dead_layers)
        body = ""
        for row in rows:
            weight = ' style="font-weight:bold"' if row[0] in dead else ""
            body += f"<tr{weight}>{cells('td', row)}</tr>"
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return (
            f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"
            + remarks
        )


class _Count:
    """Running counts of one site."""

    def __init__(self, site: Site, units: int, x: Tensor) -> None:
        self.site = site
        self.shape = tuple(x.shape)
        self.inputs = 0
        self.observations = 0
        self.fired = torch.zeros(units, dtype=torch.int64, device=x.device)
        self.fired_inputs: Tensor | None = torch.zeros_like(self.fired)
        self.nonfinite = torch.zeros(units, dtype=torch.bool, device=x.device)
        self.peak = torch.full((units,), -torch.inf, dtype=x.dtype, device=x.device)
        self.magnitude = torch.zeros(units, dtype=torch.float64, device=x.device)
        # Of the pass under way: values seen per unit, and on which inputs each unit fired.
        self.seen = 0
        self.fired_now: Tensor | None = None
        self.traced = True


class _Counter(SiteFinder):
    """Counts at every site how often each unit fires."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.counts: dict[tuple[Any, ...], _Count] = {}
        self.order: list[tuple[Any, ...]] = []
        self._last = -1
        self._now: dict[tuple[Any, ...], _Count] = {}

    def before(self, site: Site, x: Tensor) -> None:
        x = x.detach()
        units = _product(size for dim in site.layout for size, role in dim if role == UNIT)
        count = self.counts.get(site.key)
        if count is None:
            count = self.counts[site.key] = _Count(site, units, x)
            self.order.insert(self._last + 1, site.key)
        elif count.fired.numel() != units:
            raise ValueError(
                f"{self.name_of(site.key)} had {count.fired.numel()} units before and has {units} "
                f"now (input of shape {tuple(x.shape)}): its unit_dim cannot be the one of its "
                "units; pass unit_dim={name: dimension}"
            )
        self._last = self.order.index(site.key)
        self._now[site.key] = count
        if not x.numel():
            return
        count.seen += x.numel() // units
        count.peak = torch.maximum(count.peak, _per_unit(x, site, "amax"))
        count.nonfinite |= _per_unit(~x.isfinite(), site, "amax")
        if not site.kind.by_output:
            self._count(count, site, site.kind.fires(x, None))

    def observe(self, site: Site, x: Tensor, out: Tensor) -> None:
        count = self.counts[site.key]
        if not x.numel():
            return
        out = out.detach()
        if site.kind.by_output:
            self._count(count, site, site.kind.fires(x, out))
        if self.smooth:
            count.magnitude += _per_unit(out.abs().double(), site, "sum")

    def _count(self, count: _Count, site: Site, fires: Tensor) -> None:
        per_input = _per_input(fires, site)
        count.fired += per_input.sum(0)
        now = per_input > 0
        rows = now.shape[0]
        if count.fired_now is None:
            whole = site.recurrent and any(role == BATCH for _, role in site.layout[0])
            count.traced = whole or rows == self.batch_size
            count.fired_now = now
        else:  # another time step of the same inputs, the longest sequences first
            if rows > count.fired_now.shape[0]:
                now, count.fired_now = count.fired_now, now
            count.fired_now[: now.shape[0]] |= now

    def end(self) -> None:
        """Close the pass over one batch."""
        for count in self._now.values():
            count.inputs += min(self.batch_size, count.seen)
            count.observations += count.seen
            if count.seen and count.fired_now is not None:
                if not count.traced and self.batch_size > 1:
                    count.fired_inputs = None
                elif count.fired_inputs is not None:
                    count.fired_inputs += count.fired_now.sum(0)
            count.seen, count.fired_now = 0, None
        self._now.clear()
        self._last = -1


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _factored(x: Tensor, site: Site) -> tuple[Tensor, list[str]]:
    """Return a tensor with one dimension per factor of the site's layout, and their roles."""
    factors = [factor for dim in site.layout for factor in dim]
    sizes = [size for size, _ in factors]
    return (x if list(x.shape) == sizes else x.reshape(sizes)), [role for _, role in factors]


def _per_unit(x: Tensor, site: Site, reduction: Literal["amax", "sum"]) -> Tensor:
    """Reduce a tensor to shape (units,)."""
    x, roles = _factored(x, site)
    dims = [dim for dim, role in enumerate(roles) if role != UNIT]
    if dims:
        x = x.amax(dims) if reduction == "amax" else x.sum(dims)
    return x.reshape(-1)


def _per_input(fires: Tensor, site: Site) -> Tensor:
    """Count over positions: ``int64`` of shape (inputs, units)."""
    fires, roles = _factored(fires, site)
    positions = [dim for dim, role in enumerate(roles) if role == POSITION]
    counts = fires.sum(positions) if positions else fires.long()
    rest = [role for role in roles if role != POSITION]
    batch = [dim for dim, role in enumerate(rest) if role == BATCH]
    units = [dim for dim, role in enumerate(rest) if role == UNIT]
    rows = _product(counts.shape[dim] for dim in batch)
    return counts.permute(batch + units).reshape(rows, -1)


def diagnose(
    model: nn.Module,
    data: Iterable[Any],
    *,
    mode: Literal["train", "eval"] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    count: Callable[[Any], int] | None = None,
    family: Literal["rectifiers", "all"] = "rectifiers",
    unit_dim: int | Mapping[str, int | None] | None = None,
    batch_dim: int = 0,
    nonfinite: Literal["raise", "skip", "keep"] = "raise",
    dormant_threshold: float = 0.025,
    device: torch.device | str | None = None,
) -> Report:
    """Count on how many inputs each unit of each rectifier fires, in one pass over the data.

    A unit is *silent* on an input when its output is 0 (for ReLU: when its pre-activation is at
    most 0), and *dead* on the data when it is silent on all of it. NaN is not silence.

    Every rectifier is found by call site, however it is written: ``nn.ReLU``, ``F.relu``,
    ``torch.relu``, ``x.relu()``, ``relu_``, ``clamp(min=0)``, ``clamp_min(0)``, ``threshold``,
    ``torch.maximum(x, 0)``, ReLU6, hardtanh with a lower limit of 0, hardswish; in place, inside
    ``nn.RNN(nonlinearity="relu")``, ``nn.TransformerEncoderLayer``, scripted, checkpointed and
    compiled parts (which run eagerly for the occasion), and inside ``autograd.Function``.
    Arithmetic that amounts to one, such as ``x * (x > 0)``, cannot be told from other arithmetic.

    A site's *name* is the module's qualified name, such as ``"layer1.0.relu"``; that of a
    function's call is the name of the module that runs it and the operator:
    ``"layer1.0.relu()"``, or ``"relu()"`` in the model itself. Where a name is called more than
    once in a forward pass, ``#1``, ``#2`` and so on number the calls in the order in which they
    were first seen. The rectifiers inside ``nn.RNN`` are named as its weights are, ``"rnn.l0"``
    or ``"rnn.l1_reverse"``; time steps count as positions.

    *Units* are the channels of a convolution, whose positions count as observations, and the
    features of a linear layer, whatever the leading dimensions. They are followed from the layer
    that produced them through views, permutations, sums and the like.

    Args:
        model: Any module. It runs without gradients, in the mode it is in.
        data: Iterable of batches: a tensor; a tuple or list whose first element is the input (a
            tensor, or a mapping of keyword arguments); or a mapping of keyword arguments. A
            single tensor or mapping is one batch. With ``forward``, anything.
        mode: ``"train"`` or ``"eval"`` to diagnose in that mode. Default: as the model is.
        forward: ``forward(model, batch)`` runs the model, for batches of any other kind.
        count: ``count(batch)`` returns the number of independent inputs in a batch. Default: the
            size along ``batch_dim`` on which the tensors of the batch agree.
        family: ``"rectifiers"``, or ``"all"`` to list leaky and smooth functions too (leaky ReLU,
            PReLU, RReLU, ELU, SELU, CELU, GELU, SiLU, Mish, softplus, hardtanh with a lower limit
            other than 0). They have no silent region; instead of dead, their units may be
            *dormant*. For them ``fired`` counts positive pre-activations.
        unit_dim: The dimension of units, for all sites, or by a mapping from a site's name (with
            or without ``#k``). ``None`` in the mapping leaves a site out.
        batch_dim: Dimension of the inputs along which they are batched.
        nonfinite: What to do with a batch that holds NaN or infinity: ``"raise"``; ``"skip"`` it
            and list it in ``Report.skipped``; or ``"keep"`` it, as attention masks need.
        dormant_threshold: Largest score of a dormant unit (Sokar et al. 2023,
            https://arxiv.org/abs/2302.12902).
        device: Where to move the batches. Default: to the model's device, if it has one only.

    Returns:
        The report. Afterwards the model's mode, hooks, gradients and buffers (batch norm's
        statistics too), the random state and the gradient mode are what they were, also after an
        exception. What a forward pass writes elsewhere, such as a plain Python attribute, stays.

    Raises:
        TypeError: If ``model`` is no module, or ``data`` or a batch is of an unknown kind.
        ValueError: If the data hold no batch, a batch of size 0, or (``nonfinite="raise"``) NaN or
            infinity; if the number of inputs cannot be told; if no rectifier was called; if a
            name in ``unit_dim`` does not exist; or if the model has lazy parameters.
        AmbiguousUnitsError: If nothing tells along which dimension the units of a site lie.
        RuntimeError: If the model is compiled and torch is older than 2.6.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> report = diagnose(model, [torch.randn(8, 3) for _ in range(10)])
        >>> report["1"].fired.shape, report["1"].inputs
        (torch.Size([4]), 80)
    """
    _check_options(model, mode, family, nonfinite)
    batches = _batches(data)
    counter = _Counter(model, smooth=family == "all", unit_dim=unit_dim, batch_dim=batch_dim)
    target = _device_of(model) if device is None else torch.device(device)
    inner = unwrapped(model)
    skipped: list[int] = []
    inputs = done = 0
    index, example = -1, None
    with undisturbed(model):
        if mode is not None:
            model.train(mode == "train")
        try:
            counter.attach()
            for index, batch in enumerate(batches):
                given = batch if forward is not None else _model_input(batch, index)
                size = _size(batch, given, index, batch_dim, count)
                bad = nonfinite != "keep" and _nonfinite(given)
                if bad and nonfinite == "raise":
                    raise ValueError(
                        f"batch {index} holds NaN or infinity; pass nonfinite='skip' to leave such "
                        "batches out, or nonfinite='keep' if they are meant"
                    )
                if bad:
                    skipped.append(index)
                    continue
                example = given if forward is None and not done else example
                if target is not None:
                    given = _moved(given, target)
                counter.begin(size, given)
                try:
                    with counter:
                        if forward is not None:
                            forward(model, given)
                        elif isinstance(given, Mapping):
                            inner(**given)
                        else:
                            inner(given)
                except Exception as error:
                    error.add_note(f"relubook.diagnose was running the model on batch {index}")
                    raise
                if counter.ambiguous:
                    raise AmbiguousUnitsError(_explain(counter.ambiguous))
                counter.end()
                inputs += size
                done += 1
        finally:
            counter.detach()
    if index < 0:
        raise ValueError(
            "data is an iterator that yields nothing: a generator yields its batches only once, so "
            "it may be exhausted; pass a list or a DataLoader"
            if isinstance(data, Iterator)
            else "data holds no batch: the verdict would rest on nothing"
        )
    if not done:
        raise ValueError(f"every batch held NaN or infinity: {skipped}")
    _check_overrides(counter, unit_dim)
    if not counter.order:
        raise ValueError(_nothing_found(counter))
    return Report(
        [_site_report(counter, key, dormant_threshold) for key in counter.order],
        inputs,
        done,
        skipped,
        _notes(counter, family),
        example,
    )


def _check_options(model: Any, mode: Any, family: Any, nonfinite: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    for name, value, allowed in (
        ("mode", mode, (None, "train", "eval")),
        ("family", family, ("rectifiers", "all")),
        ("nonfinite", nonfinite, ("raise", "skip", "keep")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name} is lazy and has no values yet: run the model on one batch first"
            )


def _batches(data: Any) -> Iterable[Any]:
    if isinstance(data, Tensor | Mapping | nn.utils.rnn.PackedSequence):
        return [data]
    sequence = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if isinstance(data, str | bytes) or not sequence:
        raise TypeError(
            f"data is a {type(data).__name__}, not an iterable of batches such as a DataLoader"
        )
    return data


def _model_input(batch: Any, index: int) -> Any:
    if isinstance(batch, tuple | list) and not isinstance(batch, nn.utils.rnn.PackedSequence):
        if not batch:
            raise TypeError(f"batch {index} is an empty {type(batch).__name__}")
        batch = batch[0]
    if isinstance(batch, Tensor | nn.utils.rnn.PackedSequence):
        return batch
    if isinstance(batch, Mapping):
        return dict(batch)
    raise TypeError(
        f"batch {index}: the input is a {type(batch).__name__}, not a tensor or a mapping of "
        "keyword arguments; pass forward=lambda model, batch: ... to run the model on it"
    )


def _size(
    batch: Any, given: Any, index: int, batch_dim: int, count: Callable[[Any], int] | None
) -> int:
    if count is not None:
        size = int(count(batch))
    elif isinstance(given, nn.utils.rnn.PackedSequence):
        size = int(given.batch_sizes[0])
    else:
        sizes = {
            tensor.shape[batch_dim]
            for tensor in tensors_in(given)
            if -tensor.ndim <= batch_dim < tensor.ndim
        }
        if len(sizes) != 1:
            found = f"sizes {sorted(sizes)}" if sizes else "no tensor"
            raise ValueError(
                f"batch {index}: cannot tell how many inputs it holds ({found} along dimension "
                f"{batch_dim}); pass count=lambda batch: ... or another batch_dim"
            )
        size = sizes.pop()
    if size < 1:
        raise ValueError(f"batch {index} is empty: it holds {size} inputs")
    return size


def _nonfinite(given: Any) -> bool:
    return any(
        not bool(tensor.isfinite().all())
        for tensor in tensors_in(given)
        if tensor.is_floating_point()
    )


def _device_of(model: nn.Module) -> torch.device | None:
    devices = {parameter.device for parameter in model.parameters()}
    devices |= {buffer.device for buffer in model.buffers()}
    return devices.pop() if len(devices) == 1 else None


def _moved(value: Any, device: torch.device) -> Any:
    """Return the value with its tensors on a device; itself if they are there already."""
    if all(tensor.device == device for tensor in tensors_in(value)):
        return value
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _explain(ambiguous: Mapping[str, str]) -> str:
    listed = "\n".join(f"  {name!r}: {why}" for name, why in ambiguous.items())
    example = next(iter(ambiguous))
    return (
        "cannot tell along which dimension the units lie at these sites:\n"
        f"{listed}\n"
        f"Say so by unit_dim={{{example!r}: 1}} (a dimension of that shape), or leave a site out "
        f"by unit_dim={{{example!r}: None}}."
    )


def _check_overrides(counter: _Counter, unit_dim: Any) -> None:
    if not isinstance(unit_dim, Mapping):
        return
    unknown = [name for name in unit_dim if name not in counter.used_overrides]
    if unknown:
        sites = ", ".join(counter.name_of(key) for key in counter.order) or "none"
        raise ValueError(f"unit_dim names {unknown}, which the model did not call; sites: {sites}")


def _left_out(counter: _Counter) -> str:
    return ", ".join(f"{kind} ({calls} calls)" for kind, calls in counter.seen_smooth.items())


def _nothing_found(counter: _Counter) -> str:
    message = "the model called no rectifier"
    if counter.seen_smooth:
        message += f", but {_left_out(counter)}: pass family='all' to look for dormant units"
    if counter.used_overrides:
        message += "; unit_dim left out " + ", ".join(sorted(counter.used_overrides))
    return "; ".join([message, *counter.notes])


def _notes(counter: _Counter, family: str) -> list[str]:
    notes = list(counter.notes)
    if counter.seen_smooth and family != "all":
        notes.append(
            f"Without a silent region, so listed by family='all' only: {_left_out(counter)}."
        )
    left = [name for name in counter.used_overrides if _left_out_by(counter, name)]
    if left:
        notes.append(f"Left out by unit_dim: {', '.join(sorted(left))}.")
    idle = [
        name
        for name, module in counter._modules.items()
        if isinstance(module, RECTIFIERS) and name not in counter.called
    ]
    if idle:
        notes.append(f"Never called as modules: {', '.join(idle)}.")
    return notes


def _left_out_by(counter: _Counter, name: str) -> bool:
    return isinstance(counter.unit_dim, Mapping) and counter.unit_dim.get(name, 0) is None


def _site_report(counter: _Counter, key: tuple[Any, ...], dormant_threshold: float) -> SiteReport:
    count = counter.counts[key]
    site = count.site
    score = None
    if counter.smooth:
        score = count.magnitude.cpu() / max(count.observations, 1)
        score = score / score.mean().clamp(min=torch.finfo(score.dtype).tiny)
    dims = [
        dim for dim, factors in enumerate(site.layout) if any(role == UNIT for _, role in factors)
    ]
    peak = count.peak.cpu()
    return SiteReport(
        name=counter.name_of(key),
        kind=site.kind.name,
        producer=None if site.producer is None else public_name(site.producer),
        unit_dim=dims[0] if len(dims) == 1 else tuple(dims),
        inputs=count.inputs,
        observations=count.observations,
        fired=count.fired.cpu(),
        fired_inputs=None if count.fired_inputs is None else count.fired_inputs.cpu(),
        peak=peak if peak.dtype == torch.float64 else peak.float(),
        nonfinite=count.nonfinite.cpu(),
        score=score,
        dormant_threshold=dormant_threshold,
        silences=site.kind.silences,
        shape=count.shape,
        location=site.location,
    )
