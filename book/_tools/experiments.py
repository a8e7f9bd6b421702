"""Compute the stored results of book/results from the notebooks' cells tagged ``experiment``.

Run by `make full`. A notebook defines an experiment by ``@computation("name", ...)``; its cells
tagged ``setup``, ``lab`` and ``experiment`` run in their order, and then all cells of the grid, in
parallel. The fingerprint stored beside the numbers covers the function and all that it reaches, in
those cells and in the package: neither moving nor commenting a cell changes it, editing the
laboratory does.
"""

import argparse
import ast
import contextlib
import copyreg
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import notebooks
from fingerprint import code_digest

TAGS = {"setup", "lab", "experiment"}
# A change to these does not make a result stale.
ASIDE = ("_files", "_optional", "book", "evidence.claims")
ASIDE += ("evidence.results",)


@dataclass(frozen=True)
class Experiment:
    """A computation as a notebook's cells define it: ``cells`` are their sources without magics."""

    name: str
    function: str
    notebook: str
    cells: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return the digest of the function and of all that it reaches."""
        return code_digest(*self.cells, only=self.function, exclude=ASIDE)


def experiments() -> dict[str, Experiment]:
    """Return the experiments of all notebooks by name; ValueError if two share one."""
    found: dict[str, Experiment] = {}
    for notebook, text in notebooks.texts().items():
        chosen = [
            cell
            for cell in notebooks.read_source(text).cells
            if cell.cell_type == "code" and TAGS & set(cell.metadata.get("tags", []))
        ]
        cells = tuple(notebooks.python_of(cell.source) for cell in chosen)
        for cell, source in zip(chosen, cells, strict=True):
            if "experiment" not in cell.metadata.tags:
                continue
            for name, function in computations(source):
                if name in found:
                    raise ValueError(f"{name!r} is defined in {found[name].notebook} too")
                found[name] = Experiment(name, function, notebook, cells)
    return found


def computations(source: str) -> list[tuple[str, str]]:
    """Return the computations that a cell defines, each with the name of its function."""
    return [
        (ast.literal_eval(decorator.args[0]), node.name)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("computation")
    ]


def define(experiment: Experiment) -> Any:
    """Run the cells of an experiment, from an empty folder, and return its computation."""
    os.environ |= {"RELUBOOK_SEED": "0", "MPLBACKEND": "agg"}
    # Functions of __main__ travel to the workers by value, with all that they use.
    scope = types.ModuleType("__main__").__dict__
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, source in enumerate(experiment.cells, 1):
            exec(compile(source, f"<{experiment.notebook}, cell {number}>", "exec"), scope)
    return scope[experiment.function]


def is_stale(experiment: Experiment, folder: Path = notebooks.RESULTS) -> bool:
    """Whether what is stored was computed by other code, or for another grid or other seeds."""
    stored = json.loads((folder / f"{experiment.name}.json").read_text(encoding="utf-8"))
    return stored["fingerprint"] != experiment.fingerprint()


def state(experiment: Experiment, folder: Path) -> str:
    """Return ``fresh``, ``stale`` or ``missing``."""
    try:
        return "stale" if is_stale(experiment, folder) else "fresh"
    except FileNotFoundError:
        return "missing"


def compute(experiment: Experiment, folder: Path = notebooks.RESULTS) -> Path:
    """Compute all cells of the grid, store the result, and return the file's path.

    Each finished cell is kept in ``NAME.partial``: an interrupted computation goes on from there,
    unless its code, grid or seeds have changed. ``RELUBOOK_JOBS`` workers (by default one a core)
    of one thread each compute.
    """
    import joblib
    import tqdm

    from relubook._files import write_whole

    jobs = os.environ.get("RELUBOOK_JOBS") or str(joblib.cpu_count())
    if not jobs.isdecimal() or not int(jobs):
        raise ValueError(f"RELUBOOK_JOBS must be a number of 1 or more, not {jobs!r}")
    made = define(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    first, last = made.seeds[0], made.seeds[-1]
    in_order = made.seeds == tuple(range(first, last + 1))
    head: dict[str, Any] = {"name": made.name, "grid": dict(made.grid)}
    head["seeds"] = {"first": first, "last": last} if in_order else made.seeds
    versions = {"python": platform.python_version()}
    versions |= {lib: importlib.metadata.version(lib) for lib in ("torch", "numpy", "scikit-learn")}
    head |= {"fingerprint": experiment.fingerprint(), "versions": versions}
    partial, points = folder / f"{made.name}.partial", made.points()
    done = _resume(partial, head)
    # A cached function of the laboratory travels to the workers as the function, with no cache yet.
    cached = type(functools.cache(_measure))
    copyreg.pickle(cached, lambda kept: (functools.cache, (kept.__wrapped__,)))
    work = joblib.Parallel(n_jobs=int(jobs), return_as="generator_unordered")
    found = work(joblib.delayed(_measure)(made, key) for key in points if key not in done)
    # No bar unless somebody watches.
    bar = tqdm.tqdm(found, desc=made.name, total=len(points), initial=len(done), disable=None)
    with partial.open("a", encoding="utf-8") as file, contextlib.closing(found):
        for key, measured, took in bar:
            done[key] = measured, took
            print(json.dumps((key, measured, took)), file=file, flush=True)
    date, duration = datetime.datetime.now(datetime.UTC).date(), sum(t for _, t in done.values())
    head |= {"date": date.isoformat(), "duration": round(duration, 1)}
    head["machine"] = f"{platform.machine()}, {platform.system()}"
    # One line an entry and cell, so that a changed cell is one changed line.
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    cells = ({"at": dict(zip(made.grid, k, strict=True)), "measured": done[k][0]} for k in points)
    lines.append(' "cells": [\n  ' + ",\n  ".join(map(json.dumps, cells)) + "\n ]")
    write_whole(folder / f"{made.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")
    partial.unlink()
    return folder / f"{made.name}.json"


def _measure(made: Any, key: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict, float]:
    import torch

    before, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        return key, made.measure(key, made.seeds), time.perf_counter() - began
    finally:
        torch.set_num_threads(before)


def _resume(partial: Path, head: Mapping[str, Any]) -> dict[tuple[Any, ...], tuple[dict, float]]:
    """Return the finished cells of an interrupted computation, or start its file."""
    from relubook._files import write_whole

    done: dict[tuple[Any, ...], tuple[dict, float]] = {}
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
    with contextlib.suppress(json.JSONDecodeError):  # a line cut short by the interruption
        if lines and json.loads(lines[0]) == json.loads(json.dumps(head)):
            for key, measured, took in map(json.loads, lines[1:]):
                done[tuple(key)] = measured, took
    kept = [json.dumps(head), *(json.dumps((key, *entry)) for key, entry in done.items())]
    write_whole(partial, "\n".join(kept) + "\n")
    return done


def main() -> int:
    """Compute the results named, or all that are missing or stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="results to compute")
    parser.add_argument("--list", action="store_true", help="list names, notebooks and states")
    parser.add_argument("--folder", type=Path, default=notebooks.RESULTS, help="where they lie")
    options = parser.parse_args()
    known, folder = experiments(), options.folder
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no experiment {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    if options.list:
        for name in options.names or known:
            print(f"{name:<25} {known[name].notebook:<40} {state(known[name], folder)}")
        return 0
    names = options.names or [n for n, made in known.items() if state(made, folder) != "fresh"]
    for name in names:
        try:
            path = compute(known[name], folder)
        except KeyboardInterrupt:
            print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        print(f"{name}: stored as {path.name}")
    if not names:
        print("nothing to do: every stored result is fresh")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
