"""A fingerprint counts the code of what is used, wherever it lives."""

import random

import pytest
from fingerprint import code_digest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCES = {
    "__init__": (
        'import importlib\n\n_HOME = {"alpha": "a", "rooms": "room.deep"}\n\n\n'
        "def __getattr__(name):\n"
        '    return getattr(importlib.import_module(f"pack.{_HOME[name]}"), name)\n'
    ),
    "a": (
        '"""A."""\n\nimport math\n\nfrom pack.b import Base, beta\n\n'
        "FACTOR = 2  # two\n'''What to multiply by.'''\nUNUSED = 3\n\n\n"
        'def alpha(x, target=None):\n    """Double."""\n    x = target or x\n'
        "    return beta(x) * FACTOR + math.pi\n\n\n"
        "def target():\n    return 'a namesake of a parameter'\n\n\n"
        "class Child(Base):\n    size: int = 1\n    '''Its size.'''\n"
    ),
    "b": (
        "import math\n\nfrom pack import tables\n\n\n"
        "def beta(x):\n    from . import c\n\n    return c.gamma(x) + tables.LIMIT\n\n\n"
        "class Base:\n    def run(self):\n        return math.e\n\n\n"
        "def lonely():\n    return 5\n"
    ),
    "c": "def gamma(x):\n    return x + 1\n\n\ndef delta(x):\n    return x - 1\n",
    "tables": (
        "REGISTRY = {}\nLIMIT = 7\n\n\n"
        "def register(name):\n    def add(function):\n"
        "        REGISTRY[name] = function\n        return function\n\n    return add\n\n\n"
        "def look_up(name):\n    return REGISTRY[name]\n"
    ),
    "entries": (
        "from pack import tables\nfrom pack.tables import REGISTRY, register\n\n\n"
        "@register('one')\ndef first(x):\n    return x\n\n\n"
        "def second(x):\n    return 2 * x\n\n\nREGISTRY.update(two=second)\n"
        "tables.REGISTRY['three'] = lambda x: 3 * x\n"
    ),
    "room/__init__": "",
    "room/deep": "from ..c import delta\n\n\ndef floor(x):\n    return delta(x)\n",
}


def write(folder, sources):
    for name, source in sources.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


@pytest.fixture
def package(tmp_path):
    return write(tmp_path / "pack", SOURCES)


def edit(package, module, old, new):
    path = package / f"{module}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("code", "module", "old", "new", "counts"),
    [
        # What is used counts, through functions, modules, classes, facades and local imports.
        ("from pack.a import alpha\nalpha(1)", "a", "FACTOR + ", "FACTOR - ", True),
        ("from pack.a import alpha\nalpha(1)", "a", "FACTOR = 2", "FACTOR = 4", True),
        ("from pack.a import alpha\nalpha(1)", "c", "x + 1", "x + 2", True),
        ("from pack.a import alpha\nalpha(1)", "tables", "LIMIT = 7", "LIMIT = 8", True),
        ("from pack.a import alpha as f\nf(1)", "a", "FACTOR + ", "FACTOR - ", True),
        ("from pack.a import beta\nbeta(1)", "c", "x + 1", "x + 2", True),
        ("from pack.a import beta\nbeta(1)", "a", "FACTOR = 2", "FACTOR = 4", False),
        ("import pack\npack.alpha(1)", "a", "FACTOR + ", "FACTOR - ", True),
        ("import pack as p\nwith p.alpha(1):\n    pass", "c", "x + 1", "x + 2", True),
        ("import pack.a\npack.a.alpha(1)", "c", "x + 1", "x + 2", True),
        ("from pack import alpha\nx = [alpha(1) for _ in 'ab']", "c", "x + 1", "x + 2", True),
        ("import pack\npack.rooms.floor(1)", "c", "x - 1", "x - 2", True),
        ("from pack.room import deep\ndeep.floor(1)", "c", "x - 1", "x - 2", True),
        ("from pack import *\nalpha(1)", "c", "x + 1", "x + 2", True),
        ("from pack.a import Child\nChild()", "b", "math.e", "math.pi", True),
        ("from pack.a import Child\nChild()", "a", "size: int = 1", "size: int = 2", True),
        ("from pack.a import alpha\nalpha(1)", "a", "import math", "import cmath as math", True),
        # A module passed on as a value may give anything.
        ("from pack import c\nvars(c)", "c", "x - 1", "x - 2", True),
        ("import pack\nvars(pack)", "c", "x - 1", "x - 2", True),
        # What fills a registry counts where it is read.
        (
            "from pack.tables import look_up\nlook_up('one')",
            "entries",
            "return x",
            "return -x",
            True,
        ),
        ("from pack.tables import look_up\nlook_up('two')", "entries", "2 * x", "4 * x", True),
        ("from pack.tables import look_up\nlook_up('3')", "entries", "3 * x", "5 * x", True),
        ("from pack.tables import LIMIT\nLIMIT", "entries", "2 * x", "4 * x", False),
        # What is not used does not, nor does what is no code.
        ("from pack.a import alpha\nalpha(1)", "a", "UNUSED = 3", "UNUSED = 4", False),
        ("from pack.a import alpha\nalpha(1)", "a", "a namesake", "of the same name", False),
        ("from pack.a import alpha\nalpha(1)", "b", "return 5", "return 6", False),
        ("from pack.a import alpha\nalpha(1)", "c", "x - 1", "x - 2", False),
        ("from pack.a import alpha\nalpha(1)", "a", "  # two", "  # the second", False),
        ("from pack.a import alpha\nalpha(1)", "a", "Double.", "Do it twice.", False),
        ("from pack.a import alpha\nalpha(1)", "a", "'''What to multiply by.'''\n", "", False),
        ("from pack.a import Child\nChild()", "a", "'''Its size.'''", "'''How large.'''", False),
        ("from pack.a import alpha\nalpha(1)", "c", "x + 1", "(x +\n            1)", False),
        ("from pack.a import alpha\nalpha(1)", "c", "\n", "\r\n", False),
    ],
)
def test_what_counts(package, code, module, old, new, counts):
    before = code_digest(code, package=package)
    edit(package, module, old, new)
    assert (code_digest(code, package=package) != before) is counts


def test_only_takes_one_definition(package):
    code = "from pack.c import gamma, delta\n\ndef f():\n    gamma(1)\n\ndef g():\n    delta(1)\n"
    whole, one = (code_digest(code, only=only, package=package) for only in (None, "f"))
    edit(package, "c", "x - 1", "x - 2")
    assert code_digest(code, only="f", package=package) == one
    assert code_digest(code, package=package) != whole
    edit(package, "c", "x + 1", "x + 2")
    assert code_digest(code, only="f", package=package) != one
    with pytest.raises(ValueError, match="must be a definition of the code, not 'h'"):
        code_digest(code, only="h", package=package)


def test_what_is_excluded_does_not_count(package):
    code = "from pack.a import alpha\nalpha(1)"
    for module, old, name in (
        ("b", "c.gamma(x)", "b"),
        ("c", "x + 1", "b"),
        ("c", "x + 1 + 1", "c.gamma"),
    ):
        before, whole = (code_digest(code, package=package, exclude=e) for e in ([name], []))
        edit(package, module, old, f"{old} + 1")
        assert code_digest(code, package=package, exclude=[name]) == before
        assert code_digest(code, package=package) != whole


def test_cells_share_names_and_keep_their_bounds():
    one, two = "import torch as t", "x = t.ones(3)\nx.sum()"
    digest = code_digest(one, two)
    assert digest == code_digest(
        f"{one}  # tensors", "from torch import ones\nx = ones(3)\nx.sum()"
    )
    assert digest != code_digest(one, *two.split("\n"))
    assert digest != code_digest("import numpy as t", two)


# Moving: the same functions, spread over modules and rooms in any way, imported in any style.

FUNCTIONS = {
    "low": "def low(x):\n    return x + CONSTANT",
    "CONSTANT": "CONSTANT = 3",
    "Middle": "class Middle:\n    def run(self, x):\n        return low(x) * CONSTANT",
    "deco": "def deco(f):\n    return f",
    "high": "@deco\ndef high(x):\n    return Middle().run(x)",
    "spare": "def spare(x):\n    return high(x)",
}
NEEDS = {
    "low": ["CONSTANT"],
    "CONSTANT": [],
    "Middle": ["low", "CONSTANT"],
    "deco": [],
    "high": ["deco", "Middle"],
    "spare": ["high"],
}


def spread(folder, homes, styles, functions):
    """Write the toy package with each definition in its home, its needs imported from theirs."""
    texts: dict[str, list[str]] = {home: [] for home in homes.values()}
    for name, source in functions.items():
        home = homes[name]
        for need in NEEDS[name]:
            there = homes[need]
            if there == home:
                continue
            if styles[name] == "attribute":
                parent, _, last = f"toy/{there}".rpartition("/")
                texts[home].insert(0, f"from {parent.replace('/', '.')} import {last} as {need}_")
                source = source.replace(need, f"{need}_.{need}")
            else:
                texts[home].insert(0, f"from toy.{there.replace('/', '.')} import {need}")
        texts[home].append(source)
    write(folder, {home: "\n".join(lines) + "\n" for home, lines in texts.items()})
    where = homes["high"].replace("/", ".")
    return f"from toy.{where} import high\nprint(high(1))"


HOMES = st.fixed_dictionaries(dict.fromkeys(FUNCTIONS, st.sampled_from(["m", "n", "r/p", "r/q"])))
STYLES = st.fixed_dictionaries(dict.fromkeys(FUNCTIONS, st.sampled_from(["name", "attribute"])))
FIRST = dict.fromkeys(FUNCTIONS, "m")


@settings(max_examples=40, deadline=None)
@given(HOMES, STYLES, st.randoms(use_true_random=False))
def test_a_move_changes_nothing_and_an_edit_does(
    tmp_path_factory, homes, styles, rng: random.Random
):
    def digest(homes, functions):
        folder = tmp_path_factory.mktemp("move") / "toy"
        return code_digest(spread(folder, homes, styles, functions), package=folder)

    before = digest(FIRST, FUNCTIONS)
    shuffled = dict(rng.sample(list(FUNCTIONS.items()), len(FUNCTIONS)))
    assert digest(homes, shuffled) == before
    name = rng.choice(list(FUNCTIONS))
    changed = FUNCTIONS[name].replace("return ", "return 2 * ").replace("= 3", "= 4")
    assert (digest(homes, FUNCTIONS | {name: changed}) == before) == (name == "spare")
