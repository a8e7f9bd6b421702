"""What the package's pages say is what Python says, read without importing anything."""

import ast
import importlib
import inspect

import pytest
import reference

import relubook

MODULES = {
    f"relubook.{room}.{path.stem}": path
    for room in reference.ROOMS
    for path in reference.modules(room)
} | {"relubook.book": reference.PACKAGE / "book.py"}

SOURCE = '''
"""A module.

More words.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

__all__ = ["Pair", "SIZES", "Settings", "Tuned"]
__all__ += ["draw", "untold"]

SIZES: tuple[int, ...] = (1, 2)
"""Sizes:
as one counts them."""


def draw(x: float, /, *sizes: int, scale: float | None = 1 / 2, **rest: int) -> None:
    """Draw."""


def untold():
    pass


def hidden():
    """Not public."""


class Pair(NamedTuple):
    """A pair."""

    first: int
    second: int = 2


@dataclass(frozen=True)
class Settings:
    """Settings."""

    name: str = field(repr=False)
    options: dict = field(default_factory=dict)
    rate: float = field(default=0.1)
    made: int = field(init=False)
    kind: ClassVar[str] = "settings"

    @property
    def size(self) -> int:
        """A size."""

    @staticmethod
    def read(path: str) -> "Settings":
        """Read."""

    @classmethod
    def of(cls, other):
        """Copy."""

    def _private(self):
        """Hidden."""


class Tuned(ValueError):
    """An error."""
'''


def arguments(signature):
    """Return the names in a signature as it is written."""
    written = ast.parse(f"def function{signature}: pass").body[0].args
    several = [star for star in (written.vararg, written.kwarg) if star]
    named = [*written.posonlyargs, *written.args, *written.kwonlyargs, *several]
    return {argument.arg for argument in named}


def test_a_module_is_described(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "PACKAGE", tmp_path / "package")
    path = tmp_path / "package" / "module.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    assert reference.summary(path) == "A module."
    lines = reference.describe(path, lambda text, kind: [f"{kind}: {text.splitlines()[0]}"])
    assert [line for line in lines if line] == [
        ".. py:module:: package.module",
        "module: A module.",
        ".. py:class:: Pair(first, second=2)",
        "   class: A pair.",
        ".. py:data:: SIZES",
        "   Sizes:",
        "   as one counts them.",
        ".. py:class:: Settings(name, options=..., rate=0.1)",
        "   class: Settings.",
        "   .. py:property:: size",
        "      method: A size.",
        "   .. py:method:: read(path)",
        "      :staticmethod:",
        "      method: Read.",
        "   .. py:method:: of(other)",
        "      :classmethod:",
        "      method: Copy.",
        ".. py:class:: Tuned",
        "   class: An error.",
        ".. py:function:: draw(x, /, *sizes, scale=1 / 2, **rest)",
        "   function: Draw.",
    ]


@pytest.mark.parametrize("name", MODULES)
def test_the_pages_say_what_python_says(name):
    """All that a module defines and lists is described, with the parameters that it takes."""
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    found = reference.public(MODULES[name])
    assert set(found) <= set(listed)
    for public in listed:
        value = getattr(module, public)
        if getattr(value, "__module__", None) != name or not callable(value):
            continue
        assert public in found, f"{name}.{public} has no docstring"
        node = found[public][0]
        if isinstance(node, ast.FunctionDef):
            told = arguments(reference.signature(node.args, bound=False))
            assert told == set(inspect.signature(inspect.unwrap(value)).parameters), public
        elif isinstance(node, ast.ClassDef) and (written := reference.class_signature(node)):
            assert arguments(written) == set(inspect.signature(value).parameters), public


def test_every_module_of_the_package_is_in_a_room():
    rooms = {path.parent.name for path in reference.PACKAGE.glob("*/__init__.py")}
    assert rooms == set(reference.ROOMS)
    assert set(relubook._HOME.values()) <= {n.removeprefix("relubook.") for n in MODULES}
