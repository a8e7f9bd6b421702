"""Fingerprints of code: what a stored result or a chapter was computed by.

A fingerprint covers a piece of code and every definition of the package that it reaches by name,
directly or through others. Only code counts: neither where a definition lives and how it is
imported, nor comments, docstrings and layout, so that moving a function makes nothing stale.
"""

import ast
import functools
import hashlib
import json
import symtable
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

__all__ = ["code_digest"]

_HERE = Path(__file__).parents[2] / "src" / "relubook"
_OWN = "__main__"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)
_CHANGERS = {"add", "append", "extend", "insert", "pop", "register", "remove"}
_CHANGERS |= {"setdefault", "update"}

Key = tuple[str, str]  # a module and a name in it, "*" for all of the module


def code_digest(
    *pieces: str, only: str | None = None, package: Path = _HERE, exclude: Iterable[str] = ()
) -> str:
    """Return a digest (SHA-256) of code and of all definitions of the package that it reaches.

    It is the same on every platform and Python version. Where it is unsure, it includes more: all
    of a module that is passed on as a value, and what fills a registry in place wherever the
    registry is used. Names in strings are not followed.

    Args:
        *pieces: Python code; several pieces, such as the cells of a chapter, share their names.
        only: Start from this definition instead of everything; ValueError if there is none.
        package: Folder of the package; relubook's own by default.
        exclude: Modules or definitions that do not count, such as ``"evidence.results"``.
    """
    paths = sorted(package.rglob("*.py"))
    names = (".".join(p.relative_to(package.parent).with_suffix("").parts) for p in paths)
    files = zip(names, (path.read_text(encoding="utf-8") for path in paths), strict=True)
    sources = _Sources(_package(tuple(files)), _Module(_OWN, "\n".join(pieces)))
    counts = [sum(not _is_silent(node) for node in ast.parse(piece).body) for piece in pieces]
    excluded = tuple(f"{package.name}.{entry}." for entry in exclude)
    text = json.dumps(sources.reach(counts, only, excluded))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_silent(node: object) -> bool:
    """Whether a statement is an import or a bare string: where a name lives, or what it is for."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return isinstance(node, ast.Import | ast.ImportFrom)


def _aliases(tree: ast.AST, parents: list[str]) -> dict[str, str]:
    """Return the dotted names that imported names stand for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or full] = full
        elif isinstance(node, ast.ImportFrom):
            home = parents[: len(parents) + 1 - node.level] if node.level else []
            home = [*home, node.module] if node.module else home
            found |= {a.asname or a.name: ".".join([*home, a.name]) for a in node.names}
    return found


class _Module:
    """The top-level statements of a module, without imports and docstrings."""

    def __init__(self, path: str, source: str) -> None:
        self.name = path.removesuffix(".__init__")
        body, parents = ast.parse(source).body, path.split(".")[:-1]
        inline: list[ast.stmt] = [node for node in body if not isinstance(node, _DEFINITIONS)]
        self.aliases = _aliases(ast.Module(inline, []), parents)
        self.statements = [_Statement(self, n, parents) for n in body if not _is_silent(n)]
        self.bound: dict[str, list[_Statement]] = {}
        for statement in self.statements:
            for name in statement.bound - self.aliases.keys():
                self.bound.setdefault(name, []).append(statement)
        # A package that finds its names by itself has tables of them: name -> module.
        values = [getattr(s.node, "value", None) for s in self.statements]
        tables = [v for v in values if isinstance(v, ast.Dict) and "__getattr__" in self.bound]
        own = f"{self.name}."
        self.homes = {
            str(key.value): own + str(home.value).removeprefix(own).lstrip(".")
            for table in tables
            for key, home in zip(table.keys, table.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(home, ast.Constant)
        }


class _Statement:
    """A top-level statement: the names that it binds and those that it takes from its module."""

    def __init__(self, module: _Module, node: ast.stmt, parents: list[str]) -> None:
        self.module, self.node = module, node
        self.aliases = _aliases(node, parents) if isinstance(node, _DEFINITIONS) else {}
        tables = [symtable.symtable(ast.unparse(node), "", "exec")]
        self.bound = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned()}
        self.bound.discard("__all__")
        self.taken = set(self.aliases)
        for table in tables:
            tables += table.get_children()
            everything = table is tables[0] or isinstance(table, symtable.Class)
            self.taken |= {s.get_name() for s in table.get_symbols() if everything or s.is_global()}

    def refers(self, node: ast.AST) -> str | None:
        """Return the dotted name that ``a.b.c`` stands for, if the module defines or imports it."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names, node = [node.attr, *names], node.value
        if not isinstance(node, ast.Name) or node.id not in self.taken:
            return None
        start = self.aliases.get(node.id) or self.module.aliases.get(node.id)
        if start is None and node.id in self.module.bound:
            start = f"{self.module.name}.{node.id}"
        elif start is None and "*" in self.module.aliases:
            start = self.module.aliases["*"].removesuffix("*") + node.id
        return start and ".".join([start, *names])

    def changes(self) -> Iterator[str]:
        """Yield the dotted names that the statement changes in place, when run or called."""
        for node in ast.walk(self.node):
            target = None
            if isinstance(node, ast.Attribute | ast.Subscript):
                target = None if isinstance(node.ctx, ast.Load) else node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in _CHANGERS else None
            elif isinstance(node, ast.AugAssign):
                target = node.target
            elif isinstance(node, ast.Global):
                yield from (f"{self.module.name}.{name}" for name in node.names)
            while isinstance(target, ast.Subscript):
                target = target.value
            if target is not None and (dotted := self.refers(target)):
                yield dotted


class _Sources:
    """The modules of a package, perhaps beside some code, with what each name stands for."""

    def __init__(self, package: "_Sources | None", *modules: _Module) -> None:
        self.modules = {module.name: module for module in modules}
        self.known: dict[Key, tuple[str, set[Key]]] = {}
        self.changes: dict[Key, set[Key]] = {}
        self.fillers: list[tuple[_Statement, set[Key]]] = []
        if package:
            self.modules |= package.modules
            self.known |= package.known
            self.changes |= package.changes
            self.fillers += package.fillers
        self.fillers += self._fill([s for module in modules for s in module.statements])

    def find(self, dotted: str) -> tuple[Key | None, str]:
        """Return what a dotted name stands for (None outside the package) and its plain name."""
        rest: list[str] = []
        start = dotted
        while start not in self.modules:
            start, _, last = start.rpartition(".")
            rest = [last, *rest]
            if not start:
                return None, dotted
        module, name = self.modules[start], rest[0] if rest else "*"
        if name == "*" or name in module.bound:
            return (module.name, name), ".".join(rest)
        if name in module.aliases:
            return self.find(".".join([module.aliases[name], *rest[1:]]))
        if home := module.homes.get(name):
            inside = self.modules.get(home)
            is_module = inside and not (name in inside.bound or name in inside.aliases)
            return self.find(".".join([home, *rest[1 if is_module else 0 :]]))
        return (None if name.startswith("__") else (module.name, "*")), ".".join(rest)

    def write(
        self, node: object, of: _Statement, uses: set[Key], *, on_import: bool = False
    ) -> str:
        """Write code, or what of it runs ``on_import``, with plain names; collect what it uses."""
        again = functools.partial(self.write, of=of, uses=uses, on_import=on_import)
        if isinstance(node, list):
            return "[" + ",".join(again(item) for item in node if not _is_silent(item)) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Name | ast.Attribute) and (dotted := of.refers(node)):
            key, plain = self.find(dotted)
            uses |= {key} if key else set()
            return plain
        if on_import and isinstance(node, _FUNCTIONS):
            return again([*node.decorator_list, *node.args.defaults, *node.args.kw_defaults])
        skipped = {"ctx", "kind", "type_comment"} | ({"annotation"} if on_import else set())
        if on_import and isinstance(node, ast.Lambda):
            skipped |= {"args", "body"}
        # Written here, since `ast.unparse` and `ast.dump` differ between versions of Python.
        fields = [(k, v) for k, v in ast.iter_fields(node) if k not in skipped]
        inner = ",".join(f"{k}={again(v)}" for k, v in fields if v is not None and v != [])
        return f"{type(node).__name__}({inner})"

    def read(self, key: Key) -> tuple[str, set[Key]]:
        """Return the code that defines a name, and what that uses."""
        if key not in self.known:
            module, name = self.modules[key[0]], key[1]
            # A package that finds its names by itself may give any.
            homes = self.modules.values() if module.homes else [module]
            everything = [s for home in homes for s in home.statements]
            uses: set[Key] = set()
            chosen = everything if name == "*" else module.bound[name]
            self.known[key] = "\n".join([self.write(s.node, s, uses) for s in chosen]), uses
        return self.known[key]

    def closure(self, keys: Iterable[Key], excluded: tuple[str, ...] = ()) -> set[Key]:
        """Return definitions with all that they use, directly or not."""
        found, waiting = set(), list(keys)
        for key in waiting:
            if key not in found and not f"{key[0]}.{key[1]}.".startswith(excluded or "-"):
                found.add(key)
                waiting += self.read(key)[1]
        return found

    def _fill(self, statements: list[_Statement]) -> Iterator[tuple[_Statement, set[Key]]]:
        """Yield statements that change others' values on import, with what they change."""
        changed = [{key for key, _ in map(self.find, s.changes()) if key} for s in statements]
        for s, found in zip(statements, changed, strict=True):
            for name in s.bound if found else ():
                self.changes.setdefault((s.module.name, name), set()).update(found)
        for s, found in zip(statements, changed, strict=True):
            uses: set[Key] = set()
            self.write(s.node, s, uses, on_import=True)
            filled = {key for user in self.closure(uses) for key in self.changes.get(user, ())}
            if not isinstance(s.node, _DEFINITIONS):
                filled |= found
                filled |= set() if isinstance(s.node, ast.Assign | ast.AnnAssign) else uses
            if filled:
                yield s, filled

    def reach(self, counts: list[int], only: str | None, excluded: tuple[str, ...]) -> list[list]:
        """Return the code of each piece (none with ``only``), and that of all it reaches."""
        own = self.modules[_OWN]
        if only is not None and only not in own.bound:
            raise ValueError(f"only must be a definition of the code, not {only!r}")
        uses, rest = {(_OWN, only)} if only else set(), iter(own.statements)
        counts = counts if only is None else []
        pieces = [[self.write(s.node, s, uses) for s in islice(rest, n)] for n in counts]
        fillers, texts, found = self.fillers, set(), self.closure(uses, excluded)
        while chosen := [filler for filler in fillers if filler[1] & found]:
            fillers = [filler for filler in fillers if filler not in chosen]
            texts |= {self.write(s.node, s, uses) for s, _ in chosen}
            found = self.closure(uses, excluded)
        texts |= {self.read(key)[0] for key in found if only or key[0] != _OWN}
        return [pieces, sorted(texts)]


@functools.lru_cache(maxsize=8)
def _package(files: tuple[tuple[str, str], ...]) -> _Sources:
    return _Sources(None, *(_Module(name, source) for name, source in files))
