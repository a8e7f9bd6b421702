"""The ledger's page: how many claims stand, and a row a claim with its verdict and its evidence."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import reference
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from relubook.evidence.claims import WORDS, ledger

BOOK = Path(__file__).resolve().parents[1]
REPLICATIONS = BOOK / "results" / "replications.json"
MARKS = {"holds": "\u2713", "fails": "\u2717", "open": "?"}


class ClaimsTable(SphinxDirective):
    """``{claims-table}``: the ledger chapter by chapter, each claim with an anchor."""

    def run(self) -> list[nodes.Node]:
        """Return a section a chapter."""
        self.env.note_dependency(str(Path(__file__)))
        self.env.note_dependency(str(REPLICATIONS))
        for name in ("evidence/claims.toml", "evidence/verdicts.json", "evidence/claims.py"):
            self.env.note_dependency(str(reference.PACKAGE / name))
        rows, again = ledger(), replications()
        lines: list[str] = []
        for chapter in in_order_of_the_book(dict.fromkeys(row["chapter"] for row in rows)):
            built = f"book/{chapter}" in self.env.found_docs
            name = chapter.replace("-", " ").capitalize()
            head = f"[{title_of(chapter)}]({chapter}.md)" if built else f"{name} (in preparation)"
            lines += [f"## {head}", ""]
            lines += [f"PLACE-{row['id']}\n" for row in rows if row["chapter"] == chapter]
        found = self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)
        places = {f"PLACE-{row['id']}": row for row in rows}
        # Sections land in the document itself, not in what the parser returns.
        for place in list(self.state.document.findall(nodes.paragraph)):
            if row := places.get(place.astext()):
                place.replace_self(self.row(row, again))
        return found

    def row(self, claim: Mapping[str, Any], again: Mapping[str, Any]) -> nodes.Node:
        """Return one claim: verdict and condition, statement, and folded the evidence."""
        word, id_ = claim["verdict"], claim["id"]
        row = nodes.container(classes=["claim-row"], ids=[f"claim-{id_}"])
        head = nodes.paragraph()
        kind = word.replace(", ", "-")
        head += nodes.inline(text=word.capitalize(), classes=["ev-badge", f"ev-{kind}"])
        head += nodes.Text(f" {claim['condition']}")
        row += head
        said = nodes.paragraph(text=f"{claim['statement']} ")
        said += nodes.emphasis(text=f"({claim['whose']}; {id_})")
        row += said
        if word == "untested":
            return row
        row += raw("<details><summary>Evidence</summary>")
        facts = nodes.bullet_list()
        for p in claim["parts"]:
            limit = "limit: " * (p["role"] == "limit")
            facts += item(f"{MARKS[p['verdict']]} {limit}{p['sentence']}. {p['numbers']}.")
        for label, address in claim["sources"]:
            entry = item("")
            entry[0] += nodes.reference(text=label, refuri=address)
            facts += entry
        if claim["finding"]:
            facts += item(claim["finding"])
        if told := replicated(id_, word, again):
            facts += item(told)
        row += facts
        page = f"evidence/{claim['chapter']}.html#claim-{id_}"
        row += raw(
            f'<p><a class="reference internal" href="{escape(page)}">The cell</a></p></details>'
        )
        return row


class ClaimsSummary(SphinxDirective):
    """``{claims-summary}``: how many claims came out how."""

    def run(self) -> list[nodes.Node]:
        """Return a paragraph."""
        self.env.note_dependency(str(reference.PACKAGE / "evidence/verdicts.json"))
        return self.parse_text_to_nodes(summary(ledger()))


def in_order_of_the_book(chapters: Iterable[str]) -> list[str]:
    """Return chapters as the contents list them, those in preparation last."""
    contents = (BOOK.parent / "_toc.yml").read_text(encoding="utf-8")
    listed = re.findall(r"file: book/([\w-]+)$", contents, flags=re.MULTILINE)
    return sorted(chapters, key=[*listed, *chapters].index)


def title_of(chapter: str) -> str:
    """Return the title of a chapter's text."""
    text = (BOOK / f"{chapter}.md").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")


def raw(html: str) -> nodes.Node:
    """Return HTML as it is."""
    return nodes.raw("", html, format="html")


def item(text: str) -> nodes.list_item:
    """Return one line of a list."""
    return nodes.list_item("", nodes.paragraph(text=text))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many claims of the notes, and of the book's own, came out how."""

    def counted(some: Sequence[Mapping[str, Any]]) -> str:
        counts = Counter(row["verdict"] for row in some)
        return ", ".join(f"{counts[word]} *{word}*" for word in WORDS if counts[word])

    own = [row for row in rows if row["whose"] == "this book"]
    notes = [row for row in rows if row["whose"] != "this book"]
    lines = [f"Of {len(notes)} claims: {counted(notes)}."]
    if own:
        lines.append(f"Of {len(own)} claims of the book's own, judged alike: {counted(own)}.")
    return "\n".join(lines)


def replications() -> dict[str, Any]:
    """Return the words that other seeds and another processor gave, by claim."""
    if not REPLICATIONS.exists():
        return {"claims": {}, "stored": []}
    return json.loads(REPLICATIONS.read_text(encoding="utf-8"))


def replicated(id_: str, word: str, again: Mapping[str, Any]) -> str:
    """Return in words how a verdict came out again; empty if nobody has tried."""
    words = {name: w for name, w in again["claims"].get(id_, {}).items() if name != "0"}
    if not words:
        return ""
    same = sum(w.partition(",")[0] == word.partition(",")[0] for w in words.values())
    other = sorted({w for w in words.values() if w.partition(",")[0] != word.partition(",")[0]})
    told = f"Replicated in {same} of {len(words)} settings (three other sets of seeds, another "
    told += "processor's arithmetic)" + (f"; elsewhere: {', '.join(other)}" if other else "") + "."
    stored = " Rests in part on a stored map, which was not computed again."
    return told + stored * (id_ in again["stored"])
