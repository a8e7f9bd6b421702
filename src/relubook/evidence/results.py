"""What takes too long for a chapter: computed by ``make full``, stored, drawn and re-checked.

A computation has a name, a declared grid, seeds, and a function that returns, for one cell of the
grid, a number (or truth value) a seed for each quantity it measures::

    @computation("collapse", grid={"depth": [5, 10], "width": [2, 4]}, seeds=range(500))
    def collapse(seeds, *, depth, width):
        run = train_many(Recipe(1, width, 1, depth=depth), x, y, seeds=seeds, steps=1000, lr=0.01)
        return {"collapsed": (run.dead[-1] == 1).any(1).tolist()}

``python -m relubook results collapse`` stores it as ``book/results/collapse.json`` with grid,
seeds, versions, date, duration and a fingerprint of the code. A chapter draws what is stored, runs
a declared slice anew and asserts that the two agree::

    stored = load("collapse")
    live = get("collapse").run(grid={"depth": [10], "width": [2]}, seeds=range(30))
    assert_agrees(stored, live, tolerance=0.1)
"""

import argparse
import contextlib
import datetime
import difflib
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from relubook._optional import require
from relubook.evidence._files import write_whole
from relubook.evidence.fingerprint import code_digest

__all__ = ["MODULES", "Computation", "Results", "assert_agrees", "computation", "compute", "get"]
__all__ += ["is_stale", "load", "main", "result_names"]

MODULES: tuple[str, ...] = tuple(
    f"chapters.{name}" for name in ("born_dead", "one_network", "optimizer_maps", "recurrent")
)
"""Modules of the package that define computations; imported when one is asked for by name."""

# They hold no part of a result; a change to them does not make one stale.
_MECHANISM = tuple(f"evidence.{m}" for m in ("_files", "claims", "fingerprint", "results"))
_MECHANISM += ("_optional",)

_REGISTRY: dict[str, "Computation"] = {}

Cell = tuple[Any, ...]
Grid = Mapping[str, Sequence[Any]]
Measured = dict[str, list[float]]


@dataclass(frozen=True)
class Results:
    """Measurements over a grid, one number a cell, quantity and seed.

    Attributes:
        name: Name of the computation.
        grid: The values of each parameter.
        seeds: The seeds, in the order of the numbers.
        cells: For each cell, as the tuple of its parameters' values in the grid's order, the
            numbers by quantity.
        record: Versions, date (UTC), duration in seconds and fingerprint of a stored result;
            empty for a live one.
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
        """Return the numbers of one cell by quantity.

        Raises:
            KeyError: If there is no such cell; names the grid.
        """
        key = tuple(at.get(name) for name in self.grid)
        if set(at) != set(self.grid) or key not in self.cells:
            raise KeyError(f"no cell {at}; the grid of {self.name!r} is {dict(self.grid)}")
        return self.cells[key]


@dataclass(frozen=True)
class Computation:
    """A named computation with its declared grid and seeds.

    Attributes:
        name: Its name, and that of its file.
        grid: The values of each parameter; the cells are their product.
        seeds: The seeds of every cell.
        function: ``function(seeds, **cell)`` returns for each quantity one number a seed.
    """

    name: str
    grid: Grid
    seeds: tuple[int, ...]
    function: Callable[..., Mapping[str, Sequence[float]]]

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers import what a module defines; what a notebook's cell defines travels by value.
        home, name = self.function.__module__, self.function.__name__
        if home != "__main__" and getattr(sys.modules.get(home), name, None) is self:
            return _named, (home, name)
        return Computation, tuple(getattr(self, entry.name) for entry in fields(self))

    def points(self, grid: Grid | None = None) -> list[Cell]:
        """Return the cells of the grid, or of a slice of it, in order.

        Raises:
            ValueError: If the slice has other parameters or values than the grid.
        """
        grid = self.grid if grid is None else grid
        if set(grid) != set(self.grid):
            raise ValueError(
                f"a slice of {self.name!r} must have {list(self.grid)}, not {list(grid)}"
            )
        for name, values in grid.items():
            for value in values:
                if value not in self.grid[name]:
                    raise ValueError(f"{name}={value!r} must be among {list(self.grid[name])}")
        return list(itertools.product(*(grid[name] for name in self.grid)))

    def measure(self, key: Cell, seeds: Sequence[int]) -> Measured:
        """Compute one cell.

        Raises:
            ValueError: If the function does not return one number a seed.
        """
        at = dict(zip(self.grid, key, strict=True))
        measured = {}
        for quantity, values in self.function(list(seeds), **at).items():
            numbers = values.tolist() if hasattr(values, "tolist") else list(values)
            if len(numbers) != len(seeds):
                raise ValueError(
                    f"{self.name!r} returned {len(numbers)} numbers of {quantity!r} for "
                    f"{len(seeds)} seeds at {at}"
                )
            measured[quantity] = [_plain(number) for number in numbers]
        return measured

    def run(self, *, grid: Grid | None = None, seeds: Iterable[int] | None = None) -> Results:
        """Compute a declared slice live: some values of each parameter, some seeds.

        Raises:
            ValueError: If the slice is not part of the declared grid and seeds.
        """
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
        name: Its name, and that of its file: lower-case letters, digits and hyphens.
        grid: The values of each parameter, as JSON can hold them.
        seeds: The seeds of every cell; a number m stands for ``range(m)``.

    Returns:
        A decorator that turns ``function(seeds, **cell)`` into a :class:`Computation`.

    Raises:
        ValueError: If the name is taken or malformed, or grid or seeds are empty.
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
    """Return a computation by its name.

    Raises:
        ValueError: If there is none; names the nearest.
    """
    if name not in _REGISTRY and name not in result_names():
        close = difflib.get_close_matches(name, _REGISTRY, cutoff=0.4) or result_names()
        raise ValueError(f"no computation {name!r}; known: {', '.join(close) or 'none'}")
    return _REGISTRY[name]


def load(name: str, folder: Path | str | None = None) -> Results:
    """Return a stored result.

    Args:
        name: Name of the computation.
        folder: Where results are stored: that of the environment variable ``RELUBOOK_RESULTS``,
            else ``book/results`` of the repository, else what the installed package brings.

    Returns:
        The measurements with their record.

    Raises:
        FileNotFoundError: If nothing is stored under that name; says how to compute it.
    """
    path = _folder(folder) / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{name!r} is not stored; compute it by: make full NAMES={name}")
    data = json.loads(path.read_text(encoding="utf-8"))
    seeds = data["seeds"]
    if isinstance(seeds, Mapping):
        seeds = range(seeds["first"], seeds["last"] + 1)
    cells = {tuple(cell["at"].values()): cell["measured"] for cell in data["cells"]}
    record = {key: data[key] for key in ("versions", "date", "duration", "fingerprint")}
    return Results(data["name"], data["grid"], tuple(seeds), cells, record)


def is_stale(name: str, folder: Path | str | None = None) -> bool:
    """Whether what is stored was computed by other code, or for another grid or seeds.

    Raises:
        FileNotFoundError: If nothing is stored under that name.
    """
    stored, declared = load(name, folder), get(name)
    same = stored.seeds == declared.seeds and dict(stored.grid) == dict(declared.grid)
    return not same or stored.record["fingerprint"] != declared.fingerprint()


def assert_agrees(
    stored: Results, live: Results, *, tolerance: float | Mapping[str, float]
) -> None:
    """Assert that a slice computed live agrees with what is stored.

    For each cell and quantity of the slice, the means over the slice's seeds are compared: the
    same seeds stand on both sides, so that only rounding, amplified by training, tells them
    apart. Non-finite numbers must be equally many, within the tolerance as a share.

    Args:
        stored: From :func:`load`.
        live: From :meth:`Computation.run`.
        tolerance: Largest difference of two means, in the unit of the quantity; one for all or by
            quantity. 0 asks for equality seed by seed.

    Raises:
        AssertionError: If they differ; names cell, quantity and both means.
        ValueError: If the slice is not part of what is stored.
    """
    if stored.name != live.name or set(stored.grid) != set(live.grid):
        raise ValueError(f"{live!r} is no slice of {stored!r}")
    place = {seed: i for i, seed in enumerate(stored.seeds)}
    if outside := [seed for seed in live.seeds if seed not in place]:
        raise ValueError(f"seed {outside[0]} is not stored in {stored!r}")
    for key, measured in live.cells.items():
        at = dict(zip(live.grid, key, strict=True))
        there = stored.cell(**at)
        words = f"{stored.name} at {at} measured {set(there)}, not {set(measured)}"
        assert set(there) == set(measured), words
        for quantity, values in measured.items():
            limit = tolerance[quantity] if isinstance(tolerance, Mapping) else tolerance
            before = torch.tensor([there[quantity][place[seed]] for seed in live.seeds]).double()
            now = torch.tensor(values).double()
            where = f"{stored.name} at {at}, {quantity}"
            if limit == 0:
                same = torch.equal(before.isnan(), now.isnan())
                same = same and torch.equal(before.nan_to_num(), now.nan_to_num())
                assert same, f"{where}: the numbers differ from those stored"
                continue
            lost = [1 - side.isfinite().double().mean().item() for side in (before, now)]
            words = f"{where}: {lost[1]:.3g} are non-finite, {lost[0]:.3g} stored"
            assert abs(lost[0] - lost[1]) <= limit, words
            means = [side[side.isfinite()].mean().item() for side in (before, now)]
            words = f"{where}: mean {means[1]:.4g}, stored {means[0]:.4g}, tolerance {limit:g}"
            # A side without finite numbers has no mean; the shares have agreed.
            assert abs(means[0] - means[1]) <= limit or math.isnan(sum(means)), words


def compute(name: str, folder: Path | str | None = None) -> Path:
    """Compute all cells, several at a time, and store the result.

    Each finished cell is kept in ``NAME.partial``, so that an interrupted computation goes on
    where it stopped, unless its code, grid or seeds have changed. The workers, of one thread each,
    are joblib's: ``RELUBOOK_JOBS`` or as many as there are cores.

    Args:
        name: Name of the computation.
        folder: Where to store; see :func:`load`.

    Returns:
        Path of the stored file.

    Raises:
        ValueError: If there is no such computation.
    """
    joblib, tqdm = require("joblib", "stored results"), require("tqdm", "stored results")
    made, target = get(name), _folder(folder)
    jobs = os.environ.get("RELUBOOK_JOBS") or str(joblib.cpu_count())
    if not jobs.isdecimal() or not int(jobs):
        raise ValueError(f"RELUBOOK_JOBS must be a number of 1 or more, not {jobs!r}")
    target.mkdir(parents=True, exist_ok=True)
    first, last = made.seeds[0], made.seeds[-1]
    in_order = made.seeds == tuple(range(first, last + 1))
    seeds = {"first": first, "last": last} if in_order else made.seeds
    head: dict[str, Any] = {"name": name, "grid": dict(made.grid), "seeds": seeds}
    head |= {"fingerprint": made.fingerprint(), "versions": _versions()}
    partial, points = target / f"{name}.partial", made.points()
    done = _resume(partial, head)
    work = joblib.Parallel(n_jobs=int(jobs), return_as="generator_unordered")
    found = work(joblib.delayed(_measure)(made, key) for key in points if key not in done)
    # No bar unless somebody watches.
    bar = tqdm.tqdm(found, desc=name, total=len(points), initial=len(done), disable=None)
    with partial.open("a", encoding="utf-8") as file, contextlib.closing(found):
        for key, measured, took in bar:
            done[key] = measured, took
            file.write(_line(key, measured, took))
            file.flush()
    date, duration = datetime.datetime.now(datetime.UTC).date(), sum(t for _, t in done.values())
    data = {**head, "date": date.isoformat(), "duration": round(duration, 1)}
    # One line an entry and cell, so that a changed cell is one changed line.
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
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


def _named(module: str, name: str) -> Computation:
    return getattr(importlib.import_module(module), name)


def _resume(partial: Path, head: Mapping[str, Any]) -> dict[Cell, tuple[Measured, float]]:
    """Return the finished cells of an interrupted computation, or start its file."""
    done: dict[Cell, tuple[Measured, float]] = {}
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
    with contextlib.suppress(json.JSONDecodeError):  # a line cut short by the interruption
        if lines and json.loads(lines[0]) == json.loads(json.dumps(head)):
            for cell in map(json.loads, lines[1:]):
                done[tuple(cell["key"])] = cell["measured"], cell["seconds"]
    kept = [_line(key, *entry) for key, entry in done.items()]
    write_whole(partial, json.dumps(head) + "\n" + "".join(kept))
    return done


def _line(key: Cell, measured: Measured, seconds: float) -> str:
    return json.dumps({"key": list(key), "measured": measured, "seconds": seconds}) + "\n"


def _folder(folder: Path | str | None) -> Path:
    if folder is not None:
        return Path(folder)
    if chosen := os.environ.get("RELUBOOK_RESULTS"):
        return Path(chosen)
    here = Path(__file__).parents[1]
    packed = here / "_results"
    return packed if packed.is_dir() else here.parents[1] / "book" / "results"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for library in ("numpy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


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
