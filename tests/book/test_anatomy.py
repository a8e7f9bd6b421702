"""The form of a chapter, which teaches, and of the evidence beside it, which proves.

A chapter asks, lets guess, shows and answers, within limits that a reader feels. Evidence says how
a claim is tested before it runs.
"""

import ast
import json
import re
from collections import Counter

import nbformat
import notebooks
import pytest
from myst_parser.mdit_to_docutils.base import default_slugify

from relubook.evidence.claims import WORDS, ledger

TEXTS = notebooks.texts()
WORDS_OF_A_CHAPTER = 1500
WORDS_OF_AN_ANSWER = 60
VISIBLE_CELLS = 24
VISIBLE_LINES = 12
# A page of 1280 pixels shows 81 columns, beside both of its margins.
COLUMNS, FOLDED_COLUMNS = 76, 80
SECTIONS = range(4, 8)
# Seconds of processor time; a slower or busier machine than that of the authors gets half as much
# again before a test fails.
CHAPTER_SECONDS, EVIDENCE_SECONDS, NOISE = 25, 60, 1.5
LAST = ("Tomorrow", "What the notes say", "Exercises", "Further reading")
FOLDED = {"hide-cell", "hide-input"}

pytestmark = pytest.mark.notebooks


def each(*kinds):
    names = [name for name in TEXTS if notebooks.is_evidence(name) in kinds]
    return pytest.mark.parametrize("text", [TEXTS[name] for name in names], ids=names)


each_chapter, each_evidence, each_notebook = each(False), each(True), each(False, True)


def cells(text):
    return notebooks.read_source(text).cells


def tags(cell):
    return set(cell.metadata.get("tags", []))


def code_cells(text):
    return [cell for cell in cells(text) if cell.cell_type == "code"]


def is_visible(cell):
    return cell.cell_type == "code" and not tags(cell) & FOLDED


def visible(text):
    return [cell for cell in cells(text) if is_visible(cell)]


def prose(text):
    return "\n\n".join(cell.source for cell in cells(text) if cell.cell_type == "markdown")


def sections(text):
    """Return the cells of each section by its heading, the opening as ""."""
    found, here = {"": []}, ""
    for cell in cells(text):
        if cell.cell_type == "code":
            found[here].append(cell)
            continue
        for piece in re.split(r"^(?=## )", cell.source, flags=re.M):
            if piece.startswith("## "):
                here = piece[3:].split("\n")[0].strip()
                assert here not in found, f"two sections are called {here!r}"
                found[here] = []
            found[here].append(nbformat.v4.new_markdown_cell(piece))
    return found


def written(some_cells):
    return "\n\n".join(cell.source for cell in some_cells if cell.cell_type == "markdown")


def count_words(markdown):
    no_words = r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|<[^>]*>"
    return len(re.findall(r"[A-Za-z][A-Za-z'’]*", re.sub(no_words, " ", markdown, flags=re.S)))


def answers(markdown):
    return re.findall(r'<div class="answer">\n\n(.*?)\n\n</div>', markdown, re.S)


def main_sections(text):
    """Return the sections between the laboratory and the last four."""
    return {
        heading: some
        for heading, some in sections(text).items()
        if heading not in ("", "The laboratory", *LAST)
    }


# Limits that a reader feels.


@each_chapter
def test_a_chapter_is_read_in_a_quarter_of_an_hour(text):
    words = len(re.sub(r"\$[^$]*\$|`[^`]*`", " x ", prose(text)).split())
    assert words <= WORDS_OF_A_CHAPTER, f"{words} words; tables and folded solutions count too"
    assert int(re.search(r"(\d+) minutes to read", text.read_text("utf-8"))[1]) <= 15


@each_chapter
def test_what_is_visible_is_little_and_short(text):
    shown = visible(text)
    assert len(shown) <= VISIBLE_CELLS, f"{len(shown)} visible code cells, knobs included"
    for cell in shown:
        assert len(cell.source.splitlines()) <= VISIBLE_LINES, cell.source


@each_notebook
def test_code_fits_the_page(text):
    for cell in code_cells(text):
        shown = is_visible(cell) and not notebooks.is_evidence(name_of(text))
        columns = COLUMNS if shown else FOLDED_COLUMNS
        lines = [line for line in cell.source.splitlines() if "https://" not in line]
        long = [line for line in lines if len(line) > columns]
        assert not long, "\n".join(long)


@each_chapter
def test_visible_code_is_the_experiment(text):
    """No assertions or plotting; imports stand in one cell, in the laboratory or before it."""
    importing = []
    for cell in visible(text):
        tree = ast.parse(notebooks.python_of(cell.source))
        kinds = [type(node) for node in ast.walk(tree)]
        assert ast.Assert not in kinds, cell.source
        assert not re.search(r"\bplt\.|matplotlib|\bshow\(", cell.source), cell.source
        if {ast.Import, ast.ImportFrom} & set(kinds):
            importing.append(cell.source)
    assert len(importing) <= 1, "\n---\n".join(importing)


@each_chapter
def test_a_figure_comes_before_the_first_visible_code(text):
    for cell in cells(text):
        if cell.cell_type == "code" and "hide-input" in tags(cell) and "show(" in cell.source:
            return
        if cell.cell_type == "markdown" and re.search(r"<(img|iframe)\b|explorable", cell.source):
            return
        assert not is_visible(cell), f"no figure before\n{cell.source}"


@each_notebook
def test_what_is_folded_says_what_it_holds(text):
    for cell in code_cells(text):
        if not tags(cell) & FOLDED:
            continue
        options = cell.metadata.get("mystnb", {})
        name = options.get("code_prompt_show", "")
        assert name, f"say on the fold what it holds (code_prompt_show):\n{cell.source}"
        assert not re.search(r"show|hide|toggle|code cell", name, re.I), name
        assert options.get("code_prompt_hide") == name, cell.source
        if not notebooks.is_evidence(name_of(text)):
            assert cell.metadata.get("cellView") == "form", cell.source
            assert cell.source.startswith("# @title "), cell.source


def name_of(text):
    return f"evidence/{text.stem}" if text.parent.name == "evidence" else text.stem


@each_notebook
def test_running_time(text):
    """Read off what the stored run printed, since processors differ."""
    limit = EVIDENCE_SECONDS if notebooks.is_evidence(name_of(text)) else CHAPTER_SECONDS
    stored = notebooks.read_notebook(text)
    last = [cell for cell in stored.cells if cell.cell_type == "code"][-1]
    assert {"hide-cell", "timing", "nbval-ignore-output"} <= tags(last)
    (seconds,) = re.findall(r"(\d+) seconds", "".join(o.get("text", "") for o in last.outputs))
    assert int(seconds) <= NOISE * limit


# The anatomy of a chapter.


@each_chapter
def test_the_opening_answers(text):
    opening = written(sections(text)[""])
    assert re.match(r"# [^\n]+\n\n\*[^*\n][^\n]*\*(\n|$)", opening), "title, then the question"
    (answer,) = answers(opening)
    assert answer.startswith("**The short answer.** ")
    words = count_words(answer.removeprefix("**The short answer.** "))
    assert words <= WORDS_OF_AN_ANSWER, f"a short answer of {words} words"
    promise = r"^\*\d+ minutes? to read, (longer with its knobs; )?(about )?\d+ seconds? to run\. "
    promise += "You need: "
    assert re.search(promise, opening, re.M), "*N minutes to read, M seconds to run. You need: ...*"


@each_chapter
def test_every_main_section_answers_its_question(text):
    found = main_sections(text)
    assert len(found) in SECTIONS, list(found)
    for heading, some in found.items():
        told = [answer for answer in answers(written(some)) if answer.startswith("**Answer.** ")]
        assert told, f"{heading}: no answer"


@each_chapter
def test_knobs_can_be_turned(text):
    knobs = [cell for cell in code_cells(text) if "knob" in tags(cell)]
    assert len(knobs) >= 3
    for cell in knobs:
        assert is_visible(cell), cell.source
        assert cell.source.startswith("# @title "), cell.source
        assert re.search(r"^\w+ = .*  # @param ", cell.source, re.M), cell.source


@each_chapter
def test_the_last_sections(text):
    headings = [*sections(text)]
    assert tuple(headings[-len(LAST) :]) == LAST
    assert "running_time()" in code_cells(text)[-1].source


@each_chapter
def test_notes_are_named_where_their_claims_are(text):
    for heading, some in sections(text).items():
        named = re.findall(r"\bN[1-5]\b", written(some))
        assert not named or heading == "What the notes say", f"{heading}: {named}"


@each_chapter
def test_exercises_have_solutions(text):
    """Two for the pencil, two for the knobs, one open; solutions are folded, those in code run."""
    exercises, title = {}, None
    for cell in sections(text)["Exercises"]:
        if cell.cell_type == "code":
            exercises[title].append(cell)
            continue
        for piece in re.split(r"^(?=\*\*\d+\. )", cell.source, flags=re.M):
            if match := re.match(r"\*\*(\d+)\. (Pencil|Knob|Open)\.\*\* ", piece):
                title = (int(match[1]), match[2])
                exercises[title] = []
            if title:
                exercises[title].append(nbformat.v4.new_markdown_cell(piece))
    assert [number for number, _ in exercises] == [1, 2, 3, 4, 5]
    assert Counter(kind for _, kind in exercises) == {"Pencil": 2, "Knob": 2, "Open": 1}
    folded = '<details class="solution"><summary>'
    for (number, kind), some in exercises.items():
        solved = [cell for cell in some if cell.cell_type == "code" and "solution" in tags(cell)]
        if kind == "Pencil":
            assert f"{folded}Solution</summary>\n\n" in written(some), f"{number}: no solution"
            assert "\n\n</details>" in written(some)
        elif kind == "Knob":
            assert solved, f"{number}: no solution that runs"
            assert all("hide-cell" in tags(cell) for cell in solved)


# What the notes say, and what the ledger says of it.


def rows_of(text):
    """Return claim, word and anchor of every row of the table "What the notes say"."""
    table = re.findall(r"^\|.*\|$", written(sections(text)["What the notes say"]), re.M)
    for line in table[2:]:
        columns = [column.strip() for column in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(columns) == 3, line
        said = columns[1].replace("**", "").lower()
        found = [word for word in sorted(WORDS, key=len, reverse=True) if said.startswith(word)]
        assert found, f"no verdict comes first in: {line}"
        assert columns[1].startswith("**"), f"the verdict is bold: {line}"
        (link,) = re.findall(r"\]\(([^)]*)\)", columns[2])
        yield columns[0], found[0], link


def claims_of(text):
    """Return the claims that each section of an evidence notebook judges, in order."""
    found = {}
    for heading, some in sections(text).items():
        for cell in some:
            if cell.cell_type == "code":
                found.setdefault(heading, []).extend(judged(cell.source))
    return found


def judged(source):
    """Return the ids in ``claim(id).check(...)`` and ``claim(id).cite(...)``."""
    return [
        (ast.literal_eval(node.func.value.args[0]), node.func.attr)
        for node in ast.walk(ast.parse(notebooks.python_of(source)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("check", "cite")
        and isinstance(node.func.value, ast.Call)
        and ast.unparse(node.func.value.func).split(".")[-1] == "claim"
    ]


def evidence_of(text):
    return text.parent / "evidence" / text.name


def anchors(text):
    """Return the anchors of a page's headings with the headings, as the site makes them."""
    found = {}
    for line in re.findall(r"^#{1,3} (.+)$", without_code(text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", line).strip()
        slug, number = default_slugify(plain), 1
        while slug in found:
            slug, number = f"{slug}-{number}", number + 1
        found[slug] = plain
    return found


def without_code(text):
    return re.sub(r"^```.*?^```", "", text.read_text(encoding="utf-8"), flags=re.M | re.S)


@each_chapter
def test_verdicts_in_a_chapter_are_those_of_the_ledger(text):
    evidence = evidence_of(text)
    known, verdicts = anchors(evidence), {row["id"]: row["verdict"] for row in ledger()}
    by_heading, rows = claims_of(evidence), list(rows_of(text))
    assert rows
    for claim, word, link in rows:
        page, _, anchor = link.partition("#")
        assert page == f"evidence/{text.name}", link
        assert anchor in known, f"{claim}: the evidence has no heading #{anchor}"
        ((claim_id, _),) = by_heading[known[anchor]]
        assert word == verdicts[claim_id], f"{claim}: the ledger says {verdicts[claim_id]}"


@each_notebook
def test_links_lead_to_headings(text):
    for page, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([^)]+)\)", without_code(text)):
        there = (text.parent / page).resolve() if page else text
        assert there.exists(), page
        made = re.match(r"claim-", anchor) and there.stem == "claims"
        assert made or anchor in anchors(there), f"{page}#{anchor}"


# The anatomy of evidence.


@each_evidence
def test_evidence_leads_back_to_its_chapter(text):
    opening = written(sections(text)[""])
    assert re.match(r"# Evidence: [^\n]+\n", opening)
    assert f"](../{text.name})" in opening


@each_evidence
def test_every_claim_of_a_chapter_is_judged_once_in_its_evidence(text):
    assert_judges_all(text, ledger())


def assert_judges_all(text, rows):
    found = Counter(claim_id for some in claims_of(text).values() for claim_id, _ in some)
    wanted = {row["id"] for row in rows if row["chapter"] == text.stem}
    assert found == dict.fromkeys(wanted, 1), (
        f"missing: {wanted - set(found)}; foreign: {set(found) - wanted}; "
        f"twice: {[claim_id for claim_id, times in found.items() if times > 1]}"
    )
    for row in rows:
        if row["id"] in wanted:
            assert row["verdict"] != "untested", f"{row['id']}: run make record"


@each_evidence
def test_a_section_says_how_a_claim_is_tested_before_it_runs(text):
    own = {row["id"] for row in ledger() if not row["notes"]}
    for heading, some in sections(text).items():
        found = [way for cell in some if cell.cell_type == "code" for way in judged(cell.source)]
        if not found:
            continue
        assert heading, "a claim is judged in a section of its own"
        assert len(found) == 1, f"{heading}: one claim a section, not {found}"
        place = next(i for i, c in enumerate(some) if c.cell_type == "code" and judged(c.source))
        before = written(some[:place])
        claim_id, way = found[0]
        for needed in ("**A fair test.**", "**Before the run.**"):
            spared = way == "cite" or ("fair" in needed and claim_id in own)
            assert needed in before or spared, f"{heading}: no {needed}"


def test_every_claim_has_an_id_of_its_own():
    text = (notebooks.LEDGER.with_name("claims.toml")).read_text(encoding="utf-8")
    ids = Counter(re.findall(r'^id = "([^"]+)"', text, re.M))
    assert not [claim_id for claim_id, times in ids.items() if times > 1]
    assert len(ids) == len(ledger())


def test_only_evidence_judges():
    for name, text in TEXTS.items():
        if not notebooks.is_evidence(name):
            assert not any(claims_of(text).values()), name


def test_every_chapter_has_evidence_and_no_other_claim_has_a_verdict():
    chapters = {name for name in TEXTS if not notebooks.is_evidence(name)}
    assert {f"evidence/{name}" for name in chapters} == set(TEXTS) - chapters
    for row in ledger():
        assert (row["verdict"] != "untested") == (row["chapter"] in chapters), row["id"]


class TestGuards:
    """The limits above, seen to fail on a model chapter that keeps them."""

    LEDGER = (
        {"id": "one-sided", "chapter": "toy", "verdict": "true", "notes": ["N1"]},
        {"id": "wide-boundary", "chapter": "toy", "verdict": "true, but", "notes": ["N1"]},
        {"id": "cheap", "chapter": "another", "verdict": "untested", "notes": ["N1"]},
    )

    @pytest.fixture(autouse=True)
    def _ledger(self, monkeypatch):
        monkeypatch.setitem(globals(), "ledger", lambda: list(self.LEDGER))

    CHAPTER = (
        test_a_chapter_is_read_in_a_quarter_of_an_hour,
        test_what_is_visible_is_little_and_short,
        test_code_fits_the_page,
        test_visible_code_is_the_experiment,
        test_a_figure_comes_before_the_first_visible_code,
        test_what_is_folded_says_what_it_holds,
        test_running_time,
        test_the_opening_answers,
        test_every_main_section_answers_its_question,
        test_knobs_can_be_turned,
        test_the_last_sections,
        test_notes_are_named_where_their_claims_are,
        test_exercises_have_solutions,
        test_verdicts_in_a_chapter_are_those_of_the_ledger,
        test_links_lead_to_headings,
    )
    EVIDENCE = (
        test_code_fits_the_page,
        test_what_is_folded_says_what_it_holds,
        test_links_lead_to_headings,
        test_evidence_leads_back_to_its_chapter,
        test_every_claim_of_a_chapter_is_judged_once_in_its_evidence,
        test_a_section_says_how_a_claim_is_tested_before_it_runs,
    )

    def test_the_model_keeps_them(self, pair):
        for guard in self.CHAPTER:
            guard(pair)
        for guard in self.EVIDENCE:
            guard(evidence_of(pair))

    def breaks(self, guard, text, old, new, message):
        source = text.read_text(encoding="utf-8")
        assert old in source
        text.write_text(source.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(AssertionError, match=message):
            guard(text)

    KNOB = 'z = -1.5  # @param {type:"slider", min:-2, max:2, step:0.5}'
    LAB = "import torch\nfrom torch import relu\n"
    MORE_CELLS = "\n```{code-cell} ipython3\npass\n```\n" * 24
    ANSWER = '<div class="answer">\n\n**Answer.** No: of 100 numbers none.\n\n</div>'

    @pytest.mark.parametrize(
        ("guard", "old", "new", "message"),
        [
            (CHAPTER[0], "It is *silent*", "It is often silent " * 500, r"\d words"),
            (CHAPTER[1], "## Tomorrow", MORE_CELLS + "\n## Tomorrow", "visible code cells"),
            (CHAPTER[1], LAB, LAB + "\n# a comment\n" * 6, "import torch"),
            (CHAPTER[2], LAB, LAB + "x = 1" + " + 1" * 20 + "\n", r"x = 1 \+ 1"),
            (CHAPTER[3], LAB, LAB + "assert torch\n", "assert torch"),
            (CHAPTER[3], LAB, LAB + "import matplotlib\n", "import matplotlib"),
            (CHAPTER[3], KNOB, KNOB + "\nimport math", "import math"),
            (CHAPTER[4], "tags: [hide-input]", "tags: [hide-cell]", "no figure before"),
            (CHAPTER[5], "code_prompt_show: Setup", "code_prompt_show: Show code cell", "Show"),
            (CHAPTER[5], "# @title Figure: a ReLU", "# Figure: a ReLU", "# Figure"),
            (CHAPTER[5], "  code_prompt_show: Code of this figure\n", "", "say on the fold"),
            (CHAPTER[7], "As large as its input, where", "As large " * 40 + "where", "60|81|short"),
            (CHAPTER[7], "*How large is the output of a ReLU?*", "How large?", "the question"),
            (CHAPTER[7], "*2 minutes to read, 1", "*It takes 1", "minutes to read"),
            (CHAPTER[8], ANSWER, "No: of 100 numbers none.", "Is it ever negative.: no answer"),
            (CHAPTER[8], "## Is it ever negative?", "Is it ever negative?", "Does it ever"),
            (CHAPTER[9], KNOB, "z = -1.5", "z = -1.5"),
            (CHAPTER[10], "## Tomorrow", "## Tonight", "Tonight|Tomorrow"),
            (CHAPTER[11], "It is *silent*", "N2 says: it is *silent*", "Where is it silent"),
            (CHAPTER[12], "**2. Pencil.**", "**2. Knob.**", "Pencil|Knob"),
            (CHAPTER[12], "tags: [hide-cell, solution]", "tags: [hide-cell]", "3: no solution"),
            (CHAPTER[12], "<summary>Solution</summary>", "<summary>No</summary>", "1: no solution"),
            (CHAPTER[13], "| **true** |", "| **false** |", "the ledger says true"),
            (CHAPTER[13], "| **true, but** only", "| **true** only", "the ledger says true, but"),
            (CHAPTER[13], "| **true** |", "| yes |", "no verdict comes first"),
            (CHAPTER[13], "toy.md#how-wide", "toy.md#how-broad", "no heading #how-broad"),
            (CHAPTER[14], "toy.md#how-wide", "toy.md#how-broad", "#how-broad"),
        ],
    )
    def test_a_chapter_that_breaks_one_is_noticed(self, pair, guard, old, new, message):
        self.breaks(guard, pair, old, new, message)

    @pytest.mark.parametrize(
        ("guard", "old", "new", "message"),
        [
            (EVIDENCE[3], "](../toy.md)", "](toy.md)", "toy.md"),
            (EVIDENCE[4], 'claim("wide-boundary")', 'claim("cheap")', "foreign: {'cheap'}"),
            (EVIDENCE[4], 'claim("wide-boundary")', 'claim("one-sided")', "twice: .'one-sided'"),
            (EVIDENCE[5], "## How wide?", "### How wide?", "one claim a section"),
            (EVIDENCE[5], 'claim("one-sided").cite(', 'claim("one-sided").check(', "Before|fair"),
        ],
    )
    def test_evidence_that_breaks_one_is_noticed(self, pair, guard, old, new, message):
        text = evidence_of(pair)
        if "check(" in new:
            source = text.read_text(encoding="utf-8")
            text.write_text(source.replace("**Before the run.**", "**Then.**"), encoding="utf-8")
        self.breaks(guard, text, old, new, message)

    @pytest.mark.parametrize(("printed", "fine"), [("37", True), ("38", False)])
    def test_a_long_run_is_noticed(self, pair, printed, fine):
        path = notebooks.notebook_of(pair)
        stored = json.loads(path.read_text(encoding="utf-8"))
        last = [cell for cell in stored["cells"] if cell["cell_type"] == "code"][-1]
        last["outputs"][0]["text"] = f"{printed} seconds\n"
        path.write_text(json.dumps(stored), encoding="utf-8")
        if fine:
            test_running_time(pair)
        else:
            with pytest.raises(AssertionError):
                test_running_time(pair)

    def test_a_verdict_without_a_run_is_noticed(self, pair):
        rows = [dict(row, verdict="untested") for row in self.LEDGER]
        with pytest.raises(AssertionError, match="run make record"):
            assert_judges_all(evidence_of(pair), rows)
