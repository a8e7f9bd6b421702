"""Listings of sites, and how they are printed."""

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, Generic, Self, TypeVar

import torch

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

    def filter(self, keep: str | Callable[[S], Any]) -> Self:
        """Return a listing of the sites that a name, a pattern or a function of the site fits.

        KeyError if a name or pattern, such as ``"encoder.*"``, fits none.
        """
        fits = keep if callable(keep) else lambda site: fnmatchcase(site.name, keep)
        sites = [site for site in self.sites if fits(site)]
        sites = sites if sites or callable(keep) else [self[keep]]
        return replace(self, sites=sites)  # type: ignore[type-var]

    def sorted(self, by: str | Callable[[S], Any]) -> Self:
        """Return a listing of the sites by falling value; ValueError if that is no number.

        The value is an attribute, as the mean over the units (``"dead"``, ``"rate"``, ``"units"``
        and so on), or what a function of the site returns.
        """
        value = by if callable(by) else attrgetter(by)
        try:
            numbers = {s.name: float(torch.as_tensor(value(s)).double().mean()) for s in self.sites}
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"by={by!r} gives no number; 'dead' would, or 'units'") from error
        sites = sorted(self.sites, key=lambda site: -numbers[site.name])
        return replace(self, sites=sites)  # type: ignore[type-var]


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
    """Return the lines of a table of a header and rows; ``words`` columns are flush left."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    aligned = [f"{'<' if k < words else '>'}{width}" for k, width in enumerate(widths)]
    lines = ["  ".join(map(format, row, aligned)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
