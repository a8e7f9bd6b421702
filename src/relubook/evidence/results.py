"""What takes too long for a chapter: computed by ``make full``, stored, drawn and re-checked.

A computation has a name, a declared grid, seeds, and a function that returns, for one cell of the
grid, a number (or truth value) a seed for each quantity it measures::

    @computation("collapse", grid={"depth": [5, 10], "width": [2, 4]}, seeds=range(500))
    def collapse(seeds, *, depth, width):
        run = train_many(Recipe(1, width, 1, depth=depth), x, y, seeds=seeds, steps=1000, lr=0.01)
        return {"collapsed": (run.dead[-1] == 1).any(1).tolist()}

``python -m relubook.evidence.results collapse`` stores it as ``book/results/collapse.json`` with grid,
seeds, versions, date, duration and a fingerprint of the sources. A chapter draws what is stored,
runs a declared slice anew and asserts that the two agree::

    stored = load("collapse")
    live = get("collapse").run(grid={"depth": [10], "width": [2]}, seeds=range(30))
    assert_agrees(stored, live, tolerance=0.1)

A module that defines computations is named in :data:`MODULES`.
"""

import argparse
import contextlib
import datetime
import difflib
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from relubook._optional import require
from relubook.evidence.fingerprint import code_only, imported_modules, sources_digest

__all__ = [
    "MODULES",
    "Computation",
    "Results",
    "assert_agrees",
    "computation",
    "compute",
    "get",
    "is_stale",
    "load",
    "main",
    "result_names",
]

MODULES: tuple[str, ...] = (
    "chapters.born_dead",
    "chapters.one_network",
    "chapters.optimizer_maps",
    "chapters.recurrent",
)
"""Modules of the package that define computations."""

# They hold no part of a result; a change to them does not make one stale.
_MECHANISM = ("evidence.results", "evidence.fingerprint", "_optional")

_REGISTRY: dict[str, "Computation"] = {}

Cell = dict[str, Any]
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
    grid: Mapping[str, Sequence[Any]]
    seeds: tuple[int, ...]
    cells: Mapping[tuple[Any, ...], Measured]
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

    def to_frame(self) -> Any:
        """Return a tidy ``pandas.DataFrame``: one row a cell and seed, one column a quantity."""
        pd = require("pandas", "tables of results")
        rows = []
        for key, measured in self.cells.items():
            at = dict(zip(self.grid, key, strict=True))
            for place, seed in enumerate(self.seeds):
                numbers = {quantity: values[place] for quantity, values in measured.items()}
                rows.append(at | {"seed": seed} | numbers)
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Computation:
    """A named computation with its declared grid and seeds.

    Attributes:
        name: Its name, and that of its file.
        grid: The values of each parameter; the cells are their product.
        seeds: The seeds of every cell.
        function: ``function(seeds, **cell)`` returns for each quantity one number a seed.
        module: Short name of the module that defines it.
    """

    name: str
    grid: Mapping[str, Sequence[Any]]
    seeds: tuple[int, ...]
    function: Callable[..., Mapping[str, Sequence[float]]]
    module: str

    def keys(self, grid: Mapping[str, Sequence[Any]] | None = None) -> list[tuple[Any, ...]]:
        """Return the cells of the grid, or of a slice of it, in order.

        Raises:
            ValueError: If the slice has other parameters or values than the grid.
        """
        grid = self.grid if grid is None else grid
        if set(grid) != set(self.grid):
            raise ValueError(
                f"{self.name!r} has the parameters {list(self.grid)}, not {list(grid)}"
            )
        for name, values in grid.items():
            if outside := [value for value in values if value not in self.grid[name]]:
                raise ValueError(
                    f"{name}={outside[0]!r} is not in the declared grid {list(self.grid[name])}"
                )
        return list(itertools.product(*(grid[name] for name in self.grid)))

    def measure(self, key: tuple[Any, ...], seeds: Sequence[int]) -> Measured:
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

    def run(
        self,
        *,
        grid: Mapping[str, Sequence[Any]] | None = None,
        seeds: Iterable[int] | None = None,
    ) -> Results:
        """Compute a declared slice live.

        Args:
            grid: Some of the values of each parameter; the whole grid by default.
            seeds: Some of the seeds; all by default.

        Returns:
            The measurements.

        Raises:
            ValueError: If the slice is not part of the declared grid and seeds.
        """
        chosen = self.seeds if seeds is None else tuple(seeds)
        if outside := sorted(set(chosen) - set(self.seeds)):
            raise ValueError(f"seed {outside[0]} is not among the declared seeds of {self.name!r}")
        keys = self.keys(grid)
        cells = {key: self.measure(key, chosen) for key in keys}
        return Results(self.name, dict(grid or self.grid), chosen, cells)

    def fingerprint(self) -> str:
        """Return the digest of the module that defines it and of all that it imports.

        A module outside the package counts with what it imports of the package.
        """
        package, _, short = self.module.partition(".")
        if package == "relubook":
            return sources_digest([short], exclude=_MECHANISM)
        source = Path(self.function.__code__.co_filename).read_text(encoding="utf-8")
        inner = [name for name in imported_modules(source) if name not in _MECHANISM]
        digest = hashlib.sha256(code_only(source).encode())
        digest.update(sources_digest(inner, exclude=_MECHANISM).encode())
        return digest.hexdigest()


def computation(
    name: str, *, grid: Mapping[str, Sequence[Any]], seeds: int | Iterable[int]
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
        raise ValueError(f"a name has lower-case letters, digits and hyphens, not {name!r}")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise ValueError(f"{name!r} declares no seed")
    if empty := [key for key, values in grid.items() if not len(values)]:
        raise ValueError(f"{name!r} declares no value of {empty[0]!r}")

    def register(function: Callable[..., Any]) -> Computation:
        module = function.__module__
        if name in _REGISTRY and _REGISTRY[name].module != module:
            raise ValueError(f"{name!r} is already defined in {_REGISTRY[name].module}")
        made = Computation(
            name, {key: list(values) for key, values in grid.items()}, chosen, function, module
        )
        _REGISTRY[name] = made
        return made

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
        close = difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.4)
        raise ValueError(
            f"no computation {name!r}; known: {', '.join(close or result_names()) or 'none'}"
        )
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
    kept = ("versions", "date", "duration", "fingerprint")
    return Results(
        data["name"],
        data["grid"],
        tuple(_from_seeds(data["seeds"])),
        {tuple(cell["at"].values()): cell["measured"] for cell in data["cells"]},
        {key: data[key] for key in kept},
    )


def is_stale(name: str, folder: Path | str | None = None) -> bool:
    """Whether what is stored was computed by other sources, or for another grid or seeds.

    Raises:
        FileNotFoundError: If nothing is stored under that name.
    """
    stored, declared = load(name, folder), get(name)
    same = (
        stored.record["fingerprint"] == declared.fingerprint()
        and dict(stored.grid) == dict(declared.grid)
        and stored.seeds == declared.seeds
    )
    return not same


def assert_agrees(
    stored: Results,
    live: Results,
    *,
    tolerance: float | Mapping[str, float],
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
        if set(there) != set(measured):
            raise AssertionError(
                f"{stored.name} at {at} measured {set(there)}, not {set(measured)}"
            )
        for quantity, values in measured.items():
            limit = tolerance if isinstance(tolerance, int | float) else tolerance[quantity]
            before = [float(there[quantity][place[seed]]) for seed in live.seeds]
            now = [float(value) for value in values]
            where = f"{stored.name} at {at}, {quantity}"
            if limit == 0:
                same = all(a == b or (a != a and b != b) for a, b in zip(before, now, strict=True))
                assert same, f"{where}: the numbers differ from those stored"
                continue
            lost = [[v for v in side if not math.isfinite(v)] for side in (before, now)]
            shares = [len(side) / len(now) for side in lost]
            assert abs(shares[0] - shares[1]) <= limit, (
                f"{where}: {shares[1]:.3g} are non-finite, {shares[0]:.3g} stored"
            )
            means = [_mean([v for v in side if math.isfinite(v)]) for side in (before, now)]
            if None not in means:
                assert abs(means[0] - means[1]) <= limit, (  # type: ignore[operator]
                    f"{where}: mean {means[1]:.4g}, stored {means[0]:.4g}, tolerance {limit:g}"
                )


def compute(
    name: str,
    folder: Path | str | None = None,
    *,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Compute all cells and store the result.

    Each finished cell is kept in ``NAME.partial``, so that an interrupted computation goes on
    where it stopped, unless its sources, grid or seeds have changed.

    Args:
        name: Name of the computation.
        folder: Where to store; see :func:`load`.
        report: Is called with a line of progress after each cell.

    Returns:
        Path of the stored file.

    Raises:
        ValueError: If there is no such computation.
    """
    made, target = get(name), _folder(folder)
    target.mkdir(parents=True, exist_ok=True)
    head: dict[str, Any] = {
        "name": name,
        "grid": dict(made.grid),
        "seeds": _as_seeds(made.seeds),
        "fingerprint": made.fingerprint(),
        "versions": _versions(),
    }
    partial = target / f"{name}.partial"
    done, spent = _resume(partial, head)
    keys = made.keys()
    fresh = 0.0
    with partial.open("a", encoding="utf-8") as file:
        for count, key in enumerate(keys, 1):
            if key in done:
                continue
            began = time.perf_counter()
            measured = made.measure(key, made.seeds)
            took = time.perf_counter() - began
            fresh += took
            spent += took
            done[key] = measured
            file.write(_line(key, measured, took))
            file.flush()
            if report is not None:
                left = spent / len(done) * (len(keys) - len(done))
                at = ", ".join(f"{k}={v}" for k, v in zip(made.grid, key, strict=True))
                report(f"{name}: {count}/{len(keys)} {at} {took:.1f} s, about {left:.0f} s left")
    data = {
        **head,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "duration": round(spent, 1),
        "cells": [
            {"at": dict(zip(made.grid, key, strict=True)), "measured": done[key]} for key in keys
        ],
    }
    path = target / f"{name}.json"
    scratch = target / f".{name}.json.new"
    scratch.write_text(_dump(data), encoding="utf-8")
    os.replace(scratch, path)
    partial.unlink()
    return path


def _resume(
    partial: Path, head: Mapping[str, Any]
) -> tuple[dict[tuple[Any, ...], Measured], float]:
    """Return the finished cells of an interrupted computation, or start its file."""
    done: dict[tuple[Any, ...], Measured] = {}
    spent = 0.0
    if partial.exists():
        lines = partial.read_text(encoding="utf-8").splitlines()
        with contextlib.suppress(json.JSONDecodeError):
            if lines and json.loads(lines[0]) == json.loads(json.dumps(head)):
                for line in lines[1:]:
                    cell = json.loads(line)
                    done[tuple(cell["key"])] = cell["measured"]
                    spent += cell["seconds"]
    # Written anew, so that a line cut short by the interruption goes.
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for key, measured in done.items():
            file.write(_line(key, measured, spent / len(done)))
    return done, spent


def _line(key: tuple[Any, ...], measured: Measured, seconds: float) -> str:
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
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("numpy", "sklearn"):
        if module in sys.modules:
            found[module] = sys.modules[module].__version__
    return found


def _plain(number: Any) -> float:
    """Return a number as JSON holds it, floats with six digits."""
    number = number.item() if hasattr(number, "item") else number
    return number if isinstance(number, bool | int) else float(f"{float(number):.6g}")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _as_seeds(seeds: Sequence[int]) -> Any:
    first, last = seeds[0], seeds[-1]
    if list(seeds) == list(range(first, last + 1)):
        return {"first": first, "last": last}
    return list(seeds)


def _from_seeds(seeds: Any) -> Iterator[int]:
    if isinstance(seeds, Mapping):
        return iter(range(seeds["first"], seeds["last"] + 1))
    return iter(seeds)


def _dump(data: Mapping[str, Any]) -> str:
    """Write one line an entry and cell, so that a changed cell is one changed line."""
    lines = [f" {json.dumps(key)}: {json.dumps(data[key])}" for key in data if key != "cells"]
    cells = ",\n".join(f"  {json.dumps(cell)}" for cell in data["cells"])
    return "{\n" + ",\n".join(lines) + ',\n "cells": [\n' + cells + "\n ]\n}\n"


def _state(name: str, folder: Path | str | None) -> str:
    try:
        return "stale" if is_stale(name, folder) else "fresh"
    except FileNotFoundError:
        return "missing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute stored results: those named, or all that are missing or stale."""
    parser = argparse.ArgumentParser(
        prog="python -m relubook.evidence.results", description=main.__doc__
    )
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
            path = compute(name, options.folder, report=lambda line: print(line, file=sys.stderr))
        except KeyboardInterrupt:
            print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        print(f"{name}: stored as {path.name}")
    if not names:
        print("nothing to do: every stored result is fresh")
    return 0


if __name__ == "__main__":
    # The registry lives in the imported module, not in this one.
    raise SystemExit(importlib.import_module("relubook.evidence.results").main())
