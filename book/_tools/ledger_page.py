"""The ledger's page: a bar, what surprised us, a row a claim, and published results beside ours.

Everything stands in the page; a script only adds filters.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import published
import reference
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from verdict_picture import MARKS, OWN, bar, counts, halves, kind

from relubook.evidence.claims import WORDS, ledger

BOOK = Path(__file__).resolve().parents[1]
REPLICATIONS = BOOK / "results" / "replications.json"
PARTS = {"holds": "\u2713", "fails": "\u2717", "open": "?"}


class LedgerDirective(SphinxDirective):
    """What the page's directives share: their files."""

    def depend(self) -> None:
        """Let the page be read again when what it shows has changed."""
        for name in ("ledger_page.py", "verdict_picture.py", "published.py"):
            self.env.note_dependency(str(Path(__file__).with_name(name)))
        self.env.note_dependency(str(REPLICATIONS))
        for name in ("claims.toml", "verdicts.json", "claims.py"):
            self.env.note_dependency(str(reference.PACKAGE / "evidence" / name))


class ClaimsSummary(LedgerDirective):
    """``{claims-summary}``: how many claims came out how, those of the notes as a bar."""

    def run(self) -> list[nodes.Node]:
        """Return the bar and a paragraph."""
        self.depend()
        notes, own = halves(ledger())
        told = ", ".join(f"{n} *{word}*" for word, n in counts(own).items())
        head = raw(f'<p class="vp-told"><strong>{len(notes)} claims of the notes</strong></p>')
        text = f"And {len(own)} of the book's own, judged alike: {told}."
        drawn = raw(f'<div class="vp">{bar(notes, "")}</div>')
        return [head, drawn, *self.parse_text_to_nodes(text)]


class Surprises(LedgerDirective):
    """``{surprises}``: in the content ``ID, VERDICT: claim | finding``, which must still be it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return a list: the claim in short, its badge, what was found, and a link to its row."""
        self.depend()
        verdicts = {row["id"]: row["verdict"] for row in ledger()}
        listed = nodes.bullet_list(classes=["surprises"])
        for line in filter(str.strip, self.content):
            id_, word, claimed, finding = surprise(line, verdicts)
            said, found = self.parse_text_to_nodes(f"{claimed}\n\n{finding}")
            found.insert(0, [badge(word), nodes.Text(" ")])
            found += nodes.Text(" ")
            found += nodes.reference(text="Its row", refuri=f"#claim-{id_}")
            listed += nodes.list_item("", said, found)
        return [listed]


class ClaimsFilters(LedgerDirective):
    """``{claims-filters}``: the choices that a script lets work; without one they stay away."""

    def run(self) -> list[nodes.Node]:
        """Return the form."""
        self.depend()
        return [raw(filters(ledger()))]


class ClaimsTable(LedgerDirective):
    """``{claims-table}``: the ledger chapter by chapter, each claim with an anchor."""

    def run(self) -> list[nodes.Node]:
        """Return a section a chapter."""
        self.depend()
        rows, again = ledger(), replications()
        lines: list[str] = []
        for chapter in in_order_of_the_book(row["chapter"] for row in rows):
            built = f"book/{chapter}" in self.env.found_docs
            head = f"[{title_of(chapter)}]({chapter}.md)" if built else title_of(chapter)
            lines += [f"### {head}", ""]
            lines += [f"PLACE-{row['id']}\n" for row in rows if row["chapter"] == chapter]
        found = self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)
        places = {f"PLACE-{row['id']}": row for row in rows}
        # Sections land in the document itself, not in what the parser returns.
        for place in list(self.state.document.findall(nodes.paragraph)):
            if row := places.get(place.astext()):
                place.replace_self(claim_row(row, again))
        return found


class Published(LedgerDirective):
    """``{published}``: what others published, beside what the book found."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        self.depend()
        for path in published.FILES:
            self.env.note_dependency(str(path))
        return [raw(published.table())]


def surprise(line: str, verdicts: Mapping[str, str]) -> tuple[str, str, str, str]:
    """Return the four parts of a line; ExtensionError unless it names a claim's present verdict."""
    words = "|".join(map(re.escape, WORDS[::-1]))  # "true, but" before "true"
    match = re.fullmatch(rf"([\w-]+), ({words}): (.+) \| (.+)", line)
    if not match or verdicts.get(match[1]) != match[2]:
        raise ExtensionError(f"{line!r} does not name a claim and its verdict in the ledger")
    return match[1], match[2], match[3], match[4]


def claim_row(claim: Mapping[str, Any], again: Mapping[str, Any]) -> nodes.Node:
    """Return one claim: badge, statement and condition, and folded the evidence."""
    word, id_ = claim["verdict"], claim["id"]
    labels = [f"n-{note}" for note in claim["notes"]] or ["n-own" * (claim["whose"] == OWN)]
    classes = ["claim-row", f"v-{kind(word)}", f"c-{claim['chapter']}", *filter(None, labels)]
    row = nodes.container(classes=classes, ids=[f"claim-{id_}"])
    said = nodes.paragraph("", "", badge(word), classes=["claim-said"])
    said += nodes.Text(f" {claim['statement']} ")
    said += nodes.inline(text=short(claim), classes=["claim-whose"])
    head = [said]
    if claim["condition"]:
        head.append(nodes.paragraph(text=claim["condition"], classes=["claim-but"]))
    if word == "untested":
        row += head
        return row
    row += [raw("<details><summary>"), *head, raw("</summary>")]
    facts = nodes.bullet_list()
    for p in claim["parts"]:
        limit = "limit: " * (p["role"] == "limit")
        facts += item(f"{PARTS[p['verdict']]} {limit}{p['sentence']}. {p['numbers']}.")
    for label, address in claim["sources"]:
        entry = item("")
        entry[0] += nodes.reference(text=label, refuri=address)
        facts += entry
    if claim["finding"]:
        facts += item(claim["finding"])
    if told := replicated(id_, word, again):
        facts += item(told)
    row += facts
    cell = escape(f"evidence/{claim['chapter']}.html#claim-{id_}")
    row += raw(
        f'<p><a class="reference internal" href="{cell}">The cell</a> \u00b7 '
        f'<a class="reference internal" href="#claim-{id_}">Link to this row</a> \u00b7 '
        f"{escape(claim['whose'])}, <code>{id_}</code></p></details>"
    )
    return row


def short(claim: Mapping[str, Any]) -> str:
    """Return whose claim it is in a word: N1, N5."""
    return ", ".join(claim["notes"]) or ("ours" if claim["whose"] == OWN else claim["whose"])


def filters(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return three choices and a count; the script that makes them work also shows them."""
    words = Counter(row["verdict"] for row in rows)
    notes = Counter(note for row in rows for note in row["notes"])
    by_chapter = Counter(row["chapter"] for row in rows)
    own = sum(row["whose"] == OWN for row in rows)
    choices = {
        "Verdict": [(f"v-{kind(w)}", f"{MARKS[w]} {w} ({words[w]})") for w in WORDS if words[w]],
        "Whose": [(f"n-{n}", f"note {n} ({notes[n]})") for n in sorted(notes)]
        + [("n-own", f"this book ({own})")],
        "Chapter": [
            (f"c-{c}", f"{title_of(c)} ({by_chapter[c]})") for c in in_order_of_the_book(by_chapter)
        ],
    }
    selects = "".join(
        f'<span><label for="filter-{name.lower()}">{name}</label> '
        f'<select id="filter-{name.lower()}" name="{name.lower()}"><option value="">all</option>'
        + "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options)
        + "</select></span>"
        for name, options in choices.items()
    )
    return (
        f'<form class="claim-filters" aria-label="Filter the claims" hidden>{selects}'
        '<button type="reset">Show all</button>'
        f'<p role="status">{len(rows)} of {len(rows)} claims</p></form>'
    )


def in_order_of_the_book(chapters: Iterable[str]) -> list[str]:
    """Return chapters once each as the contents list them, those in preparation last."""
    chapters = list(dict.fromkeys(chapters))
    contents = (BOOK.parent / "_toc.yml").read_text(encoding="utf-8")
    listed = re.findall(r"file: book/([\w-]+)$", contents, flags=re.MULTILINE)
    return sorted(chapters, key=[*listed, *chapters].index)


def title_of(chapter: str) -> str:
    """Return the title of a chapter's text; of one that is not written yet, say so."""
    path = BOOK / f"{chapter}.md"
    if not path.exists():
        return f"{chapter.replace('-', ' ').capitalize()} (in preparation)"
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("# ")).removeprefix("# ")


def badge(word: str) -> nodes.Node:
    """Return a verdict as a mark and a word on its color."""
    text = f"{MARKS[word]} {word.capitalize()}"
    return nodes.inline(text=text, classes=["ev-badge", f"ev-{kind(word)}"])


def raw(html: str) -> nodes.Node:
    """Return HTML as it is."""
    return nodes.raw("", html, format="html")


def item(text: str) -> nodes.list_item:
    """Return one line of a list."""
    return nodes.list_item("", nodes.paragraph(text=text))


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


def add_assets(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Load the ledger's styles and script there alone."""
    if page == "book/claims":
        app.add_css_file("ledger.css")
        app.add_js_file("ledger.js", loading_method="defer")


def setup(app: Sphinx) -> None:
    """Register directives and files."""
    app.add_directive("claims-summary", ClaimsSummary)
    app.add_directive("surprises", Surprises)
    app.add_directive("claims-filters", ClaimsFilters)
    app.add_directive("claims-table", ClaimsTable)
    app.add_directive("published", Published)
    app.connect("html-page-context", add_assets, priority=800)
