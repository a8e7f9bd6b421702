"""What every report on a model shares, and the report of ``diagnose``."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from relubook._optional import require
from relubook.units._kinds import PIECE
from relubook.units.risk import advice, near_cliff

__all__ = ["RARE", "STATES", "Report", "SiteReport", "silence_bound"]

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
DORMANT = 0.025
"""Largest score of a dormant unit (Sokar et al. 2023, https://arxiv.org/abs/2302.12902)."""

S = TypeVar("S", bound=Any)


class SiteListing(Generic[S]):
    """Sites in execution order, each to be had by its name or its place."""

    sites: Sequence[S]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[S]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return any(site.name == name for site in self.sites)

    def __getitem__(self, key: str | int) -> S:
        if isinstance(key, int):
            return self.sites[key]
        for site in self.sites:
            if site.name == key:
                return site
        raise KeyError(f"no site {key!r}; the sites are {', '.join(s.name for s in self.sites)}")


class UnitListing(SiteListing[S]):
    """Sites with ``units`` of which some are ``dead`` or ``nonfinite``; ``print`` shows a table."""

    @property
    def dead_fraction(self) -> float:
        """Share of dead units among the units of all rectifiers, without pieces or dormant ones."""
        units = sum(site.units for site in self.sites if site.silences)
        return sum(int(site.dead.sum()) for site in self.sites) / max(units, 1)

    @property
    def dead_layers(self) -> list[str]:
        """Names of the sites whose units are all dead."""
        return [site.name for site in self.sites if 0 < site.units == int(site.dead.sum())]

    def assert_alive(self, max_dead: float = 0.0) -> None:
        """Raise AssertionError unless every site is alive: for tests and continuous integration.

        No site may have a larger share of dead units than ``max_dead``, from 0 to 1 (else
        ValueError), nor a unit that saw NaN or infinity. Dead layers fail at any value below 1.
        """
        if not 0 <= max_dead <= 1:
            raise ValueError(f"max_dead must be a share of units from 0 to 1, not {max_dead}")
        faults = []
        for site in self.sites:
            dead, bad = int(site.dead.sum()), int(site.nonfinite.sum())
            if bad or dead / max(site.units, 1) > max_dead:
                whole = ", the whole layer" if dead == site.units else ""
                share = f"{dead} of {site.units} units dead{whole}"
                faults.append(f"{site.name}: {share}, {bad} non-finite")
        if faults:
            head = f"more than {max_dead:.1%} dead units in a site, or non-finite ones:"
            raise AssertionError("\n  ".join([head, *faults]))

    def _rows(self) -> list[list[str]]:
        rows = [["site", "units", "dead", "non-finite"]]
        for site in self.sites:
            counts = (site.units, int(site.dead.sum()), int(site.nonfinite.sum()))
            rows.append([site.name, *(f"{count:,}" for count in counts)])
        return rows

    def _remarks(self) -> list[str]:
        """Return what must not be overlooked in the table."""
        remarks = [
            f"DEAD LAYER: all {self[name].units} units of {name} are dead: "
            "the network is constant behind it (save for paths around it)."
            for name in self.dead_layers
        ]
        return remarks + [
            f"NON-FINITE: {bad} {site.noun} of {site.name} saw NaN or infinity; this is no silence."
            for site in self.sites
            if (bad := int(site.nonfinite.sum()))
        ]

    def __repr__(self) -> str:
        rows = self._rows()
        return "\n".join([*plain_table(rows, words=rows[0].index("units")), *self._remarks()])

    def _repr_html_(self) -> str:
        cells = [[html.escape(cell) for cell in row] for row in self._rows()]
        header, *rows = (f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells)
        table = f"<thead>{header.replace('td>', 'th>')}</thead><tbody>{''.join(rows)}</tbody>"
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return f"<table>{table}</table>{remarks}"


def plain_table(rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Return the lines of a table, given its header and rows, with a rule below the header.

    So many of its first columns as ``words`` says are set flush left; the others hold numbers.
    """
    aligned = [
        f"{'<' if column < words else '>'}{max(map(len, cells))}"
        for column, cells in enumerate(zip(*rows, strict=True))
    ]
    lines = ["  ".join(map(format, row, aligned)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


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
        fired_inputs: ``int64``: on how many inputs it fired at one position at least. ``None``
            where the inputs cannot be told apart at the site.
        peak: Largest pre-activation.
        nonfinite: ``bool``: some pre-activation was NaN or infinite, which is no silence.
        magnitude: ``float64``: sum of its absolute outputs; ``None`` unless ``family="all"``.
        inputs: Number of independent inputs that reached the site; 1 if it depends on none.
        observations: Number of values seen per unit: inputs times positions times calls.
        silences: Whether the function can be silent; else no unit is ever dead.
        shape: Shape of the rectifier's input when the site was first reached.
        location: ``"file.py:12"``, the line of the model that made the call, if known.
        calls: How often it was called, over all batches.
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
        """Living units that are rare or in the tenth with the lowest peaks, ``bool``, (units,).

        At the edge of usable rates they die twice as often as others (claim tool-rare-are-next).
        """
        living = ~(self.dead | self.nonfinite) & self.silences
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
        """95% upper bound on the rate of each unit that never fired, ``float64``; else NaN.

        It counts inputs, not positions: see :func:`silence_bound`.
        """
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

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per unit.

        Its columns are ``site, kind, producer, unit, state, fired, observations, rate, inputs,
        fired_inputs, peak, upper_bound, score`` (NaN where it was not asked for) and ``at_risk``.
        """
        pandas = require("pandas", "tables of results")
        names = ("kind", "producer", "fired", "observations", "rate", "inputs", "fired_inputs")
        frames = []
        for site in self.sites:
            cells = {name: getattr(site, name) for name in (*names, "peak", "upper_bound", "score")}
            cells["at_risk"] = site.at_risk
            frame = pandas.DataFrame(tree_map_only(Tensor, Tensor.tolist, cells))
            frame.insert(0, "site", site.name)
            frame.insert(3, "unit", range(site.units))
            frame.insert(4, "state", [STATES[state] for state in site.state.tolist()])
            frames.append(frame.astype({"fired_inputs": float, "score": float}))
        return pandas.concat(frames, ignore_index=True)

    def plot(self, axes: Any = None) -> Any:
        """Draw a bar per site, split by its units' states, on axes or a new figure; return that."""
        if axes is None:
            size = (5.2, 1.3 + 0.3 * len(self.sites))
            pyplot = require("matplotlib.pyplot", "figures")
            axes = pyplot.subplots(figsize=size, layout="constrained")[1]
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
                    f"{total:,} {words} on n = {fewest:,} independent inputs bounds a {whose} rate "
                    f"by {silence_bound(fewest):.2%} (95%)."
                )
        return [*remarks, *advice(self), *self.notes]
