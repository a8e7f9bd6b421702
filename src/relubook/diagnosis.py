"""Which units of any model are dead, and on how many inputs that verdict rests."""

import html
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relubook._optional import require

__all__ = ["Report", "SiteReport"]

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
        """Whether all units are dead: the network is then constant behind the site."""
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
class Report:
    """What :func:`diagnose` found. ``print`` shows it as a table, Jupyter as a rich one.

    ``report["name"]`` is one site, ``len(report)`` their number, and iterating gives them in
    execution order.

    Attributes:
        sites: One :class:`SiteReport` per rectifier, in execution order.
        inputs: Number of inputs the model saw.
        batches: Number of batches it saw.
        skipped: Indices of batches that were left out because they held NaN or infinity.
        notes: What could not be seen, or was left out on purpose, in words.
    """

    sites: list[SiteReport]
    inputs: int = 0
    batches: int = 0
    skipped: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return any(site.name == name for site in self.sites)

    def __getitem__(self, name: str) -> SiteReport:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site {name!r}; the sites are {', '.join(s.name for s in self.sites)}")

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
        from relubook.plots import COLORS, WIDTH

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
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -1.1 / (1 + 0.3 * len(labels))), ncol=3
        )
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
                f"{dead:,} dead units ({self.dead_fraction:.1%}). Silence on n = {fewest:,} "
                "independent inputs bounds a unit's firing rate by "
                f"{silence_bound(fewest):.2%} (95%)."
            )
        if self.skipped:
            remarks.append(f"Left out for NaN or infinity: batches {self.skipped}.")
        return remarks + list(self.notes)

    def __repr__(self) -> str:
        header, rows = self._table()
        lines = [header, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        table.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join([*table, *self._remarks()])

    def _repr_html_(self) -> str:
        header, rows = self._table()

        def cells(tag: str, line: list[str]) -> str:
            return "".join(
                f'<{tag} style="text-align:{"left" if column < 2 else "right"}">'
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
