"""The search: what counts as a word, and which pages come first."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

ALIKE = {"dying": "die"}
"""Words that the stemmer does not bring together; searching.js has the same."""


class Words(SearchEnglish):
    """English, in which numbers such as 0.01 are words, and so are runs of Chinese characters."""

    def split(self, input: str) -> list[str]:
        """Return the words of a text."""
        return [ALIKE.get(word.lower(), word) for word in re.findall(r"\d+\.\d+|\w+", input)]


def configure(app: Sphinx, config: Any) -> None:
    """Rank by our own scores."""
    config.html_search_scorer = str(Path(__file__).with_name("searching.js"))


def setup(app: Sphinx) -> None:
    """Register the language and the scores."""
    app.add_search_language(Words)
    app.connect("config-inited", configure)
