"""All claims at a glance: a bar of their verdicts, and a square a claim that leads to its row.

Marks, words and counts say what the colors say. The pictures are complete without a script.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from relubook.evidence.claims import WORDS

Row = Mapping[str, Any]
OWN = "this book"
MARKS = {
    "true": "\u2713",
    "true, but": "\u00b1",
    "false": "\u2717",
    "undecided": "?",
    "cited": "\u275d",
    "untested": "\u00b7",
}


def kind(word: str) -> str:
    """Return a verdict as the name of a class: true-but."""
    return word.replace(", ", "-")


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Return how many claims came out how, in the order of the words."""
    found = Counter(row["verdict"] for row in rows)
    return {word: found[word] for word in WORDS if found[word]}


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the claims of the notes, and the book's own, by verdict and then as in the ledger."""
    ordered = sorted(rows, key=lambda row: WORDS.index(row["verdict"]))
    own = [row for row in ordered if row["whose"] == OWN]
    return [row for row in ordered if row["whose"] != OWN], own


def bar(rows: Sequence[Row], ledger_page: str) -> str:
    """Return a bar whose parts are as wide as verdicts are many, each a link to those claims."""
    parts = "".join(
        f'<li style="flex-grow:{n}"><a class="ev-{kind(word)}" '
        f'href="{ledger_page}?verdict={kind(word)}#all-claims" '
        f'aria-label="{n} {word}: show them in the ledger">'
        f'<span aria-hidden="true">{MARKS[word]}</span> <b>{n}</b></a></li>'
        for word, n in counts(rows).items()
    )
    legend = "".join(
        f'<li><span class="vp-key ev-{kind(word)}" aria-hidden="true">{MARKS[word]}</span> '
        f"{n} {word}</li>"
        for word, n in counts(rows).items()
    )
    return (
        f'<ul class="vp-bar" aria-label="The {len(rows)} claims of the notes by verdict">{parts}'
        f'</ul><ul class="vp-legend">{legend}</ul>'
    )


def squares(rows: Sequence[Row], ledger_page: str, whose: str, told: str = "") -> str:
    """Return a square a claim, by verdict, each a link to its row in the ledger."""
    drawn = "".join(
        f'<li><a class="ev-{kind(row["verdict"])}" href="{ledger_page}#claim-{row["id"]}" '
        f'aria-label="{escape(row["verdict"].capitalize())}: {escape(row["statement"])}">'
        f'<span aria-hidden="true">{MARKS[row["verdict"]]}</span></a></li>'
        for row in rows
    )
    return (
        f'<div class="vp-part"><p class="vp-told"><strong>{len(rows)} {whose}</strong>{told}</p>'
        f'<ul class="vp-squares" aria-label="{len(rows)} {whose}, a square each">{drawn}</ul></div>'
    )


def picture(rows: Sequence[Row], ledger_page: str) -> str:
    """Return bar and squares of all claims."""
    notes, own = halves(rows)
    told = ": " + ", ".join(f"{n} {word}" for word, n in counts(own).items())
    return (
        f'<div class="vp">{bar(notes, ledger_page)}<div class="vp-waffle">'
        f"{squares(notes, ledger_page, 'claims of the notes')}"
        f"{squares(own, ledger_page, 'of our own', told)}</div></div>"
    )
