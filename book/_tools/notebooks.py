"""Execute, pair and stamp the chapters, so that stored outputs are what the text produces.

Run by `make notebooks`, and by `make elsewhere`, which stores nothing.  A chapter is book/NAME.md
(MyST text, the source) with book/NAME.ipynb (the same cells with their outputs).  A chapter whose
stamp is fresh is not run again: its prose is synced, its outputs stay.  The stamp covers the
chapter's code, the source of the package modules it imports, the wording of its claims and the
versions of the libraries that decide its numbers.
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
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient
from nbformat import NotebookNode

from relubook.evidence.claims import ledger
from relubook.evidence.fingerprint import imported_modules, sources_digest

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
RESULTS = BOOK / "results"
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
COMMENT = re.compile(r"^ *#.*\n?", re.M)
KEPT_METADATA = ("tags", "mystnb", "cellView", "jupyter")


def chapters() -> list[Path]:
    """Return the text side of every pair, in alphabetical order."""
    return [path for path in sorted(BOOK.glob("*.md")) if _is_chapter(path)]


def _is_chapter(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return text.startswith("---\n") and "\njupytext:" in text.split("\n---\n")[0]


def notebook_of(chapter: Path) -> Path:
    """Return the executed side of a pair."""
    return chapter.with_suffix(".ipynb")


def read_source(chapter: Path) -> NotebookNode:
    """Return the chapter's cells as its text has them, without outputs."""
    return jupytext.read(chapter, fmt="md:myst")


def read_notebook(chapter: Path) -> NotebookNode:
    """Return the stored notebook."""
    return nbformat.read(notebook_of(chapter), as_version=4)


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
    """Return the versions that decide a chapter's numbers, without local tags such as +cpu."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}


def fingerprint(notebook: NotebookNode) -> str:
    """Return the digest of all that a chapter's outputs depend on.

    Neither lines of comment nor the repository's address count: a project that moves keeps its
    stamps.
    """
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    joined = "\n".join(python_of(source) for source in code)
    facts = {
        "code": [ADDRESS.sub("ADDRESS", COMMENT.sub("", source).strip()) for source in code],
        "package": sources_digest(imported_modules(joined)),
        "claims": {
            row["id"]: (row["whose"], row["statement"])
            for row in ledger()
            if f'claim("{row["id"]}")' in joined
        },
        "results": {
            name: hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()
            for name in re.findall(r"\bload\(\s*[\"']([\w-]+)[\"']", joined)
            if (RESULTS / f"{name}.json").exists()
        },
        "versions": library_versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_fresh(chapter: Path) -> bool:
    """Whether the stored outputs belong to the chapter's code, package and versions."""
    if not notebook_of(chapter).exists():
        return False
    stamp = read_notebook(chapter).metadata.get("relubook", {})
    return stamp.get("fingerprint") == fingerprint(read_source(chapter))


def merge(chapter: Path) -> NotebookNode:
    """Return the text's cells with the stored outputs and cell ids where the code is the same."""
    source = read_source(chapter)
    known: set[str] = set()
    if notebook_of(chapter).exists():
        stored = read_notebook(chapter)
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


def execute(notebook: NotebookNode, *, record: bool = False, elsewhere: bool = False) -> None:
    """Run a notebook in place, from an empty folder, as a reader's Colab would.

    Args:
        notebook: Its outputs are replaced.
        record: Write verdicts into the ledger instead of comparing them with it.
        elsewhere: Run as on another processor, and go on after a cell that fails.
    """
    environment = {
        "RELUBOOK_LEDGER": "record" if record else "check",
        "RELUBOOK_PROGRESS": "0",
        "RELUBOOK_SCALE": "quick",
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
            allow_errors=elsewhere,
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        ).execute(env=os.environ | environment)


def failures_elsewhere(chapter: Path) -> list[str]:
    """Run a chapter as on another processor, store nothing, and name the cells that fail."""
    notebook = read_source(chapter)
    execute(notebook, elsewhere=True)
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
    temporary = path.with_suffix(".partial")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def refresh(chapter: Path, *, force: bool = False, record: bool = False) -> str:
    """Bring one pair up to date and say what was done."""
    fresh = is_fresh(chapter) and not force and not record
    notebook = merge(chapter)
    stamp = {"fingerprint": fingerprint(notebook), "versions": library_versions()}
    started = time.monotonic()
    if not fresh:
        execute(notebook, record=record)
    changed = write(normalize(notebook, stamp), notebook_of(chapter))
    if fresh:
        return "prose synced" if changed else "unchanged"
    return f"run in {time.monotonic() - started:.0f} s"


def main() -> None:
    """Refresh the chapters named, or all of them, or run them elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="chapters, such as properties; default: all")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--force", action="store_true", help="run fresh chapters too")
    kind.add_argument(
        "--record", action="store_true", help="write the measured verdicts into the ledger"
    )
    kind.add_argument(
        "--elsewhere", action="store_true", help="run as on another processor, store nothing"
    )
    options = parser.parse_args()
    known = {path.stem: path for path in chapters()}
    if unknown := [name for name in options.names if name not in known]:
        sys.exit(f"no chapter named {', '.join(unknown)}; there are: {', '.join(known)}")
    failed = []
    for name in options.names or known:
        print(f"{name}: ", end="", flush=True)
        if options.elsewhere:
            found = failures_elsewhere(known[name])
            print("\n  ".join(["fails", *found]) if found else "holds", flush=True)
            failed += [name] if found else []
        else:
            print(refresh(known[name], force=options.force, record=options.record))
    if failed:
        sys.exit(f"not true on every processor: {', '.join(failed)}")


if __name__ == "__main__":
    main()
