"""What every report on a model shares, and the report of ``diagnose``."""

import io
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from relubook._files import write_whole
from relubook._optional import require
from relubook.units._kinds import PIECE
from relubook.units._listing import UnitListing, plain_table
from relubook.units.risk import advice, near_cliff, off_center

__all__ = ["RARE", "STATES", "Report", "ReportDiff", "SiteReport", "silence_bound"]

RARE = 0.01
"""A unit that fires on fewer than this share of the inputs, and on one at least, is rare."""

LOOKS = {
    "dead": ("#000000", ""),
    "rare": ("#D55E00", "////"),
    "mixed": ("#dddddd", ""),
    "always on": ("#882255", ".."),
    "non-finite": ("#C6619A", "xx"),
    "never wins": ("#0072B2", "\\\\\\\\"),
}
"""Color and hatch of each state; each unit of a rectifier, or piece, is in exactly one of them."""
STATES = tuple(LOOKS)
VERSION = 1  # of the files that Report.save writes
DORMANT = 0.025
"""Largest score of a dormant unit (Sokar et al. 2023, https://arxiv.org/abs/2302.12902)."""


def silence_bound(inputs: int) -> float:
    """Bound the firing rate of a unit that was silent on n independent inputs, with 95% confidence.

    The exact one-sided bound for no success in n trials, about 3/n: the rate p at which
    ``(1 - p) ** n == 0.05`` (Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404).
    Positions of one input do not count; 1 for no input.
    """
    return 1.0 if inputs < 1 else 1.0 - 0.05 ** (1.0 / inputs)


@dataclass(eq=False, repr=False)
class SiteReport:
    """What one rectifier did, in counts, sums and maxima. All tensors have shape (units,).

    At a site of kind ``"maxout piece"`` the units are the pieces of maxout units, in the order of
    the layer's weight, and to *fire* is to win: to attain the unit's maximum, at a tie with others
    too, among which autograd shares the gradient. A piece that never does is in the state *never
    wins*, not dead: its unit computes the same without it. One that always does is *always on*.

    Attributes:
        name: The site's name, see :func:`relubook.units.diagnosis.diagnose`.
        kind: ``"relu"``, ``"relu6"``, ``"hardtanh"``, ``"maxout piece"`` and so on.
        producer: Name of the module with weights whose output reached the rectifier directly or
            through shape operations, pooling or dropout; ``None`` after anything else, as a sum.
        unit_dim: The dimension of the rectifier's input along which units lie. A tuple where a
            view spread them over several (attention heads): units are then counted row by row.
        fired: ``int64``: on how many observations the unit was not silent.
        fired_inputs: ``int64``: on how many inputs it fired; ``None`` where these cannot be told.
        peak: Largest pre-activation.
        nonfinite: ``bool``: some pre-activation was NaN or infinite, which is no silence.
        magnitude: ``float64``: sum of its absolute outputs; ``None`` unless ``family="all"``.
        inputs: Number of independent inputs that reached the site; 1 if it depends on none.
        observations: Number of values seen per unit: inputs times positions times calls.
        silences: Whether the function can be silent; else no unit is ever dead.
        shape: Shape of the rectifier's input when the site was first reached.
        location: ``"file.py:12"``, the line of the model that made the call, if known.
        calls: How often it was called, over all batches.
        fixed: Whether it depends on no input.
        quiet: ``int64``: on how many observations it was silent since the last batch in which it
            fired; all of them if it never did, or saw NaN only.
    """

    name: str
    kind: str
    producer: str | None
    unit_dim: int | tuple[int, ...]
    fired: Tensor
    fired_inputs: Tensor | None
    peak: Tensor
    nonfinite: Tensor
    magnitude: Tensor | None = None
    inputs: int = 0
    observations: int = 0
    silences: bool = True
    shape: tuple[int, ...] = ()
    location: str | None = None
    calls: int = 0
    fixed: bool = False
    quiet: Any = None

    @property
    def units(self) -> int:
        """Number of units."""
        return self.fired.numel()

    @property
    def noun(self) -> str:
        """What its units are: ``"units"`` or ``"pieces"``."""
        return "pieces" if self.kind == PIECE else "units"

    @property
    def rate(self) -> Tensor:
        """Share of the observations on which each unit fired, ``float64``, shape (units,)."""
        return self.fired.double() / max(self.observations, 1)

    @property
    def state(self) -> Tensor:
        """Place in ``STATES`` of the state of each unit, ``int64``, shape (units,).

        A *rare* unit fired on fewer than 1% of the inputs (of the observations, where
        ``fired_inputs`` is ``None``), one that is *always on* was never silent and acts linearly.
        """
        dead, rare, mixed, always_on, nonfinite, never_wins = range(len(STATES))
        state = torch.full_like(self.fired, mixed)
        if self.silences or self.kind == PIECE:
            seldom = self.fired < RARE * self.observations
            if self.fired_inputs is not None:
                seldom = self.fired_inputs < RARE * self.inputs
            state[seldom] = rare
            state[self.fired == self.observations] = always_on
            state[self.fired == 0] = dead if self.silences else never_wins
        state[self.nonfinite] = nonfinite
        return state

    @property
    def dead(self) -> Tensor:
        """Units silent on every observation, ``bool``, shape (units,)."""
        return self.state == STATES.index("dead")

    @property
    def rare(self) -> Tensor:
        """Units that fired, but on fewer than 1% of the inputs, ``bool``, shape (units,)."""
        return self.state == STATES.index("rare")

    @property
    def always_on(self) -> Tensor:
        """Units that were never silent, so that they act linearly, ``bool``, shape (units,)."""
        return self.state == STATES.index("always on")

    @property
    def at_risk(self) -> Tensor:
        """Living units that are rare or in the tenth of lowest peak: the next to die; ``bool``."""
        living = (self.fired > 0) & ~self.nonfinite & self.silences
        return living & self.rare | near_cliff(self.peak, living)

    @property
    def never_wins(self) -> Tensor:
        """Pieces of maxout that won on no observation, ``bool``, shape (units,)."""
        return self.state == STATES.index("never wins")

    @property
    def score(self) -> Tensor | None:
        """Mean absolute output over its mean across the layer; ``None`` unless ``family="all"``."""
        if self.magnitude is None:
            return None
        return self.magnitude / self.magnitude.mean().clamp(min=torch.finfo(torch.double).tiny)

    @property
    def dormant(self) -> Tensor | None:
        """Units with a score up to 0.025, ``bool``, shape (units,); ``None`` unscored."""
        score = self.score
        return None if score is None else score <= DORMANT

    @property
    def upper_bound(self) -> Tensor:
        """95% bound (:func:`silence_bound`) on rates that were 0: ``float64``; else NaN."""
        bound = torch.full((self.units,), silence_bound(self.inputs), dtype=torch.float64)
        return bound.masked_fill(~(self.dead | self.never_wins), torch.nan)

    @property
    def dead_fraction(self) -> float:
        """Share of dead units."""
        return int(self.dead.sum()) / max(self.units, 1)

    def counts(self) -> dict[str, int]:
        """Return how many units are in each state, by the names of ``STATES``."""
        counts = self.state.bincount(minlength=len(STATES))
        return dict(zip(STATES, counts.tolist(), strict=True))

    def __repr__(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in self.counts().items() if count)
        what = f"{self.name} ({self.kind}): {self.units} {self.noun}"
        return f"{what}, {states}; n = {self.inputs:,} inputs"


@dataclass(frozen=True, eq=False, repr=False)
class Report(UnitListing[SiteReport]):
    """What ``diagnose`` found: a table where printed; ``report["name"]``, ``report[0]`` are a site.

    Attributes:
        sites: One :class:`SiteReport` per rectifier, in the order of their first calls.
        inputs, batches: How many the model saw.
        notes: What could not be seen, or was left out on purpose, in words.
        example: The input of the first batch, as it was given; ``None`` with ``forward=``.
    """

    sites: list[SiteReport]
    inputs: int = 0
    batches: int = 0
    notes: list[str] = field(default_factory=list)
    example: Any = None

    def save(self, path: str | PathLike[str]) -> None:
        """Write all but ``example``, for :meth:`load`; OSError if that fails, old files stay."""
        kept = vars(replace(self, example=None)) | {"sites": [vars(site) for site in self.sites]}
        torch.save({"relubook report": VERSION, **kept}, file := io.BytesIO())
        write_whole(Path(path), file.getvalue())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Report":
        """Read what :meth:`save` wrote, and execute nothing, whoever wrote the file.

        OSError if it cannot be read; ValueError if it holds no report, or one of a newer version.
        """
        data = io.BytesIO(Path(path).read_bytes())
        try:
            fields = torch.load(data, weights_only=True)
            if (version := fields.pop("relubook report")) > VERSION:
                raise ValueError(f"it has version {version}, later than {VERSION}: update relubook")
            report = cls(**fields | {"sites": [SiteReport(**site) for site in fields["sites"]]})
            repr(report)  # all values are of a kind that can be shown
        except Exception as error:
            raise ValueError(f"{path} is no report that can be read here: {error}") from error
        return report

    def merge(self, *others: "Report") -> "Report":
        """Return one report on the data of all: of shards, processes or days, of one model.

        Counts, inputs and observations add up, so that no input should be in two; peaks take the
        maximum; a unit is non-finite if it is so in one: what one pass over all data gives, but for
        rounding in ``magnitude``. A site may be in some only. The first's example and shapes stay.

        TypeError for what is no report. ValueError, with the site's name, if sites of one name
        differ in kind, units, producer or line, or if one with a number (``#2``) is in some only.
        """
        reports = self, *map(_checked, others)
        names = [{site.name for site in report if "#" in site.name} for report in reports]
        if lone := sorted(set[str]().union(*names) - names[0].intersection(*names)):
            raise ValueError(f"{lone[0]} is not in all reports: its number may mean another site")
        sites: dict[str, SiteReport] = {}
        for site in (site for report in reports for site in report):
            sites[site.name] = _sum(sites[site.name], site) if site.name in sites else site
        notes = list(dict.fromkeys(note for report in reports for note in report.notes))
        total = {name: sum(getattr(r, name) for r in reports) for name in ("inputs", "batches")}
        return replace(self, sites=list(sites.values()), notes=notes, **total)

    def diff(self, later: "Report") -> "ReportDiff":
        """Return what changed from this report to a later one; TypeError for what is no report."""
        old, new = ({(s.name, s.kind, s.units): s for s in r} for r in (self, _checked(later)))
        both = {key[0]: (old[key], site) for key, site in new.items() if key in old}
        return ReportDiff(
            {name: b.rate - a.rate for name, (a, b) in both.items()},
            {name: b.dead & ~a.dead for name, (a, b) in both.items()},
            {name: a.dead & (b.fired > 0) for name, (a, b) in both.items()},
            [key[0] for key in new if key not in old],
            [key[0] for key in old if key not in new],
        )

    def write_html(self, path: str | PathLike[str], title: str = "Dead units") -> None:
        """Write a page that stands alone: no script, and nothing to load. OSError as in `save`."""
        head = Path(__file__).with_name("_page.html").read_text(encoding="utf-8")
        lines = [Template(head).substitute(title=escape(title)), self._repr_html_()]
        lines.append("</div><h2>Units, and a bar for the share that is dead</h2>")
        for site in self:
            share = f"{site.dead_fraction:.2%}"
            bar = f"background: linear-gradient(90deg, currentcolor {share}, #8883 0)"
            place = f"shape {site.shape}" + (f", {site.location}" if site.location else "")
            summary = f'<summary>{escape(repr(site))}<i style="{bar}"></i></summary>'
            lines.append(f"<details>{summary}<ul><li>{escape(place)}</li>")
            for k, state in enumerate(STATES):
                units = ", ".join(map(str, (site.state == k).nonzero().flatten().tolist()))
                if units and state != "mixed":
                    lines.append(f"<li>{state}: {units}</li>")
            lines.append("</ul></details>")
        write_whole(Path(path), "\n".join([*lines, "</main></html>\n"]))

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per unit.

        Its columns are ``site, kind, producer, unit, state, fired, observations, rate, inputs,
        fired_inputs, peak, upper_bound, score`` (NaN where it was not asked for) and ``at_risk``.
        """
        pandas = require("pandas", "tables of results")
        names = ("fired", "observations", "rate", "inputs", "fired_inputs", "peak", "upper_bound")
        frames = []
        for site in self.sites:
            cells: Any = {"site": site.name, "kind": site.kind, "producer": site.producer}
            states = [STATES[state] for state in site.state.tolist()]
            cells |= {"unit": range(site.units), "state": states}
            cells |= {name: getattr(site, name) for name in (*names, "score", "at_risk")}
            frame = pandas.DataFrame(tree_map_only(Tensor, Tensor.tolist, cells))
            frames.append(frame.astype({"fired_inputs": float, "score": float}))
        return pandas.concat(frames, ignore_index=True)

    def plot(self, axes: Any = None) -> Any:
        """Draw a bar per site, split by its units' states, on axes or a new figure; return that."""
        axes = axes or _axes(figsize=(5.2, 1.3 + 0.3 * len(self.sites)))
        counts = torch.tensor([list(site.counts().values()) for site in self.sites])
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        left = shares.cumsum(1) - shares
        for k, (state, (color, hatch)) in enumerate(LOOKS.items()):
            if shares[:, k].any():
                style = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
                bars = {"width": shares[:, k].tolist(), "left": left[:, k].tolist()}
                axes.barh(range(len(self)), **bars, label=state, **style)
        labels = [f"{s.name} ({s.units} {s.noun})".replace(" units)", ")") for s in self.sites]
        axes.set_yticks(range(len(labels)), labels, fontsize=9)
        axes.set(xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5), xlabel="share of the site's units")
        axes.set_title(f"{self.dead_fraction:.1%} of the units dead, n = {self.inputs:,} inputs")
        axes.grid(False)
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return axes.figure

    def plot_density(self, axes: Any = None) -> Any:
        """Draw histograms of log10 of the rates of the units that fired; return their figure."""
        axes = axes or _axes()
        low = -math.log10(max(1, *(site.observations for site in self.sites)))
        for site in self.sites:
            rates = site.rate[site.fired > 0].log10().tolist()
            label = f"{site.name}: {site.units - len(rates):,} of {site.units:,} never"
            axes.hist(rates, bins=50, range=(low, 0), histtype="step", label=label)
        axes.set(xlabel="log10 of the share of observations on which it fired", ylabel="units")
        axes.legend()
        return axes.figure

    @cached_property
    def _off_center(self) -> float:
        """How far the first batch is off center; 0 if its rows may be no inputs."""
        x, n = self.example, self.inputs
        rows = len(x) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 else 0
        batched = rows > 31 and rows - 1 < n <= rows * self.batches < n + rows
        return off_center(x) if batched and x.isfinite().all() else 0.0  # it may have changed since

    def _rows(self) -> list[list[str]]:
        columns = ["site", "kind", "units", "dead", "rare", "always on"]
        columns += ["never wins"] * any(site.kind == PIECE for site in self.sites)
        columns += ["non-finite"] * any(bool(site.nonfinite.any()) for site in self.sites)
        columns += ["dormant"] * any(site.score is not None for site in self.sites)
        rows = [[*columns, "median rate", "n"]]
        for site in self.sites:
            size = f"{site.units:,} {site.noun}".removesuffix(" units")
            cells = {"site": site.name, "kind": site.kind, "units": size}
            other = "dead" if site.kind == PIECE else "never wins"
            for state, count in site.counts().items():
                shown = (site.silences or site.kind == PIECE) and state != other
                cells[state] = f"{count:,}" if shown or state == "non-finite" else "-"
            cells["dormant"] = "-" if site.dormant is None else f"{int(site.dormant.sum()):,}"
            median = f"{float(site.rate.quantile(0.5)):.3f}" if site.units else "-"
            rows.append([*(cells[column] for column in columns), median, f"{site.inputs:,}"])
        return rows

    def _remarks(self) -> list[str]:
        remarks = super()._remarks()
        dead = f"dead unit{{s}} ({self.dead_fraction:.1%}). Silence", "unit's firing"
        idle = "maxout piece{s} without a win, which kills no unit. Losing", "piece's winning"
        for state, (words, whose) in {"dead": dead, "never wins": idle}.items():
            counts = [(site.inputs, own) for site in self.sites if (own := site.counts()[state])]
            if total := sum(own for _, own in counts):
                words, fewest = words.format(s="s" * (total > 1)), min(counts)[0]
                remarks.append(
                    f"{total:,} {words} on n = {fewest:,} inputs, if independent and not trained "
                    f"on, bounds a {whose} rate by {silence_bound(fewest):.2%} (95%)."
                )
        return [*remarks, *advice(self), *self.notes]


@dataclass(frozen=True, eq=False, repr=False)
class ReportDiff:
    """What changed from one report to another, by the names of sites: a table where printed.

    Attributes:
        change: Change of each unit's ``rate``, ``float64``, shape (units,), in the later order.
        newly_dead, revived: Units dead now only; dead before and firing again: ``bool``, (units,).
        appeared, disappeared: Sites in one report only, or with another kind or number of units.
    """

    change: dict[str, Tensor]
    newly_dead: dict[str, Tensor]
    revived: dict[str, Tensor]
    appeared: list[str]
    disappeared: list[str]

    def __repr__(self) -> str:
        rows, found = [["site", "units", "newly dead", "revived", "largest change of rate"]], []
        for name, change in self.change.items():
            rows.append([name, f"{len(change):,}"])
            for what, masks in (("newly dead", self.newly_dead), ("revived", self.revived)):
                units = masks[name].nonzero().flatten().tolist()
                rows[-1].append(f"{len(units):,}")
                found += [f"{name}, {what}: {units}"] * bool(units)
            rows[-1].append(f"{max(change.tolist(), key=abs, default=0.0):+.3f}")
        found += [f"appeared: {', '.join(self.appeared)}"] * bool(self.appeared)
        found += [f"disappeared: {', '.join(self.disappeared)}"] * bool(self.disappeared)
        return "\n".join([*plain_table(rows), *found])


def _axes(**options: Any) -> Any:
    return require("matplotlib.pyplot", "figures").subplots(layout="constrained", **options)[1]


def _checked(report: Report) -> Report:
    if not isinstance(report, Report):
        raise TypeError(f"a {type(report).__name__} is no Report of diagnose")
    return report


def _sum(one: SiteReport, two: SiteReport) -> SiteReport:
    for name in ("kind", "units", "unit_dim", "producer", "fixed", "location"):
        if (a := getattr(one, name)) != (b := getattr(two, name)):
            raise ValueError(f"{one.name}: its {name} is {a!r} in one report, {b!r} in another")
    both = {name: (value, getattr(two, name)) for name, value in vars(one).items()}
    added = "fired", "fired_inputs", "magnitude", "inputs", "observations", "calls"
    sums: dict[str, Any] = {k: None if None in both[k] else sum(both[k]) for k in added}
    if one.fixed:
        sums |= {"inputs": 1, "fired_inputs": (sums["fired"] > 0).long()}
    peak, nonfinite = torch.maximum(*both["peak"]), torch.logical_or(*both["nonfinite"])
    sums["quiet"] = two.quiet + one.quiet * (two.fired == 0)
    return replace(one, **sums, peak=peak, nonfinite=nonfinite)
