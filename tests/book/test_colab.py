"""Run every notebook as Colab does, and compare what comes out with what is stored.

A fresh environment has the libraries that Colab has, but not the package. Each notebook, chapter or
evidence, stands alone in an empty folder; its setup cell installs the package from the git address,
which leads to a snapshot of this working tree. nbval runs it there and compares the outputs.
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
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
TEXTS = notebooks.texts()
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
NOTEBOOK_TIMEOUT = 900

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


def site_packages(environment: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(python_in(environment), "-c", code).strip())


@pytest.fixture(scope="session")
def libraries() -> Path:
    """Return an environment with Colab's libraries; made once for each state of the lock."""
    lock = (ROOT / "requirements.lock").read_bytes()
    key = hashlib.sha256(lock + repr((IN_COLAB, RUNNER, sys.version)).encode()).hexdigest()[:16]
    folder = ROOT / "_build" / "colab" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            constraint = ("--constraint", ROOT / "requirements.lock")
            run(python_in(folder), "-m", "pip", "install", "-q", *constraint, *IN_COLAB, *RUNNER)
            (folder / "complete").touch()
    return folder


@pytest.fixture
def colab(libraries, tmp_path) -> Path:
    """Return the Python of a new environment that sees the libraries, but not the package."""
    folder = tmp_path / "colab"
    venv.create(folder)
    others = site_packages(libraries)
    (site_packages(folder) / "libraries.pth").write_text(str(others), encoding="utf-8")
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
    }


def run_notebook(text: Path, colab: Path, variables: dict[str, str], folder: Path):
    """Run one notebook by nbval in an empty folder and return the finished process."""
    folder.mkdir()
    shutil.copy(notebooks.notebook_of(text), folder)
    command = [
        *(colab, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "600"),
        *("--nbval-sanitize-with", Path(__file__).with_name("nbval_sanitize.cfg"), "-q", "-x"),
        *("-p", "no:cacheprovider", "--rootdir", folder, f"{text.stem}.ipynb"),
    ]
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=NOTEBOOK_TIMEOUT,
        check=False,
    )


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_notebook_runs_alone_and_repeats_its_outputs(text, colab, like_colab, tmp_path):
    before = freeze(colab)
    assert "torch" in before
    assert "relubook" not in before
    result = run_notebook(text, colab, like_colab, tmp_path / "empty")
    assert result.returncode == 0, result.stdout[-6000:]
    cells = sum(c.cell_type == "code" for c in notebooks.read_notebook(text).cells)
    assert f"{cells} passed" in result.stdout
    after = freeze(colab)
    assert after.pop("relubook").startswith("git+")
    assert after == before, "the setup cell changed another package"


def test_changed_output_is_noticed(pair, colab, like_colab, tmp_path):
    """A figure's words and a printed line are compared; a stored lie is found."""
    result = run_notebook(pair, colab, like_colab, tmp_path / "true")
    assert result.returncode == 0, result.stdout[-6000:]
    stored = notebooks.read_notebook(pair)
    drawn = next(c for c in stored.cells if "show(figure)" in c.source)
    for output in drawn.outputs:
        output["data"]["text/plain"] += " changed"
    notebooks.write(stored, notebooks.notebook_of(pair))
    result = run_notebook(pair, colab, like_colab, tmp_path / "changed")
    assert result.returncode == 1
    assert "changed" in result.stdout
