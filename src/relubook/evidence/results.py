"""What takes too long for a chapter: computed by ``make full``, stored, drawn and re-checked.

A computation returns, for one cell of its grid, a number (or truth value) a seed by quantity::

    @computation("collapse", grid={"depth": [5, 10], "width": [2, 4]}, seeds=500)
    def collapse(seeds, *, depth, width):
        run = train(Recipe(1, width, 1, hidden=depth).stack(seeds), x, y, steps=1000, lr=0.01)
        return {"collapsed": (run.dead[-1] == 1).any(1)}

``python -m relubook results collapse`` stores it as ``book/results/collapse.json``, with a
fingerprint of the code. A chapter draws what is stored and runs a slice of it again::

    live = get("collapse").run(grid={"depth": [10], "width": [2]}, seeds=range(30))
    assert_agrees(load("collapse"), live)
"""

import argparse
import contextlib
import datetime
import difflib
import importlib
import importlib.metadata
import itertools
import json
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from relubook._optional import require
from relubook.evidence._files import write_whole
from relubook.evidence.fingerprint import code_digest
from relubook.evidence.statistics import interval

__all__ = ["MODULES", "Computation", "Results", "assert_agrees", "computation", "compute", "get"]
__all__ += ["is_stale", "load", "main", "result_names"]

MODULES: tuple[str, ...] = tuple(
    f"chapters.{name}" for name in ("born_dead", "one_network", "optimizer_maps", "recurrent")
)
"""Modules that define computations; imported when one is asked for by name."""

# A change to these does not make a result stale.
_MECHANISM = tuple(f"evidence.{m}" for m in ("_files", "claims", "fingerprint", "results"))
_MECHANISM += ("_optional",)
_REGISTRY: dict[str, "Computation"] = {}

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

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers import what a module defines; what a notebook's cell defines travels by value.
        home, name = self.function.__module__, self.function.__name__
        if home != "__main__" and getattr(sys.modules.get(home), name, None) is self:
            return pkgutil.resolve_name, (f"{home}:{name}",)
        return Computation, (self.name, self.grid, self.seeds, self.function)

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

    def fingerprint(self) -> str:
        """Return the digest of the function and of all that it uses of the package."""
        source = Path(self.function.__code__.co_filename).read_text(encoding="utf-8")
        return code_digest(source, only=self.function.__name__, exclude=_MECHANISM)


def computation(
    name: str, *, grid: Grid, seeds: int | Iterable[int]
) -> Callable[[Callable[..., Any]], Computation]:
    """Register a function as a named computation.

    Args:
        name: Its name and that of its file: lower-case letters, digits and hyphens, not taken.
        grid: The values of each parameter, as JSON can hold them; the cells are their product.
        seeds: The seeds of every cell; a number m stands for ``range(m)``. ValueError if empty.
    """
    if not name or not all(c.islower() or c.isdigit() or c == "-" for c in name):
        raise ValueError(f"a name must have lower-case letters, digits and hyphens, not {name!r}")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise ValueError(f"{name!r} must declare at least one seed")
    if empty := [key for key, values in grid.items() if not len(values)]:
        raise ValueError(f"{name!r} must declare at least one value of {empty[0]!r}")

    def register(function: Callable[..., Any]) -> Computation:
        before = _REGISTRY.get(name)
        if before and before.function.__module__ != function.__module__:
            raise ValueError(f"{name!r} is already defined in {before.function.__module__}")
        plain = {key: list(values) for key, values in grid.items()}
        _REGISTRY[name] = Computation(name, plain, chosen, function)
        return _REGISTRY[name]

    return register


def result_names() -> list[str]:
    """Return the names of all computations."""
    for module in MODULES:
        importlib.import_module(f"relubook.{module}")
    return sorted(_REGISTRY)


def get(name: str) -> Computation:
    """Return a computation by its name; ValueError names the nearest if there is none."""
    if name not in _REGISTRY and name not in result_names():
        close = difflib.get_close_matches(name, _REGISTRY, cutoff=0.4) or result_names()
        raise ValueError(f"no computation {name!r}; known: {', '.join(close) or 'none'}")
    return _REGISTRY[name]


def load(name: str, folder: Path | str | None = None) -> Results:
    """Return a stored result with its record; FileNotFoundError says how to compute it.

    It lies in the folder given, else in that of the environment variable ``RELUBOOK_RESULTS``,
    else in ``book/results`` of the repository, else in the installed package.
    """
    path = _folder(folder) / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{name!r} is not stored; compute it by: make full NAMES={name}")
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(seeds := data["seeds"], Mapping):
        seeds = range(seeds["first"], seeds["last"] + 1)
    cells = {tuple(cell["at"].values()): cell["measured"] for cell in data["cells"]}
    record = {key: data[key] for key in ("versions", "date", "duration", "fingerprint")}
    return Results(data["name"], data["grid"], tuple(seeds), cells, record)


def is_stale(name: str, folder: Path | str | None = None) -> bool:
    """Whether what is stored was computed by other code, or for another grid or seeds."""
    stored, declared = load(name, folder), get(name)
    same = stored.seeds == declared.seeds and dict(stored.grid) == dict(declared.grid)
    return not same or stored.record["fingerprint"] != declared.fingerprint()


def assert_agrees(stored: Results, live: Results, *, rounding: float = 0.0) -> None:
    """Assert that a slice computed live contradicts nothing that is stored.

    Training is chaotic, so on another machine single networks end elsewhere. Each quantity of
    each cell is therefore judged by its differences at the same seeds, and so is the share of
    numbers that are not finite: :func:`~relubook.evidence.statistics.interval` bounds their mean.

    Args:
        stored: From :func:`load`.
        live: From :meth:`Computation.run`; ValueError if it is not part of what is stored.
        rounding: AssertionError names the cell and the quantity if the 99.9% interval of a mean
            difference lies beyond this, in the unit of the quantity.
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


def compute(name: str, folder: Path | str | None = None) -> Path:
    """Compute all cells, store the result, and return the file's path.

    Each finished cell is kept in ``NAME.partial``: an interrupted computation goes on from there,
    unless its code, grid or seeds have changed. ``RELUBOOK_JOBS`` workers (by default one a core)
    of one thread each compute.
    """
    joblib, tqdm = require("joblib", "stored results"), require("tqdm", "stored results")
    made, target = get(name), _folder(folder)
    jobs = os.environ.get("RELUBOOK_JOBS") or str(joblib.cpu_count())
    if not jobs.isdecimal() or not int(jobs):
        raise ValueError(f"RELUBOOK_JOBS must be a number of 1 or more, not {jobs!r}")
    target.mkdir(parents=True, exist_ok=True)
    first, last = made.seeds[0], made.seeds[-1]
    in_order = made.seeds == tuple(range(first, last + 1))
    head: dict[str, Any] = {"name": name, "grid": dict(made.grid)}
    head["seeds"] = {"first": first, "last": last} if in_order else made.seeds
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {lib: importlib.metadata.version(lib) for lib in ("numpy", "scikit-learn")}
    head |= {"fingerprint": made.fingerprint(), "versions": versions}
    partial, points = target / f"{name}.partial", made.points()
    done = _resume(partial, head)
    work = joblib.Parallel(n_jobs=int(jobs), return_as="generator_unordered")
    found = work(joblib.delayed(_measure)(made, key) for key in points if key not in done)
    # No bar unless somebody watches.
    bar = tqdm.tqdm(found, desc=name, total=len(points), initial=len(done), disable=None)
    with partial.open("a", encoding="utf-8") as file, contextlib.closing(found):
        for key, measured, took in bar:
            done[key] = measured, took
            print(json.dumps((key, measured, took)), file=file, flush=True)
    date, duration = datetime.datetime.now(datetime.UTC).date(), sum(t for _, t in done.values())
    head |= {"date": date.isoformat(), "duration": round(duration, 1)}
    # One line an entry and cell, so that a changed cell is one changed line.
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    cells = ({"at": dict(zip(made.grid, k, strict=True)), "measured": done[k][0]} for k in points)
    lines.append(' "cells": [\n  ' + ",\n  ".join(map(json.dumps, cells)) + "\n ]")
    write_whole(target / f"{name}.json", "{\n" + ",\n".join(lines) + "\n}\n")
    partial.unlink()
    return target / f"{name}.json"


def _measure(made: Computation, key: Cell) -> tuple[Cell, Measured, float]:
    before, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        return key, made.measure(key, made.seeds), time.perf_counter() - began
    finally:
        torch.set_num_threads(before)


def _resume(partial: Path, head: Mapping[str, Any]) -> dict[Cell, tuple[Measured, float]]:
    """Return the finished cells of an interrupted computation, or start its file."""
    done: dict[Cell, tuple[Measured, float]] = {}
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
    with contextlib.suppress(json.JSONDecodeError):  # a line cut short by the interruption
        if lines and json.loads(lines[0]) == json.loads(json.dumps(head)):
            for key, measured, took in map(json.loads, lines[1:]):
                done[tuple(key)] = measured, took
    kept = [json.dumps(head), *(json.dumps((key, *entry)) for key, entry in done.items())]
    write_whole(partial, "\n".join(kept) + "\n")
    return done


def _folder(folder: Path | str | None) -> Path:
    here = Path(__file__).parents[1]
    packed, kept = here / "_results", here.parents[1] / "book" / "results"
    default = packed if packed.is_dir() else kept
    return Path(folder or os.environ.get("RELUBOOK_RESULTS") or default)


def _plain(number: Any) -> float:
    """Return a number as JSON holds it, floats with six digits."""
    number = number.item() if hasattr(number, "item") else number
    return number if isinstance(number, bool | int) else float(f"{float(number):.6g}")


def _state(name: str, folder: Path | str | None) -> str:
    try:
        return "stale" if is_stale(name, folder) else "fresh"
    except FileNotFoundError:
        return "missing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute stored results: those named, or all that are missing or stale."""
    parser = argparse.ArgumentParser(prog="python -m relubook results", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="results to compute")
    parser.add_argument("--list", action="store_true", help="list names and their state")
    parser.add_argument("--folder", type=Path, help="where results are stored")
    options = parser.parse_args(arguments)
    known = result_names()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no computation {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    if options.list:
        for name in options.names or known:
            print(f"{name:<30} {_state(name, options.folder)}")
        return 0
    names = options.names or [n for n in known if _state(n, options.folder) != "fresh"]
    for name in names:
        try:
            path = compute(name, options.folder)
        except KeyboardInterrupt:
            print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        print(f"{name}: stored as {path.name}")
    if not names:
        print("nothing to do: every stored result is fresh")
    return 0
