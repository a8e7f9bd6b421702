"""What a chapter's page adds to its notebook: answer first, a gray line, captions, chips."""

import re

import chapter_page
import pytest
from test_anatomy import cells
from test_site import CHAPTERS, ROOT
from visits import PHONE, Visit

from relubook.evidence.claims import ledger

pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]


def html(site, page):
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    return text[text.index("<article") : text.index("</article>")]


@pytest.mark.parametrize("page", CHAPTERS)
def test_answer_figure_and_line_come_first_and_in_this_order(site, page):
    text = html(site, page)
    marks = ('class="answer"', "<img", 'class="ch-line"', "<h2")
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert text.count("The short answer.") == 1
    line = text[places[2] : text.index("</p>", places[2])]
    assert re.search(r"\d+ minutes to read</span><span>[^<]*\d+ seconds to run</span>", line)
    assert f"/{page}.ipynb" in line
    assert "minutes to read, " not in text


@pytest.mark.parametrize("page", CHAPTERS)
def test_each_figure_has_a_caption_from_its_cell(site, page):
    titles = [
        match[1]
        for cell in cells(ROOT / f"{page}.md")
        if cell.cell_type == "code" and (match := chapter_page.FIGURE.match(cell.source))
    ]
    text = html(site, page)
    captions = re.findall(r'class="ch-caption" id="figure-(\d+)">(.*?)</p>', text, re.DOTALL)
    assert [int(number) for number, _ in captions] == list(range(1, len(titles) + 1))
    assert len(titles) >= 3


@pytest.mark.parametrize("page", CHAPTERS)
def test_chips_lead_to_the_ledger_and_its_rows_back(site, page):
    chapter, text, rows = page.removeprefix("book/"), html(site, page), html(site, "book/claims")
    judged = {claim["id"]: claim for claim in ledger() if claim["chapter"] == chapter}
    chips = re.findall(
        r'id="chip-([\w-]+)" href="claims.html#claim-([\w-]+)">.*?<b>(.*?)</b>', text
    )
    assert chips == [(id_, id_, claim["verdict"]) for id_, claim in judged.items()]
    for id_, claim in judged.items():
        assert f'id="claim-{id_}"' in rows
        if claim["verdict"] != "untested":
            assert f'href="{chapter}.html#chip-{id_}"' in rows


def test_one_press_shows_all_code_and_hides_it_again(browser, address):
    with Visit(browser, address, "book/normalization.html", viewport=PHONE) as visit:
        folds = visit.page.locator("main div.cell details.hide")
        opened = "folds => folds.filter(f => f.open).length"
        assert folds.evaluate_all(opened) == 0
        button = visit.page.get_by_role("button", name="Show all code")
        button.focus()
        visit.page.keyboard.press("Enter")
        assert folds.evaluate_all(opened) == folds.count() > 5
        visit.page.get_by_role("button", name="Fold all code").click()
        assert folds.evaluate_all(opened) == 0
        assert not visit.errors


def test_without_scripts_no_button_does_nothing(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/book/normalization.html")
    assert page.locator(".ch-line a").is_visible()
    assert not page.locator(".ch-code").is_visible()
    context.close()
