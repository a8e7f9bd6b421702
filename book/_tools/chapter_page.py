"""What a chapter's page shows that its notebook does not: furniture made of what is there.

The short answer comes before its figure; a gray line says the time and leads to Colab and to all
code; a figure's cell gives it a caption; chips at the end lead to the ledger's rows, and they back.
The notebooks stay plain Markdown, and no code cell is touched.
"""

import re
from html import escape
from typing import Any
from urllib.parse import urlparse

import reference
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from relubook.evidence.claims import ledger

LEDGER = "book/claims"
CHAPTER = re.compile(r"book/[\w-]+")
TIME = re.compile(r"(\S.*? minutes to read), (.*? to run)\.\s*")
FIGURE = re.compile(r"# @title Figure: (.+)")


def is_chapter(env: Any, name: str) -> bool:
    """Whether a page is a notebook that teaches."""
    return bool(CHAPTER.fullmatch(name)) and str(env.doc2path(name)).endswith(".ipynb")


def raw(html: str) -> nodes.raw:
    """Return HTML as it is."""
    return nodes.raw("", html, format="html")


def colab(config: Any, name: str) -> str:
    """Return the address that the theme's launch button has."""
    options = config.html_theme_options
    place = urlparse(options["repository_url"]).path.strip("/")
    host, branch = options["launch_buttons"]["colab_url"], options["repository_branch"]
    return f"{host}/github/{place}/blob/{branch}/{name}.ipynb"


def name_of(claim: str) -> str:
    """Return a claim's id as words."""
    words = claim.removeprefix("spine-").removeprefix("tool-").replace("-", " ")
    return words.replace("bn ", "batch norm ")


class ChapterPage(SphinxTransform):
    """Furnish a chapter, and lead the ledger's rows back to its chips."""

    default_priority = 410  # after the explorables have taken their sentences

    def apply(self, **_: Any) -> None:
        """Change the page of a chapter or of the ledger."""
        if self.env.docname == LEDGER:
            self.lead_back()
        elif is_chapter(self.env, self.env.docname):
            self.answer_first()
            self.line()
            self.captions()
            self.chips()

    def answer_first(self) -> None:
        """Move the short answer up to the question."""
        for paragraph in self.document.findall(nodes.paragraph):
            if paragraph.astext().startswith("The short answer."):
                page, at = paragraph.parent, paragraph.parent.index(paragraph)
                answer = page[at - 1 : at + 2]
                question = next(
                    k for k, node in enumerate(page) if not isinstance(node, nodes.title)
                )
                del page[at - 1 : at + 2]
                page.insert(question + 1, answer)
                return

    def line(self) -> None:
        """Take the time out of the sentence that starts with it, and lead to Colab and the code."""
        for paragraph in self.document.findall(nodes.paragraph):
            first = next(iter(paragraph.findall(nodes.Text)), nodes.Text(""))
            if match := TIME.match(first.astext()):
                links = (
                    f'<a href="{escape(colab(self.config, self.env.docname))}">Open in Colab</a>'
                    '<button type="button" class="ch-code" hidden>Show all code</button>'
                )
                times = "".join(f"<span>{escape(words)}</span>" for words in match.groups())
                paragraph.parent.insert(
                    paragraph.parent.index(paragraph), raw(f'<p class="ch-line">{times}{links}</p>')
                )
                first.parent.replace(first, nodes.Text(first[match.end() :]))
                paragraph["classes"].append("ch-need")
                return

    def captions(self) -> None:
        """Number the figures, and name each as its cell does."""
        cells = [c for c in self.document.findall(nodes.container) if "cell" in c["classes"]]
        number = 0
        for cell in cells:
            source = next(iter(cell.findall(nodes.literal_block)), nodes.literal_block())
            if match := FIGURE.match(source.astext()):
                number += 1
                caption = nodes.paragraph(classes=["ch-caption"], ids=[f"figure-{number}"])
                caption += nodes.strong(text=f"Figure {number}.")
                caption += nodes.Text(f" {match[1][0].upper()}{match[1][1:]}.")
                cell.parent.insert(cell.parent.index(cell) + 1, caption)

    def chips(self) -> None:
        """Close with a link for each claim that the chapter's evidence judges."""
        for name in ("claims.toml", "verdicts.json"):
            self.env.note_dependency(str(reference.PACKAGE / "evidence" / name))
        chapter = self.env.docname.removeprefix("book/")
        links = [
            f'<li><a class="ch-chip v-{claim["verdict"].replace(", ", "-")}" '
            f'id="chip-{claim["id"]}" href="claims.html#claim-{claim["id"]}">'
            f"{escape(name_of(claim['id']))}: <b>{claim['verdict']}</b></a></li>"
            for claim in ledger()
            if claim["chapter"] == chapter
        ]
        if links:
            page = next(iter(self.document.findall(nodes.section)))
            said = "Judged in this chapter's evidence, each with its row in the ledger:"
            page += raw(
                f'<nav class="ch-chips" aria-label="Claims of this chapter"><p>{said}</p>'
                f"<ul>{''.join(links)}</ul></nav>"
            )

    def lead_back(self) -> None:
        """Add to each row of the ledger a link to its chip."""
        cell = re.compile(r'<a [^>]*href="evidence/([\w-]+)\.html#claim-([\w-]+)">The cell</a>')

        def both(match: re.Match[str]) -> str:
            if f"book/{match[1]}" not in self.env.found_docs:
                return match[0]
            back = f'href="{match[1]}.html#chip-{match[2]}">The chapter</a>'
            return f'{match[0]} \u00b7 <a class="reference internal" {back}'

        for node in list(self.document.findall(nodes.raw)):
            if (text := cell.sub(both, node.astext())) != node.astext():
                node.replace_self(raw(text))


def add_assets(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Load script and style of a chapter's furniture with chapters alone."""
    if doctree is not None and is_chapter(app.env, page):
        app.add_css_file("chapter.css")
        app.add_js_file("chapter.js", loading_method="defer")


def setup(app: Sphinx) -> None:
    """Register the transform."""
    app.add_transform(ChapterPage)
    app.connect("html-page-context", add_assets, priority=800)
