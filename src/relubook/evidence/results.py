"""What takes too long for a notebook: computed once, stored, drawn, and compared with a slice.

A cell, tagged ``experiment``, computes a number or truth value a seed by quantity at one point::

    @computation("collapse", grid={"depth": [5, 10], "width": [2, 4]}, seeds=range(500))
    def collapse(seeds, *, depth, width):
        run = train(Recipe(1, width, 1, hidden=depth).stack(seeds), x, y, steps=1000, lr=0.01)
        return {"collapsed": (run.dead[-1] == 1).any(1)}

``make full NAMES=collapse`` runs the cells tagged ``setup``, ``lab`` and ``experiment``, then all
of the grid, and stores it as ``book/results/collapse.json`` with a fingerprint of the code.
Another cell draws what is stored, after it has computed a slice anew::

    stored = load("collapse")
    assert_agrees(stored, collapse.run(grid={"depth": [10], "width": [2]}, seeds=range(30)))
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relubook._optional import require
from relubook.evidence.statistics import interval

__all__ = ["Computation", "Results", "assert_agrees", "computation", "load"]

Cell = tuple[Any, ...]
Grid = Mapping[str, Sequence[Any]]
Measured = dict[str, list[float]]


@dataclass(frozen=True)
class Results:
    """Measurements over a grid, one number a cell, quantity and seed.

    A cell's key is the tuple of its values in the grid's order. ``record`` holds versions, date
    (UTC), seconds and fingerprint of a stored result.
    """

    name: str
    grid: Grid
    seeds: tuple[int, ...]
    cells: Mapping[Cell, Measured]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        grid = " x ".join(f"{name} ({len(values)})" for name, values in self.grid.items())
        return f"Results({self.name!r}, {grid or 'one cell'}, {len(self.seeds)} seeds)"

    def cell(self, **at: Any) -> Measured:
        """Return the numbers of one cell by quantity; KeyError names the grid."""
        key = tuple(at.get(name) for name in self.grid)
        if set(at) != set(self.grid) or key not in self.cells:
            raise KeyError(f"no cell {at}; the grid of {self.name!r} is {dict(self.grid)}")
        return self.cells[key]


@dataclass(frozen=True)
class Computation:
    """A named computation: ``function(seeds, **cell)`` returns one number a seed by quantity."""

    name: str
    grid: Grid
    seeds: tuple[int, ...]
    function: Callable[..., Mapping[str, Sequence[float]]]

    def points(self, grid: Grid | None = None) -> list[Cell]:
        """Return the cells of the grid, or of a slice of it; ValueError if it is no slice."""
        grid = self.grid if grid is None else grid
        if set(grid) != set(self.grid):
            raise ValueError(f"a slice of {self.name!r} must have {[*self.grid]}, not {[*grid]}")
        for name, value in ((key, value) for key in grid for value in grid[key]):
            if value not in self.grid[name]:
                raise ValueError(f"{name}={value!r} must be among {list(self.grid[name])}")
        return list(itertools.product(*(grid[name] for name in self.grid)))

    def measure(self, key: Cell, seeds: Sequence[int]) -> Measured:
        """Compute one cell; ValueError unless the function returns one number a seed."""
        at = dict(zip(self.grid, key, strict=True))
        measured = {}
        for quantity, values in self.function(list(seeds), **at).items():
            measured[quantity] = [_plain(number) for number in values]
            if len(values) != len(seeds):
                words = f"{len(values)} numbers of {quantity!r} for {len(seeds)} seeds at {at}"
                raise ValueError(f"{self.name!r} returned {words}")
        return measured

    def run(self, *, grid: Grid | None = None, seeds: Iterable[int] | None = None) -> Results:
        """Compute a slice of the grid and seeds; ValueError if it is not part of them."""
        chosen = self.seeds if seeds is None else tuple(seeds)
        if outside := sorted(set(chosen) - set(self.seeds)):
            raise ValueError(f"seed {outside[0]} must be among the seeds of {self.name!r}")
        cells = {key: self.measure(key, chosen) for key in self.points(grid)}
        return Results(self.name, dict(self.grid if grid is None else grid), chosen, cells)


def computation(
    name: str, *, grid: Grid, seeds: int | Iterable[int]
) -> Callable[[Callable[..., Any]], Computation]:
    """Make a function a named computation; ValueError for another name, or an empty grid or seeds.

    Args:
        name: That of its file too: lower-case letters, digits and hyphens, written out.
        grid: The values of each parameter, as JSON can hold them; the cells are their product.
        seeds: The seeds of every cell; a number m stands for ``range(m)``.
    """
    if not name or not all(c.islower() or c.isdigit() or c == "-" for c in name):
        raise ValueError(f"a name must have lower-case letters, digits and hyphens, not {name!r}")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise ValueError(f"{name!r} must declare at least one seed")
    if empty := [key for key, values in grid.items() if not len(values)]:
        raise ValueError(f"{name!r} must declare at least one value of {empty[0]!r}")
    plain = {key: list(values) for key, values in grid.items()}
    return lambda function: Computation(name, plain, chosen, function)


def load(name: str, folder: Path | str | None = None) -> Results:
    """Return a stored result with its record; FileNotFoundError says how to compute it.

    It lies in the folder given, else in the installed package or the repository's ``book/results``.
    """
    here = Path(__file__).parents[1]
    packed, kept = here / "_results", here.parents[1] / "book" / "results"
    path = Path(folder or (packed if packed.is_dir() else kept)) / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{name!r} is not stored; compute it by: make full NAMES={name}")
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(seeds := data["seeds"], Mapping):
        seeds = range(seeds["first"], seeds["last"] + 1)
    cells = {tuple(cell["at"].values()): cell["measured"] for cell in data["cells"]}
    record = {key: data[key] for key in ("versions", "date", "duration", "fingerprint")}
    return Results(data["name"], data["grid"], tuple(seeds), cells, record)


def assert_agrees(stored: Results, live: Results, *, rounding: float = 0.0) -> None:
    """Assert that a slice computed live contradicts nothing that is stored.

    Training is chaotic, so on another machine single networks end elsewhere. So each quantity of
    each cell is judged by its differences at the same seeds, and so is the share of numbers that
    are finite: AssertionError if the 99.9% interval of their mean lies beyond ``rounding``, in the
    unit of the quantity. ValueError if what is live is not part of what is stored.
    """
    np = require("numpy", "stored results")
    place = {seed: i for i, seed in enumerate(stored.seeds)}
    known = stored.name == live.name and set(stored.grid) == set(live.grid)
    if not known or set(live.seeds) - set(place):
        raise ValueError(f"{live!r} with seeds {live.seeds} must be a slice of {stored!r}")
    for key, measured in live.cells.items():
        there = stored.cell(**dict(zip(live.grid, key, strict=True)))
        if set(there) != set(measured):
            raise AssertionError(f"{key}: {sorted(there)} is stored, not {sorted(measured)}")
        for what, values in measured.items():
            before = [there[what][place[seed]] for seed in live.seeds]
            pair = np.array([before, values], dtype=float)
            finite = np.isfinite(pair)
            _compare(f"{stored.name} at {key}, share of finite {what}", finite.astype(float), 0)
            _compare(f"{stored.name} at {key}, {what}", pair[:, finite.all(0)], rounding)


def _compare(what: str, pair: Any, rounding: float) -> None:
    before, now = pair
    if (now == before).all():
        return
    reach = pair.max() - pair.min()
    _, low, high = interval(now - before, confidence=0.999, within=(-reach, reach))
    if low > rounding or high < -rounding:
        raise AssertionError(
            f"{what}: mean {now.mean():.4g}, stored {before.mean():.4g}; the 99.9% interval of the "
            f"difference, {low:.3g} to {high:.3g}, lies beyond the rounding of {rounding:g}"
        )


def _plain(number: Any) -> float:
    """Return a number as JSON holds it, floats with six digits."""
    number = number.item() if hasattr(number, "item") else number
    return number if isinstance(number, bool | int) else float(f"{float(number):.6g}")
