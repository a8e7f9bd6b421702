"""Fingerprints of the package's own sources: what a stored result or chapter was computed by.

A result depends on the modules that computed it and on everything of the package they import. The
imports are read from the sources, without running them.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["code_only", "imported_modules", "module_closure", "sources_digest"]

_HERE = Path(__file__).parents[1]


def imported_modules(source: str, *, package: Path = _HERE) -> list[str]:
    """Return the modules of the package that a piece of Python code imports directly.

    Args:
        source: Python code, such as the joined cells of a chapter.
        package: Folder of the package; relubook's own by default.

    Returns:
        Sorted short names, such as ``["diagnosis", "stacked"]``. A public name of the package
        counts as the module it lives in, whether written ``from relubook import diagnose``,
        ``relubook.diagnose`` or ``import relubook as rb; rb.diagnose``.

    Raises:
        SyntaxError: If the code is not Python.
    """
    return sorted(set(_imports(ast.parse(source), package)))


def module_closure(
    names: Iterable[str], *, package: Path = _HERE, exclude: Iterable[str] = ()
) -> list[str]:
    """Return modules with everything of the package that they import, directly or not.

    Args:
        names: Modules or public names of the package, with or without the leading ``relubook.``;
            the package's own name stands for all of its public modules.
        package: Folder of the package; relubook's own by default.
        exclude: Modules to leave out, with what is imported by them alone.

    Returns:
        Sorted short names. The package's ``__init__`` is left out: it only says where the public
        names live.

    Raises:
        ValueError: If a name is neither a module nor a public name of the package.
    """
    closure: set[str] = set()
    exclude = set(exclude)
    waiting = [module for name in names for module in _resolve(name, package)]
    while waiting:
        module = waiting.pop()
        if module not in closure | exclude:
            closure.add(module)
            tree = ast.parse(_path(module, package).read_text(encoding="utf-8"))
            waiting += _imports(tree, package)
    return sorted(closure)


def sources_digest(
    names: Iterable[str], *, package: Path = _HERE, exclude: Iterable[str] = ()
) -> str:
    """Return a digest of the code of modules and of everything of the package they import.

    Comments, docstrings and blank lines do not count, so that a better explanation does not make
    a result stale.

    Args:
        names: As for :func:`module_closure`.
        package: Folder of the package; relubook's own by default.
        exclude: As for :func:`module_closure`.

    Returns:
        64 hexadecimal digits (SHA-256), the same on every platform.

    Raises:
        ValueError: If a name is neither a module nor a public name of the package.
    """
    digest = hashlib.sha256()
    for module in module_closure(names, package=package, exclude=exclude):
        code = code_only(_path(module, package).read_text(encoding="utf-8"))
        digest.update(f"{module}\n{len(code)}\n{code}".encode())
    return digest.hexdigest()


def _path(module: str, package: Path) -> Path:
    return package / f"{module.replace('.', '/')}.py"


def _homes(package: Path) -> dict[str, str]:
    """Read the table of public names from the package's ``__init__`` without importing it."""
    init = package / "__init__.py"
    if init.exists():
        for node in ast.parse(init.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign):
                targets = [node.target]
            if any(isinstance(t, ast.Name) and t.id == "_HOME" for t in targets):
                assert isinstance(node, ast.Assign | ast.AnnAssign)
                return ast.literal_eval(node.value or ast.Dict([], []))
    return {}


def _resolve(name: str, package: Path) -> list[str]:
    """Return the modules that a name stands for; several only for the package itself."""
    homes = _homes(package)
    if name == package.name:
        return sorted(set(homes.values()))
    short = name.removeprefix(package.name + ".")
    parts = short.split(".")
    for length in range(len(parts), 0, -1):
        candidate = ".".join(parts[:length])
        if candidate != "__init__" and _path(candidate, package).exists():
            return [candidate]
    if short.split(".")[0] in homes:
        return [homes[short.split(".")[0]]]
    raise ValueError(f"{name!r} is neither a module nor a public name of {package.name}")


def _known(name: str, package: Path) -> list[str]:
    try:
        return _resolve(name, package)
    except ValueError:
        return []


def _imports(tree: ast.AST, package: Path) -> Iterator[str]:
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == package.name:
                    aliases.add(alias.asname or alias.name)
                elif alias.name.startswith(package.name + "."):
                    yield from _known(alias.name, package)
                    if alias.asname is None:
                        aliases.add(package.name)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = f"{package.name}.{source}".rstrip(".")
            if source == package.name:
                for alias in node.names:
                    everything = alias.name == "*"
                    yield from _known(source if everything else alias.name, package)
            elif source.startswith(package.name + "."):
                inner = [_known(f"{source}.{alias.name}", package) for alias in node.names]
                yield from [m for found in inner for m in found] or _known(source, package)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
        ):
            yield from _known(node.attr, package)


def code_only(source: str) -> str:
    """Return Python code without comments, docstrings, blank lines and trailing blanks."""
    lines = [line.rstrip() for line in source.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    scopes = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, scopes) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            for row in range(text.lineno - 1, text.end_lineno or text.lineno):
                lines[row] = ""
    return "\n".join(line for line in lines if line)
