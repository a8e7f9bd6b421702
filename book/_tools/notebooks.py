"""Execute, pair and stamp the notebooks, so that stored outputs are what the text produces.

Run by `make notebooks`, and by `make elsewhere`, which stores nothing.  A notebook is a pair:
book/NAME.md (MyST text, the source) with book/NAME.ipynb (the same cells with their outputs).
Chapters lie in book/, the evidence for their claims in book/evidence/, and a notebook is known by
its path in there, such as `properties` or `evidence/properties`.  One whose stamp is fresh is not
run again: its prose is synced, its outputs stay.  The stamp covers the notebook's code, the code of
the package that it reaches, the wording of its claims and the versions of the libraries that decide
its numbers.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from fingerprint import code_digest
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from relubook._files import write_whole
from relubook.evidence.claims import ledger

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
RESULTS = BOOK / "results"
EVIDENCE = "evidence"
LEDGER = ROOT / "src" / "relubook" / "evidence" / "verdicts.json"
LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "statsmodels",
    "scikit-learn",
    "pandas",
    "matplotlib",
    "seaborn",
)
CELL_TIMEOUT = 600
# Without vector instructions last digits are those of another processor.
ELSEWHERE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+?(?=[\s\"'#)@]|\.git\b|$)", re.M)
KEPT_METADATA = ("tags", "mystnb", "cellView", "jupyter")


def texts() -> dict[str, Path]:
    """Return the text side of every pair by the notebook's name: chapters first, then evidence."""
    paths = [*sorted(BOOK.glob("*.md")), *sorted(BOOK.glob(f"{EVIDENCE}/*.md"))]
    pairs = [path for path in paths if _is_notebook(path)]
    return {path.relative_to(BOOK).with_suffix("").as_posix(): path for path in pairs}


def _is_notebook(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return text.startswith("---\n") and "\njupytext:" in text.split("\n---\n")[0]


def is_evidence(name: str) -> bool:
    """Whether a notebook is the evidence beside a chapter, by its name."""
    return name.startswith(f"{EVIDENCE}/")


def notebook_of(text: Path) -> Path:
    """Return the executed side of a pair."""
    return text.with_suffix(".ipynb")


def read_source(text: Path) -> NotebookNode:
    """Return the cells as the text has them, without outputs."""
    return jupytext.read(text, fmt="md:myst")


def read_notebook(text: Path) -> NotebookNode:
    """Return the stored notebook."""
    return nbformat.read(notebook_of(text), as_version=4)


def cell_facts(notebook: NotebookNode) -> list[tuple[str, str, dict]]:
    """Return type, source and kept metadata of every cell: what both sides of a pair share."""
    return [
        (
            cell.cell_type,
            cell.source.rstrip(),
            {key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata},
        )
        for cell in notebook.cells
    ]


def python_of(source: str) -> str:
    """Return a cell's source with IPython's magics and shell lines replaced by ``pass``."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


def library_versions() -> dict[str, str]:
    """Return the versions that decide a notebook's numbers, without local tags such as +cpu."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}


def fingerprint(notebook: NotebookNode) -> str:
    """Return the digest of all that a notebook's outputs depend on.

    Neither comments, imports and layout nor the repository's address count, and of the package
    only the code that the cells reach: a project or a function that moves keeps its stamps.
    """
    code = [python_of(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    joined = "\n".join(code)
    stored = [path for path in sorted(RESULTS.glob("*.json")) if _names(joined, path.stem)]
    facts = {
        "code": code_digest(*(ADDRESS.sub("ADDRESS", source) for source in code)),
        "claims": {
            row["id"]: (row["whose"], row["statement"])
            for row in ledger()
            if _names(joined, row["id"])
        },
        "results": {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in stored},
        "versions": library_versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _names(code: str, name: str) -> bool:
    return f'"{name}"' in code or f"'{name}'" in code


def is_fresh(text: Path) -> bool:
    """Whether the stored outputs belong to the text's code, package and versions."""
    if not notebook_of(text).exists():
        return False
    stamp = read_notebook(text).metadata.get("relubook", {})
    return stamp.get("fingerprint") == fingerprint(read_source(text))


def merge(text: Path) -> NotebookNode:
    """Return the text's cells with the stored outputs and cell ids where the code is the same."""
    source = read_source(text)
    known: set[str] = set()
    if notebook_of(text).exists():
        stored = read_notebook(text)
        known = {cell.id for cell in stored.cells}
        source = combine_inputs_with_outputs(source, stored)
    _name_new_cells(source, known)
    return source


def _name_new_cells(notebook: NotebookNode, known: set[str]) -> None:
    """Give cells that the stored notebook lacks an id that follows from their text and place."""
    for place, cell in enumerate(notebook.cells):
        if cell.get("id") not in known:
            cell["id"] = hashlib.sha256(f"{place}\n{cell.source}".encode()).hexdigest()[:8]


def _coalesce(outputs: list[NotebookNode]) -> list[NotebookNode]:
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if (
            last is not None
            and output.output_type == "stream" == last.output_type
            and output.name == last.name
        ):
            last.text += output.text
        else:
            merged.append(output)
    return merged


def execute(
    notebook: NotebookNode,
    *,
    record: Path | None = None,
    elsewhere: bool = False,
    seed: int = 0,
    to_the_end: bool = False,
) -> None:
    """Run a notebook in place, from an empty folder, as a reader's Colab would.

    Args:
        notebook: Its outputs are replaced.
        record: A file that verdicts are written to instead of being compared with the ledger.
        elsewhere: Run as on another processor.
        seed: The base seed, from which the notebook draws all it draws.
        to_the_end: Go on after a cell that fails.
    """
    environment = {
        "RELUBOOK_LEDGER": "record" if record else "check",
        "RELUBOOK_VERDICTS": str(record or ""),
        "RELUBOOK_PROGRESS": "0",
        "RELUBOOK_SEED": str(seed),
        "PYTHONHASHSEED": "0",
    } | (ELSEWHERE if elsewhere else {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            allow_errors=to_the_end,
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        ).execute(env=os.environ | environment)


def judge_elsewhere(text: Path) -> str:
    """Run a notebook as on another processor, store nothing, and name the cells that fail."""
    notebook = read_source(text)
    execute(notebook, elsewhere=True, to_the_end=True)
    failures = failures_of(notebook)
    return "\n  ".join(["fails", *failures]) if failures else "holds"


def failures_of(notebook: NotebookNode) -> list[str]:
    """Return the cells of an executed notebook that failed, each with its error."""
    return [
        f"cell {cell.execution_count}: {output.ename}: {output.evalue}"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]


def normalize(notebook: NotebookNode, stamp: dict) -> NotebookNode:
    """Return the notebook as it is stored: nothing that differs between two runs or machines."""
    stored = copy.deepcopy(notebook)
    stored.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,md:myst"},
            "kernelspec": KERNELSPEC,
            "language_info": {"name": "python"},
            "relubook": stamp,
        }
    )
    stored.nbformat, stored.nbformat_minor = 4, 5
    for cell in stored.cells:
        kept = {key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = _coalesce(cell.outputs)
    return stored


def write(notebook: NotebookNode, path: Path) -> bool:
    """Write a notebook if its bytes changed; a failed write leaves the old file.

    Returns:
        Whether the file changed.
    """
    text = nbformat.writes(notebook) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_whole(path, text)
    return True


def refresh(text: Path, *, force: bool = False, record: Path | None = None) -> str:
    """Bring one pair up to date and say what was done.

    Args:
        text: The text side of the pair.
        force: Run it even if its outputs are fresh.
        record: A folder; run it, and leave its verdicts there instead of comparing them.
    """
    fresh = is_fresh(text) and not force and not record
    notebook = merge(text)
    stamp = {"fingerprint": fingerprint(notebook), "versions": library_versions()}
    started = time.monotonic()
    if not fresh:
        execute(notebook, record=record and verdicts_of(text, record))
    changed = write(normalize(notebook, stamp), notebook_of(text))
    if fresh:
        return "prose synced" if changed else "unchanged"
    return f"run in {time.monotonic() - started:.0f} s"


def verdicts_of(text: Path, folder: Path) -> Path:
    """Return the file in a folder that takes the verdicts of one notebook."""
    return folder / f"{text.parent.name}-{text.stem}.json"


def into_the_ledger(files: Iterable[Path]) -> None:
    """Write the verdicts in some files into the ledger, beside those it has of other claims."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (LEDGER, *files)]
    merged = {claim_id: record for records in found for claim_id, record in records.items()}
    ordered = {row["id"]: merged[row["id"]] for row in ledger() if row["id"] in merged}
    written = json.dumps(ordered, indent=1, ensure_ascii=False) + "\n"
    write_whole(LEDGER, written)


def chosen(names: list[str]) -> dict[str, Path]:
    """Return the texts of the notebooks named, of all without names; unknown names end here."""
    known = texts()
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no notebook named {', '.join(unknown)}; there are: {', '.join(known)}")
    return {name: known[name] for name in names or known}


def attempt(work: Callable[..., str], text: Path, options: dict) -> str:
    """Do some work on a notebook; what it says starts with ``fails`` if a cell failed."""
    try:
        return work(text, **options)
    except CellExecutionError as error:
        return f"fails: {error.ename}: {error.evalue}\n{error.traceback}"
    except (RuntimeError, TimeoutError) as error:  # a kernel that died, a cell without end
        return f"fails: {error}"


def for_each(
    texts: dict[str, Path], work: Callable[..., str], *, jobs: int = 1, **options: Any
) -> Iterator[tuple[str, str]]:
    """Do some work on each notebook, ``jobs`` at a time, and yield its name and what it says."""
    if jobs == 1:
        yield from ((name, attempt(work, text, options)) for name, text in texts.items())
        return
    with ProcessPoolExecutor(jobs) as pool:
        found = [pool.submit(attempt, work, text, options) for text in texts.values()]
        yield from ((name, said.result()) for name, said in zip(texts, found, strict=True))


def main() -> None:
    """Refresh the notebooks named, or all of them, or run them elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="such as properties or evidence/properties; default: all"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many to run at a time")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--force", action="store_true", help="run fresh notebooks too")
    kind.add_argument(
        "--record", action="store_true", help="write the measured verdicts into the ledger"
    )
    kind.add_argument(
        "--elsewhere", action="store_true", help="run as on another processor, store nothing"
    )
    options = parser.parse_args()

    texts = chosen(options.names)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        if options.elsewhere:
            found = for_each(texts, judge_elsewhere, jobs=options.jobs)
        else:
            record = Path(folder) if options.record else None
            found = for_each(texts, refresh, jobs=options.jobs, force=options.force, record=record)
        for name, said in found:
            print(f"{name}: {said}", flush=True)
            failed += [name] if said.startswith("fails") else []
        judged = [verdicts_of(texts[name], Path(folder)) for name in texts if name not in failed]
        if options.record:
            into_the_ledger(path for path in judged if path.exists())
    if failed:
        where = "true on every processor" if options.elsewhere else "run to the end"
        sys.exit(f"not {where}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
