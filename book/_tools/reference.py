"""Read the package's public names, signatures and docstrings without importing it.

So the site is built without torch, and whatever a module does on import.  What a module lists in
``__all__`` and documents is described; signatures stand as they are written, without types, since
the docstrings give shapes and units.
"""

import ast
import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "relubook"
ROOMS = ("layers", "units", "training", "integrations", "evidence", "chapters")

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
Convert = Callable[[str, str], list[str]]
"""Turns a docstring of a kind ("module", "class", ...) into lines of reStructuredText."""


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"))


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    return " ".join((ast.get_docstring(parse(path)) or "").split("\n\n")[0].split())


def modules(room: str) -> list[Path]:
    """Return the modules of a room (a folder of the package) that are described."""
    return [p for p in sorted((PACKAGE / room).glob("*.py")) if not p.stem.startswith("_")]


def definitions(tree: ast.Module) -> dict[str, tuple[Definition, str]]:
    """Return what a module defines at its top level, by name, each with its docstring."""
    found: dict[str, tuple[Definition, str]] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node, ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(target, ast.Name):
                told = isinstance(text, ast.Constant) and isinstance(text.value, str)
                found[target.id] = node, inspect.cleandoc(str(text.value)) if told else ""
    return found


def public(path: Path) -> dict[str, tuple[Definition, str]]:
    """Return what a module lists in ``__all__`` and defines, itself or in a private module."""
    tree = parse(path)
    own = definitions(tree)
    names: list[str] = []
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            names += ast.literal_eval(node.value)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("relubook."):
            home = PACKAGE.parent / f"{node.module.replace('.', '/')}.py"
            if home.stem.startswith("_") and home.exists():
                theirs = definitions(parse(home))
                own |= {a.name: theirs[a.name] for a in node.names if a.name in theirs}
    return {name: own[name] for name in names if name in own and own[name][1]}


def signature(arguments: ast.arguments, *, bound: bool) -> str:
    """Return arguments with their defaults as written, without types, and without ``self``."""
    plain = copy.deepcopy(arguments)
    for argument in ast.walk(plain):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if bound:
        del (plain.posonlyargs or plain.args)[0]
    return f"({ast.unparse(plain)})"


def _decorators(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    calls = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return {ast.unparse(call).rpartition(".")[2] for call in calls}


def class_signature(node: ast.ClassDef) -> str:
    """Return how an instance is made: by ``__init__``, or from the fields of a data class."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return signature(member.args, bound=True)
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    if "dataclass" not in _decorators(node) and "NamedTuple" not in bases:
        return ""
    fields = []
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            name, value = member.target.id, member.value
            if "ClassVar" in ast.unparse(member.annotation):
                continue
            if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
                given = {word.arg: word.value for word in value.keywords}
                if "init" in given:
                    continue
                value = given.get("default", given.get("default_factory") and ast.Constant(...))
            fields.append(name if value is None else f"{name}={ast.unparse(value)}")
    return f"({', '.join(fields)})"


def _indented(lines: list[str]) -> list[str]:
    return [f"   {line}" if line else "" for line in lines]


def _members(node: ast.ClassDef, convert: Convert) -> Iterator[str]:
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name.startswith("_"):
            continue
        decorators = _decorators(member)
        if (text := ast.get_docstring(member)) is None or "setter" in decorators:
            continue
        if decorators & {"property", "cached_property"}:
            yield f".. py:property:: {member.name}"
        else:
            static = "staticmethod" in decorators
            yield f".. py:method:: {member.name}{signature(member.args, bound=not static)}"
            for kind in decorators & {"staticmethod", "classmethod"}:
                yield f"   :{kind}:"
        yield from ["", *_indented(convert(text, "method")), ""]


def describe(path: Path, convert: Convert) -> list[str]:
    """Return a module's description as lines of reStructuredText."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    text = ast.get_docstring(parse(path)) or ""
    lines = [f".. py:module:: {module}", "", *convert(text, "module"), ""]
    for name, (node, told) in public(path).items():
        if isinstance(node, ast.FunctionDef):
            lines += [f".. py:function:: {name}{signature(node.args, bound=False)}", ""]
            lines += [*_indented(convert(told, "function")), ""]
        elif isinstance(node, ast.ClassDef):
            lines += [f".. py:class:: {name}{class_signature(node)}", ""]
            lines += [*_indented(convert(told, "class")), ""]
            lines += _indented(list(_members(node, convert)))
        else:
            lines += [f".. py:data:: {name}", "", *_indented(told.splitlines()), ""]
    return lines
