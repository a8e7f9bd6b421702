"""The first page: the picture of all claims, and the chapters, each with its hero figure, small.

Which chapters there are, in which order, their titles, times and figures come from the contents and
the notebooks; the page itself has at most a line for each.
"""

import base64
import io
import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import reference
import yaml
from docutils import nodes
from PIL import Image, ImageOps
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from verdict_picture import picture

from relubook.evidence.claims import ledger

BOOK = Path(__file__).resolve().parents[1]
CONTENTS = BOOK.parent / "_toc.yml"
SIZE = (320, 200)
"""Of a thumbnail, in pixels: twice as many as it takes up, for fine screens."""
GAP = 19
"""Blank rows that end a figure's headline; between its lines there are fewer."""


@dataclass(frozen=True)
class Chapter:
    """What the first page shows of a chapter; ``question`` is the line under its title."""

    name: str
    title: str
    question: str
    time: str


def contents() -> dict[str, list[Chapter]]:
    """Return the chapters that are notebooks, by the caption of their part."""
    parts = yaml.safe_load(CONTENTS.read_text(encoding="utf-8"))["parts"]
    listed = {
        part["caption"]: [
            chapter_of(BOOK.parent / f"{entry['file']}.md")
            for entry in part["chapters"]
            if (BOOK.parent / f"{entry['file']}.ipynb").exists()
        ]
        for part in parts
    }
    return {caption: chapters for caption, chapters in listed.items() if chapters}


def chapter_of(text: Path) -> Chapter:
    """Return a chapter's facts from the text side of its pair."""
    words = text.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", words, re.MULTILINE)
    question = re.search(r"^# .+\n\n\*([^*].*)\*$", words, re.MULTILINE)
    time = re.search(r"\b(\d+ minutes) to read", words)
    if not (title and question and time):
        raise ExtensionError(f"{text.name} needs a title, a question under it and a reading time")
    return Chapter(text.stem, title[1], question[1], time[1])


def hero(notebook: Path) -> tuple[bytes, str]:
    """Return the first figure that a notebook stored, as a picture and in words."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if drawn := output.get("data", {}).get("image/png"):
                words = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
                return base64.b64decode("".join(drawn)), words
    raise ExtensionError(f"{notebook.name} has no stored figure")


def thumbnail(drawn: bytes) -> bytes:
    """Return a figure small and without its headline; one taller than wide loses its foot."""
    figure = Image.open(io.BytesIO(drawn)).convert("RGB")
    ink = [min(row) < 200 for row in rows_of(figure.convert("L"))]
    top = ink.index(True)
    while any(ink[top : top + GAP]):
        top += 1
    figure = figure.crop((0, top, figure.width, figure.height))
    if figure.height > figure.width:
        small = ImageOps.fit(figure, SIZE, Image.Resampling.LANCZOS, centering=(0, 0))
    else:
        small = ImageOps.pad(figure, SIZE, Image.Resampling.LANCZOS, color="white")
    written = io.BytesIO()
    small.save(written, "WEBP", quality=70, method=6)
    return written.getvalue()


def rows_of(gray: Image.Image) -> list[bytes]:
    """Return the rows of a gray picture."""
    flat = gray.tobytes()
    return [flat[k : k + gray.width] for k in range(0, len(flat), gray.width)]


class ChapterCards(SphinxDirective):
    """``{chapter-cards}``: the chapters part by part; in the content ``NAME: line``, where wanted.

    A chapter without a line shows the question under its title.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return a section a part."""
        lines = dict(line.split(": ", 1) for line in self.content if line.strip())
        listed = contents()
        names = [chapter.name for chapters in listed.values() for chapter in chapters]
        if strange := set(lines) - set(names):
            raise self.error(f"no such chapters: {', '.join(sorted(strange))}")
        for path in (Path(__file__), CONTENTS):
            self.env.note_dependency(str(path))
        sections = []
        for caption, chapters in listed.items():
            section = nodes.section("", nodes.title("", caption), ids=[nodes.make_id(caption)])
            cards = nodes.container(classes=["cards"])
            cards += [self.card(chapter, lines.get(chapter.name)) for chapter in chapters]
            section += cards
            sections.append(section)
        return sections

    def card(self, chapter: Chapter, line: str | None) -> nodes.Node:
        """Return one chapter: figure, title, line and time."""
        notebook = BOOK / f"{chapter.name}.ipynb"
        for path in (notebook, notebook.with_suffix(".md")):
            self.env.note_dependency(str(path))
        words = hero(notebook)[1].partition(". ")[0]
        width, height = SIZE
        root = self.env.app.builder.get_relative_uri(self.env.docname, "index")
        source = root.replace("index.html", f"_images/thumbnail-{chapter.name}.webp")
        card = nodes.container(classes=["card-of"])
        card += nodes.raw(
            "",
            f'<img src="{source}" width="{width}" height="{height}" loading="lazy" '
            f'decoding="async" alt="{escape(words.rstrip("."))}">',
            format="html",
        )
        words_of = nodes.container(classes=["card-words"])
        words_of += self.parse_text_to_nodes(f"{{doc}}`{chapter.title} <{chapter.name}>`")
        words_of += self.parse_text_to_nodes(line or f"*{chapter.question}*")
        words_of += nodes.paragraph(text=chapter.time, classes=["card-time"])
        card += words_of
        return card


class ClaimsPicture(SphinxDirective):
    """``{claims-picture}``: the verdicts as a bar, and every claim as a square."""

    def run(self) -> list[nodes.Node]:
        """Return the picture."""
        self.env.note_dependency(str(Path(__file__).with_name("verdict_picture.py")))
        for name in ("claims.toml", "verdicts.json"):
            self.env.note_dependency(str(reference.PACKAGE / "evidence" / name))
        page = self.env.app.builder.get_relative_uri(self.env.docname, "book/claims")
        return [nodes.raw("", picture(ledger(), page), format="html")]


def write_thumbnails(app: Sphinx, error: Exception | None) -> None:
    """Put the thumbnails beside the other pictures of the site."""
    if error is None and app.builder.format == "html":
        folder = Path(app.outdir) / "_images"
        folder.mkdir(exist_ok=True)
        for chapters in contents().values():
            for chapter in chapters:
                small = thumbnail(hero(BOOK / f"{chapter.name}.ipynb")[0])
                (folder / f"thumbnail-{chapter.name}.webp").write_bytes(small)


def add_assets(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Load the first page's styles and script there alone."""
    if page == app.config.root_doc or page == "book/intro":
        app.add_css_file("front.css")
        app.add_js_file("verdicts.js", loading_method="defer")


def setup(app: Sphinx) -> None:
    """Register directives and files."""
    app.add_directive("chapter-cards", ChapterCards)
    app.add_directive("claims-picture", ClaimsPicture)
    app.connect("html-page-context", add_assets, priority=800)
    app.connect("build-finished", write_thumbnails)
