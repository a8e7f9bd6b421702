"""Run every chapter as Colab does, and compare what comes out with what is stored.

A fresh environment has the libraries that Colab has, but not the package. Each chapter stands alone
in an empty folder; its setup cell installs the package from the git address, which leads to a
snapshot of this working tree. nbval runs the chapter there and compares the outputs.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import address
import notebooks
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = {path.stem: path for path in notebooks.chapters()}
IN_COLAB = (
    "torch",
    "numpy",
    "matplotlib",
    "seaborn",
    "pandas",
    "scipy",
    "statsmodels",
    "scikit-learn",
    "tqdm",
    "ipykernel",
    "ipython",
)
RUNNER = ("nbval", "pytest")
CHAPTER_TIMEOUT = 900

pytestmark = [pytest.mark.notebooks, pytest.mark.slow]


def run(*command, **options):
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def freeze(python: Path) -> dict[str, str]:
    lines = run(python, "-m", "pip", "freeze", "--all").splitlines()
    pairs = (re.split(r"==| @ ", line, maxsplit=1) for line in lines if not line.startswith("#"))
    return {pair[0]: pair[-1] for pair in pairs}


@pytest.fixture(scope="session")
def colab() -> Path:
    """Return the Python of an environment like Colab's; made once for each state of the lock."""
    lock = (ROOT / "requirements.lock").read_bytes()
    key = hashlib.sha256(lock + repr((IN_COLAB, RUNNER, sys.version)).encode()).hexdigest()[:16]
    folder = ROOT / "_build" / "colab" / key
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        constraint = ("--constraint", ROOT / "requirements.lock")
        run(python_in(folder), "-m", "pip", "install", "-q", *constraint, *IN_COLAB, *RUNNER)
        (folder / "complete").touch()
    run(python_in(folder), "-m", "pip", "uninstall", "-q", "-y", "relubook")
    return python_in(folder)


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory) -> Path:
    """Return a bare repository whose main branch holds the working tree as it is now."""
    folder = tmp_path_factory.mktemp("snapshot")
    bare = folder / "relubook.git"
    run("git", "clone", "-q", "--bare", ROOT, bare)
    index = {**os.environ, "GIT_INDEX_FILE": str(folder / "index")}
    in_tree = ("git", "--git-dir", bare, "--work-tree", ROOT)
    run(*in_tree, "add", "--all", ".", env=index, cwd=ROOT)
    tree = run(*in_tree, "write-tree", env=index, cwd=ROOT).strip()
    author = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "test"), ("EMAIL", "test@example.org"))
    }
    commit = run(
        *("git", "--git-dir", bare, "commit-tree", tree, "-m", "snapshot"),
        env={**os.environ, **author},
    ).strip()
    run("git", "--git-dir", bare, "update-ref", "refs/heads/main", commit)
    run("git", "--git-dir", bare, "symbolic-ref", "HEAD", "refs/heads/main")
    return bare


@pytest.fixture
def like_colab(snapshot, tmp_path) -> dict[str, str]:
    """Return the variables of a session in which the public address leads to the snapshot."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RELUBOOK"))}
    return inherited | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{snapshot.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": address.current(),
        "GIT_TERMINAL_PROMPT": "0",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "RELUBOOK_LEDGER": "check",
        "RELUBOOK_PROGRESS": "0",
        "RELUBOOK_SCALE": "quick",
    }


def run_chapter(chapter: Path, colab: Path, variables: dict[str, str], folder: Path):
    """Run one chapter by nbval in an empty folder and return the finished process."""
    folder.mkdir()
    shutil.copy(notebooks.notebook_of(chapter), folder)
    command = [
        *(colab, "-m", "pytest", "--nbval", "--nbval-cell-timeout", "600", "-q", "-x"),
        *("--nbval-sanitize-with", Path(__file__).with_name("nbval_sanitize.cfg")),
        *("-p", "no:cacheprovider", "--rootdir", folder, f"{chapter.stem}.ipynb"),
    ]
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=CHAPTER_TIMEOUT,
        check=False,
    )


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=CHAPTERS)
def test_chapter_runs_and_repeats_its_outputs(chapter, colab, like_colab, tmp_path):
    run(colab, "-m", "pip", "uninstall", "-q", "-y", "relubook")
    before = freeze(colab)
    assert "relubook" not in before
    result = run_chapter(chapter, colab, like_colab, tmp_path / "empty")
    assert result.returncode == 0, result.stdout[-6000:]
    cells = sum(c.cell_type == "code" for c in notebooks.read_notebook(chapter).cells)
    assert f"{cells} passed" in result.stdout
    after = freeze(colab)
    assert after.pop("relubook").startswith("git+")
    assert after == before, "the setup cell changed another package"


def test_changed_output_is_noticed(colab, like_colab, tmp_path):
    """A figure's words, a card and a printed line are compared; a stored lie is found."""
    import nbformat

    source = CHAPTERS["properties"]
    stored = notebooks.read_notebook(source)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    figure = next(i for i, cell in enumerate(code) if "show(figure)" in cell.source)
    for output in code[figure].outputs:
        output["data"]["text/plain"] += " changed"
    stored.cells = code[: figure + 1]
    text = tmp_path / source.name
    shutil.copy(source, text)
    nbformat.write(stored, notebooks.notebook_of(text))
    result = run_chapter(text, colab, like_colab, tmp_path / "empty")
    assert result.returncode == 1
    assert "changed" in result.stdout
