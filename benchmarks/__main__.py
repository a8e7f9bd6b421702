"""Run the benchmarks and print a table of ratios, each with its bar: `make bench`.

Each module of this folder with a function ``benchmarks()`` returns a list of entries
``{"name", "ratio", "bar", "holds"}``; ``bar`` and ``holds`` are None where nothing is promised.
The same list is written to _build/bench.json; a run of some modules replaces their entries.
"""

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import benchmarks

OUT = Path(__file__).resolve().parents[1] / "_build" / "bench.json"


def modules() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name != "__main__"]


def table(entries: list[dict]) -> str:
    marks = {True: "holds", False: "MISSED", None: ""}
    width = max(len(entry["name"]) for entry in entries)
    lines = [f"{'':{width}}  {'ratio':>8}  {'bar':>8}"]
    for entry in entries:
        bar = "" if entry["bar"] is None else f"{entry['bar']:g}"
        lines.append(
            f"{entry['name']:{width}}  {entry['ratio']:8.3g}  {bar:>8}  {marks[entry['holds']]}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="modules; default: all")
    names = parser.parse_args().names or modules()
    if unknown := sorted(set(names) - set(modules())):
        sys.exit(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(modules())}")
    entries = []
    for name in names:
        found = importlib.import_module(f"benchmarks.{name}").benchmarks()
        print(f"# {name}\n{table(found)}\n", flush=True)
        entries += found
    OUT.parent.mkdir(exist_ok=True)
    kept = json.loads(OUT.read_text()) if OUT.exists() and set(names) != set(modules()) else []
    measured = {entry["name"] for entry in entries}
    entries = [entry for entry in kept if entry["name"] not in measured] + entries
    OUT.write_text(json.dumps(entries, indent=1) + "\n")
    if missed := [entry["name"] for entry in entries if entry["holds"] is False]:
        sys.exit(f"{len(missed)} of {len(entries)} bars missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
