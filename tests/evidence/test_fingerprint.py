import subprocess
import sys

import pytest

from relubook.evidence.fingerprint import imported_modules, module_closure, sources_digest


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "pack"
    folder.mkdir()
    sources = {
        "__init__": '_HOME = {"alpha": "a", "beta": "b"}\n',
        "a": '"""A."""\n\nfrom pack.b import beta\n\nx = 1  # one\n',
        "b": "def beta():\n    '''Say.'''\n    from . import c\n\n    return c\n",
        "c": "import math\n",
        "lonely": "import pack.a\n",
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return folder


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import pack.a", ["a"]),
        ("from pack import alpha", ["a"]),
        ("from pack import b, c", ["b", "c"]),
        ("from pack.b import beta", ["b"]),
        ("import pack\npack.alpha()", ["a"]),
        ("import pack as p\nwith p.beta():\n    p.lonely", ["b", "lonely"]),
        ("def f():\n    from pack import *", ["a", "b"]),
        ("import pack\npack.__version__", []),
        ("import math, packed\npacked.alpha", []),
    ],
)
def test_direct_imports(package, code, modules):
    assert imported_modules(code, package=package) == modules


def test_closure_follows_imports_and_resolves_public_names(package):
    assert module_closure(["c"], package=package) == ["c"]
    for name in ("a", "pack.a", "alpha", "pack.alpha", "pack"):
        assert module_closure([name], package=package) == ["a", "b", "c"]
    assert module_closure(["a"], package=package, exclude=["b"]) == ["a"]
    assert module_closure(["lonely"], package=package) == ["a", "b", "c", "lonely"]


def test_unknown_name(package):
    with pytest.raises(ValueError, match="'nothing' is neither"):
        module_closure(["nothing"], package=package)


@pytest.mark.parametrize(
    ("module", "old", "new", "stale"),
    [
        ("c", "import math", "import cmath", True),
        ("a", "x = 1", "x = 2", True),
        ("a", "# one", "# the first", False),
        ("a", '"""A."""', '"""About\n\nA."""', False),
        ("b", "Say.", "Say it.", False),
        ("lonely", "import pack.a", "import pack.b", False),
        ("__init__", "beta", "gamma", False),
    ],
)
def test_digest_changes_with_the_code_alone(package, module, old, new, stale):
    before = sources_digest(["a"], package=package)
    path = package / f"{module}.py"
    path.write_text(path.read_text().replace(old, new))
    assert (sources_digest(["a"], package=package) != before) is stale


def test_digest_ignores_line_endings(package):
    before = sources_digest(["a"], package=package)
    path = package / "a.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert sources_digest(["a"], package=package) == before


def test_closure_covers_what_python_really_imports():
    """The static reading finds no less than the interpreter does."""
    code = "import sys, relubook.layers.initializers; print(*[m for m in sys.modules if m[:9] == 'relubook.'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("relubook.") for name in run.stdout.split()}
    assert loaded <= set(module_closure(["init"]))
