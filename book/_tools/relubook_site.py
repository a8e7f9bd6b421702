"""Sphinx extension of this book: leave out text twins, draw ledger and rooms, slim the pages.

The package is read from this tree, whether installed or not, and without torch: autodoc puts a mock
in its place.
"""

import ast
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from docutils import nodes
from notebooks import chapters
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import _MockObject
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import signature, stringify_signature

from relubook.evidence.claims import ledger, source_notes

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "relubook"
UNUSED_SCRIPTS = ("thebe", "togglebutton", "design-tabs", "copybutton_funcs")
ROOMS = ("layers", "units", "training", "evidence", "chapters")
UNUSED_STYLES = ("thebe", "togglebutton", "sphinx-design")

_MockObject.__or__ = _MockObject.__ror__ = lambda self, other: self  # annotations: Tensor | None


def sign_modules(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signed: str, returned: str
) -> tuple[str, str] | None:
    """Return the signature of a class whose base is a mock, which autodoc does not see."""
    if what != "class" or not issubclass(obj, _MockObject):
        return None
    arguments = signature(obj.__init__, bound_method=True)
    return stringify_signature(arguments, show_annotation=False), returned


def skip_repeated(
    app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out fields of named tuples, and what another page describes already."""
    if type(member).__name__ == "_tuplegetter":
        return True
    if what == "module" and isinstance(member, type | FunctionType):
        home = member.__module__
        elsewhere = home != app.env.temp_data["autodoc:module"]
        return (elsewhere and not home.rpartition(".")[2].startswith("_")) or None
    return None


def exclude_text_twins(app: Sphinx, config: Any) -> None:
    """Keep the text side of every pair out of the build, which takes the executed side."""
    root = Path(app.srcdir)
    config.exclude_patterns += [
        path.resolve().relative_to(root.resolve()).as_posix() for path in chapters()
    ]


def lighten_page(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Leave out scripts and styles that no page uses; follow the reader's light or dark mode."""
    context["default_mode"] = "auto"

    def used(asset: Any, unused: tuple[str, ...]) -> bool:
        inline = getattr(asset, "attributes", {}).get("body") or ""
        name = str(getattr(asset, "filename", asset) or inline)
        return not any(word in name.lower() for word in unused)

    context["script_files"] = [f for f in context["script_files"] if used(f, UNUSED_SCRIPTS)]
    context["css_files"] = [f for f in context["css_files"] if used(f, UNUSED_STYLES)]


class ClaimsTable(SphinxDirective):
    """``{claims-table}``: the ledger, chapter by chapter, with links to the chapters that exist."""

    def run(self) -> list[nodes.Node]:
        """Return one section's worth of tables."""
        self.env.note_dependency(str(Path(__file__)))
        for name in ("evidence/claims.toml", "evidence/verdicts.json", "evidence/claims.py"):
            self.env.note_dependency(str(PACKAGE / name))
        lines: list[str] = []
        by_chapter: dict[str, list[dict[str, Any]]] = {}
        for row in ledger():
            by_chapter.setdefault(row["chapter"], []).append(row)
        for chapter, rows in by_chapter.items():
            name = chapter.replace("-", " ").capitalize()
            built = f"book/{chapter}" in self.env.found_docs
            lines += [f"## {{doc}}`{chapter}`" if built else f"## {name} (in preparation)", ""]
            for row in rows:
                lines += [f"`{row['id']}` ({row['whose']})", f": {row['statement']}", ""]
                lines += [f"  {line}" for line in _verdict_lines(row)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _verdict_lines(row: dict[str, Any]) -> list[str]:
    verdict = row["verdict"] or "untested"
    condition = f" on {row['depends_on']}" if row["depends_on"] else ""
    lines = [f"**{verdict.capitalize()}**{condition}. {row['finding'] or ''}".rstrip(), ""]
    for entry in row["evidence"]:
        if "source" in entry:
            lines.append(f"- [{entry['source']}]({entry['url']})")
        else:
            lines.append(
                f"- *{entry['part']}*: {entry['prediction']}. "
                f"Test: {entry['test']}. Measured: {entry['measured']}. **{entry['verdict']}**"
            )
    return [*lines, ""]


class SourceNotes(SphinxDirective):
    """``{source-notes}``: the five notes that the claims come from."""

    def run(self) -> list[nodes.Node]:
        """Return a bullet list."""
        lines = []
        for label, note in source_notes().items():
            facts = ", ".join(filter(None, [note["author"], note["date"] or "undated"]))
            titles = dict.fromkeys(filter(None, [note["title"], note["title_en"]]))
            lines.append(f"- **{label}**: {' · '.join(titles)} ({facts})")
        return self.parse_text_to_nodes("\n".join(lines))


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring, as one line of reStructuredText."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def public_modules(room: str) -> list[Path]:
    """Return the modules of a room (a folder of the package) that have a page."""
    return [p for p in sorted((PACKAGE / room).glob("*.py")) if not p.stem.startswith("_")]


class Rooms(SphinxDirective):
    """``{rooms}``: for each room of the package its modules, a line and a link each."""

    def run(self) -> list[nodes.Node]:
        """Return a section a room."""
        self.env.note_reread()
        lines: list[str] = []
        for room in ROOMS:
            lines += [f"### `{room}`", "", "```{eval-rst}"]
            lines += [summary(PACKAGE / room / "__init__.py"), ""]
            lines += [".. list-table::", "   :widths: 25 75", ""]
            for module in public_modules(room):
                lines += [
                    f"   * - :py:mod:`{module.stem} <relubook.{room}.{module.stem}>`",
                    f"     - {summary(module)}",
                ]
            lines += ["```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class Room(SphinxDirective):
    """``{room} NAME``: what the modules of one room define."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a section a module."""
        self.env.note_reread()
        room = self.arguments[0]
        lines = ["```{eval-rst}", summary(PACKAGE / room / "__init__.py"), "```", ""]
        for module in public_modules(room):
            lines += [f"## `{module.stem}`", "", "```{eval-rst}"]
            lines += [f".. automodule:: relubook.{room}.{module.stem}", "   :members:", "```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("config-inited", exclude_text_twins)
    app.connect("autodoc-process-signature", sign_modules)
    app.connect("autodoc-skip-member", skip_repeated)
    app.connect("html-page-context", lighten_page, priority=900)
    app.add_directive("claims-table", ClaimsTable)
    app.add_directive("source-notes", SourceNotes)
    app.add_directive("rooms", Rooms)
    app.add_directive("room", Room)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
