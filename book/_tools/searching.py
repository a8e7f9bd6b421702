"""The search: what counts as a word, and which pages come first."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.search import js_index
from sphinx.search.en import SearchEnglish

ALIKE = {"dying": "die"}
"""Words that the stemmer does not bring together; searching.js has the same."""


class Words(SearchEnglish):
    """English, in which numbers such as 0.01 are words, and so are runs of Chinese characters."""

    def split(self, input: str) -> list[str]:
        """Return the words of a text."""
        return [ALIKE.get(word.lower(), word) for word in re.findall(r"\d+\.\d+|\w+", input)]


ENGLISH = Words({})
stem = cache(ENGLISH.stem)


def count(app: Sphinx, doctree: nodes.document) -> None:
    """Keep how often a page uses each word."""
    seen = [text for text in doctree.findall(nodes.Text) if not isinstance(text.parent, nodes.raw)]
    words = (stem(word).lower() for text in seen for word in ENGLISH.split(text.astext()))
    app.env.metadata[app.env.docname]["words"] = Counter(words)


def sort_index(app: Sphinx, error: Exception | None) -> None:
    """Name those pages first that use a word most; Sphinx has a word's pages in any order."""
    path = Path(app.outdir) / "searchindex.js"
    if error or not path.exists():
        return
    before = path.read_text(encoding="utf-8")
    index = js_index.loads(before)
    counts = [app.env.metadata[name].get("words", Counter()) for name in index["docnames"]]
    for word, pages in (*index["terms"].items(), *index["titleterms"].items()):
        if isinstance(pages, list):
            pages.sort(key=lambda page: (-counts[page][word], page))
    if (text := js_index.dumps(index)) != before:
        path.write_text(text, encoding="utf-8")


def configure(app: Sphinx, config: Any) -> None:
    """Rank by our own scores."""
    config.html_search_scorer = str(Path(__file__).with_name("searching.js"))


def setup(app: Sphinx) -> None:
    """Register the language and the scores."""
    app.add_search_language(Words)
    app.connect("config-inited", configure)
    app.connect("doctree-read", count)
    app.connect("build-finished", sort_index)
