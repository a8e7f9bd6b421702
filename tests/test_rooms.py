"""The rooms of the package: who may import whom, and how much there may be."""

import ast
import sys
from pathlib import Path

import pytest

import relubook

PACKAGE = Path(relubook.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
ROOMS = {
    "layers": set(),
    "units": {"layers"},
    "training": {"layers"},
    "evidence": set(),
    "integrations": {"layers", "units"},
    "chapters": {"layers", "units", "training", "evidence"},
}
CORE = ("layers", "units", "training", "integrations")
LINES = 7_400
LINES_OF_A_FILE = 500
LINES_OF_A_CHAPTER = 150


def room(module):
    """Return the room of a dotted name of the package, or the module itself outside of rooms."""
    return module.split(".")[1] if "." in module else module


def imports(source, file, *, top_only=False):
    """Yield the dotted names of the modules that a file imports; relative ones in full."""
    parents = ["relubook", *Path(file).parts[:-1]]
    waiting = list(ast.parse(source).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(
                [*parents[: len(parents) + 1 - node.level]] * bool(node.level)
                + [node.module] * bool(node.module)
            )
            yield from (
                f"{home}.{alias.name}" if home == "relubook" else home for alias in node.names
            )
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def wrong_directions(file, source):
    """Return the imports of the package that a file of a room must not have."""
    own = Path(file).parts[0]
    allowed = (ROOMS[own] | {own} if own in ROOMS else set(ROOMS)) - {"chapters"}
    return sorted(
        name
        for name in set(imports(source, file))
        if name.split(".")[0] == "relubook" and room(name) in set(ROOMS) - allowed
    )


def foreign_libraries(file, source):
    """Return what a file of the core imports at its top beside torch and the standard library."""
    known = {"torch", "relubook", *sys.stdlib_module_names}
    roots = {name.split(".")[0] for name in imports(source, file, top_only=True)}
    return sorted(roots - known) if Path(file).parts[0] in CORE else []


@pytest.mark.parametrize("file", FILES)
def test_imports_go_downwards_only(file):
    source = (PACKAGE / file).read_text(encoding="utf-8")
    wrong = wrong_directions(file, source)
    assert not wrong, f"{file} must not import {', '.join(wrong)}"


@pytest.mark.parametrize("file", FILES)
def test_the_core_needs_torch_alone(file):
    source = (PACKAGE / file).read_text(encoding="utf-8")
    foreign = foreign_libraries(file, source)
    assert not foreign, f"{file} must import {', '.join(foreign)} where it is used"


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("layers/a.py", "from relubook.units.sites import x", ["relubook.units.sites"]),
        ("layers/a.py", "def f():\n    import relubook.evidence.data", ["relubook.evidence.data"]),
        ("units/a.py", "from ..training import stack", ["relubook.training"]),
        ("units/a.py", "from relubook import training", ["relubook.training"]),
        ("units/a.py", "from relubook.layers import maxout\nfrom . import sites", []),
        ("evidence/a.py", "from relubook.chapters.deaths import x", ["relubook.chapters.deaths"]),
        ("chapters/a.py", "from relubook.chapters import theory", ["relubook.chapters"]),
        ("chapters/a.py", "from relubook.units.sites import x\nimport torch", []),
        ("book.py", "import relubook.chapters.deaths", ["relubook.chapters.deaths"]),
        ("book.py", "from relubook._optional import require", []),
    ],
)
def test_a_wrong_direction_is_named(file, source, wrong):
    assert wrong_directions(file, source) == wrong


def test_a_foreign_library_is_named():
    source = "import os\nimport torch.nn\nimport pandas as pd\n\ndef f():\n    import scipy"
    assert foreign_libraries("units/a.py", source) == ["pandas"]
    assert foreign_libraries("evidence/a.py", source) == []


def test_budget():
    lines = {file: len((PACKAGE / file).read_text("utf-8").splitlines()) for file in FILES}
    over = {file: count for file, count in lines.items() if count > LINES_OF_A_FILE}
    assert not over, f"files must have at most {LINES_OF_A_FILE} lines: {over}"
    for file, count in lines.items():
        if file.startswith("chapters/"):
            assert count <= LINES_OF_A_CHAPTER, f"{file} has {count} lines"
    total = sum(lines.values())
    assert total <= LINES, f"the package must have at most {LINES} lines, not {total}"
