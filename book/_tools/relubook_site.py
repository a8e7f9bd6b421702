"""Sphinx extension of this book: leave out text twins, draw ledger and rooms, slim the pages.

The package is taken from this tree, whether installed or not.
"""

import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import chapter_page
import explorables
import front_page
import icons
import ledger_page
import reference
import searching
import speed
from docutils import nodes
from last_run import LastRun
from notebooks import EVIDENCE, texts
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

UNUSED_SCRIPTS = ("thebe", "togglebutton", "design-tabs", "copybutton_funcs")
UNUSED_STYLES = ("thebe", "togglebutton", "sphinx-design")


def exclude_text_twins(app: Sphinx, config: Any) -> None:
    """Keep the text side of every pair out of the build, which takes the executed side."""
    root = Path(app.srcdir)
    config.exclude_patterns += [
        path.resolve().relative_to(root.resolve()).as_posix() for path in texts().values()
    ]


def lighten_page(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Leave out scripts and styles that no page uses; follow the reader's light or dark mode."""
    context["default_mode"] = "auto"
    draw = context["generate_toctree_html"]

    def labeled(*arguments: Any, **options: Any) -> Any:
        """Give the sidebar's arrows, which the theme leaves unnamed, words for screen readers."""
        drawn = draw(*arguments, **options)
        for arrow in drawn.find_all("summary") if hasattr(drawn, "find_all") else ():
            arrow["aria-label"] = "Show or hide the pages below"
        return drawn

    context["generate_toctree_html"] = labeled

    def used(asset: Any, unused: tuple[str, ...]) -> bool:
        inline = getattr(asset, "attributes", {}).get("body") or ""
        name = str(getattr(asset, "filename", asset) or inline)
        return not any(word in name.lower() for word in unused)

    context["script_files"] = [f for f in context["script_files"] if used(f, UNUSED_SCRIPTS)]
    context["css_files"] = [f for f in context["css_files"] if used(f, UNUSED_STYLES)]


def turn_past_evidence(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Lead by previous and next from chapter to chapter; the evidence is a step aside."""
    relations = app.builder.relations
    for way, place in (("prev", 1), ("next", 2)):
        other = page
        while (other := relations.get(other, (None,) * 3)[place]) and f"/{EVIDENCE}/" in other:
            pass
        if other and page in relations and f"/{EVIDENCE}/" not in page:
            title = app.builder.render_partial(app.env.titles[other])["title"]
            context[way] = {"link": app.builder.get_relative_uri(page, other), "title": title}


class SourceNotes(SphinxDirective):
    """``{source-notes}``: the five notes that the claims come from."""

    def run(self) -> list[nodes.Node]:
        """Return a bullet list."""
        claims = (reference.PACKAGE / "evidence" / "claims.toml").read_text(encoding="utf-8")
        lines = []
        for label, note in tomllib.loads(claims)["notes"].items():
            facts = ", ".join(filter(None, [note["author"], note["date"] or "undated"]))
            titles = dict.fromkeys(filter(None, [note["title"], note["title_en"]]))
            lines.append(f"- **{label}**: {' · '.join(titles)} ({facts})")
        return self.parse_text_to_nodes("\n".join(lines))


class Rooms(SphinxDirective):
    """``{rooms}``: for each room of the package its modules, a line and a link each."""

    def run(self) -> list[nodes.Node]:
        """Return a section a room."""
        self.env.note_reread()
        lines: list[str] = []
        for room in reference.ROOMS:
            lines += [f"### `{room}`", "", "```{eval-rst}"]
            lines += [reference.summary(reference.PACKAGE / room / "__init__.py"), ""]
            lines += [".. list-table::", "   :widths: 25 75", ""]
            for path in reference.modules(room):
                lines.append(f"   * - :py:mod:`{path.stem} <relubook.{room}.{path.stem}>`")
                lines.append(f"     - {reference.summary(path)}")
            lines += ["```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class Room(SphinxDirective):
    """``{room} NAME``: what the modules of a room define; a module alone is a room of its own."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a section a module."""
        self.env.note_reread()
        room = reference.PACKAGE / self.arguments[0]
        if not room.is_dir():
            return self.parse_text_to_nodes(self.describe(room.with_suffix(".py")))
        lines = ["```{eval-rst}", reference.summary(room / "__init__.py"), "```", ""]
        for path in reference.modules(room.name):
            lines += [f"## `{path.stem}`", "", self.describe(path), ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)

    def describe(self, path: Path) -> str:
        """Return a module's description as MyST text."""

        def convert(text: str, kind: str) -> list[str]:
            return str(GoogleDocstring(text, self.config, self.env.app, kind)).splitlines()

        return "\n".join(["```{eval-rst}", *reference.describe(path, convert), "```"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("config-inited", exclude_text_twins)
    app.connect("html-page-context", lighten_page, priority=900)
    app.connect("html-page-context", turn_past_evidence)
    explorables.setup(app)
    chapter_page.setup(app)
    front_page.setup(app)
    icons.setup(app)
    ledger_page.setup(app)
    searching.setup(app)
    speed.setup(app)
    app.add_directive("last-run", LastRun)
    app.add_directive("source-notes", SourceNotes)
    app.add_directive("rooms", Rooms)
    app.add_directive("room", Room)
    safe = {"parallel_read_safe": True, "parallel_write_safe": True}
    return {"version": "1", "env_version": 1, **safe}
