"""The first page and the ledger: complete, true to what is stored, and usable by everybody."""

import io
import re
from pathlib import Path

import front_page
import ledger_page
import notebooks
import published
import pytest
from PIL import Image, ImageDraw
from sphinx.errors import ExtensionError
from statsmodels.stats.proportion import proportion_confint
from visits import Visit, violations

from relubook.evidence.claims import ledger

ROOT = Path(__file__).resolve().parents[2]
FIRST, LEDGER = "book/intro.html", "book/claims.html"
NARROW = {"width": 320, "height": 700}
LAPTOP = {"width": 1280, "height": 800}
ROWS = ledger()

site_test = pytest.mark.xdist_group("site")


def visible(visit):
    return visit.page.locator(".claim-row:visible").evaluate_all(
        "rows => rows.map(row => row.id.replace('claim-', ''))"
    )


# ---- what the pages are made from ------------------------------------------------------------


def test_every_chapter_has_a_card():
    named = [c.name for chapters in front_page.contents().values() for c in chapters]
    assert sorted(named) == sorted(n for n in notebooks.texts() if not notebooks.is_evidence(n))


def test_a_thumbnail_is_small_and_has_no_headline():
    drawn = Image.new("RGB", (1144, 726), "white")
    pen = ImageDraw.Draw(drawn)
    for box in ((10, 13, 700, 41), (10, 59, 500, 96)):  # two lines of a headline
        pen.rectangle(box, fill="red")
    pen.rectangle((40, 117, 1100, 700), fill="blue")
    written = io.BytesIO()
    drawn.save(written, "PNG")
    small = front_page.thumbnail(written.getvalue())
    picture = Image.open(io.BytesIO(small)).convert("RGB")
    assert picture.size == front_page.SIZE
    colors = {color for _, color in picture.getcolors(1 << 20)}
    assert any(b > 200 > 100 > r for r, _, b in colors)
    assert not any(r > 200 and b < 100 for r, _, b in colors)


def test_the_thumbnails_of_all_chapters_are_light():
    sizes = [
        len(front_page.thumbnail(front_page.hero(ROOT / "book" / f"{c.name}.ipynb")[0]))
        for chapters in front_page.contents().values()
        for c in chapters
    ]
    assert max(sizes) < 20_000
    assert sum(sizes) < 12_000 * len(sizes)


def test_the_guide_is_that_of_the_bake_off():
    figure = (ROOT / "book" / "bake-off.md").read_text(encoding="utf-8")
    page = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    heads = re.findall(r'^        "\d  (.+)",$', figure, re.MULTILINE)
    assert len(heads) == 5
    assert re.findall(r"^\d\. \*\*(.+)\*\*", page, re.MULTILINE) == heads


def test_the_door_states_the_time_of_its_chapter():
    page = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    time = front_page.chapter_of(ROOT / "book" / "how-units-die.md").time
    assert f"{time}, longer with its knobs" in page


def test_a_surprise_names_the_present_verdict():
    line = "a, true, but: Said. | Found."
    assert ledger_page.surprise(line, {"a": "true, but"}) == ("a", "true, but", "Said.", "Found.")
    for verdicts in ({"a": "false"}, {"a": "true"}, {}):
        with pytest.raises(ExtensionError, match="verdict"):
            ledger_page.surprise(line, verdicts)


@pytest.mark.parametrize(("hits", "n"), [(0, 40), (42, 200), (23121, 40_000), (200, 200)])
def test_the_interval_of_a_share_is_wilsons(hits, n):
    theirs = proportion_confint(hits, n, alpha=0.05, method="wilson")
    assert published.wilson(hits, n) == pytest.approx(theirs, abs=1e-12)


def test_published_results_stand_beside_what_is_stored():
    found = {row["what"]: published.ours(row) for row in published.results()}
    assert found["Born dead at depth 10, width 3"] == ("57.8% of 40,000", "57.3 to 58.3%")
    assert found["SELU's λ"][0] == "1.0507009873554804934193349852946"
    for row in published.results():
        assert row["agrees"] in published.AGREES
        assert row["source"][1].startswith("https://")


# ---- the built pages -------------------------------------------------------------------------


@pytest.mark.site
@pytest.mark.slow
@site_test
class TestFirstPage:
    def test_two_screens_before_the_chapters(self, browser, address):
        with Visit(browser, address, FIRST, viewport=LAPTOP) as visit:
            top = visit.page.locator("#the-chapters").bounding_box()["y"]
        assert top <= 2 * LAPTOP["height"]

    def test_each_card_has_figure_link_line_and_time(self, browser, address):
        with Visit(browser, address, FIRST) as visit:
            cards = visit.page.locator(".card-of").evaluate_all(
                """cards => cards.map(card => {
                    const image = card.querySelector('img');
                    return [card.querySelector('a').getAttribute('href'), image.loading,
                        image.getAttribute('width') > 0 && image.getAttribute('height') > 0,
                        card.querySelector('.card-words').innerText];
                })"""
            )
        chapters = [c for part in front_page.contents().values() for c in part]
        assert [card[0] for card in cards] == [f"{c.name}.html" for c in chapters]
        for (_, loading, sized, words), chapter in zip(cards, chapters, strict=True):
            assert loading == "lazy"
            assert sized
            assert chapter.title in words
            assert words.strip().endswith(chapter.time)
            assert len(words.split()) < 60

    def test_every_claim_is_a_square_that_leads_to_its_row(self, browser, address, site):
        with Visit(browser, address, FIRST) as visit:
            squares = visit.page.locator(".vp-squares a").evaluate_all(
                "squares => squares.map(s => [s.getAttribute('href'), s.getAttribute('aria-label'),"
                " s.innerText])"
            )
        text = (site / LEDGER).read_text(encoding="utf-8")
        labels = {f"claims.html#claim-{r['id']}": r for r in ROWS}
        assert sorted(href for href, _, _ in squares) == sorted(labels)
        for href, label, mark in squares:
            row = labels[href]
            assert label == f"{row['verdict'].capitalize()}: {row['statement']}"
            assert mark == ledger_page.MARKS[row["verdict"]]
            assert text.count(f'id="claim-{row["id"]}"') == 1

    def test_arrows_move_among_the_squares(self, browser, address):
        with Visit(browser, address, FIRST) as visit:
            squares = visit.page.locator(".vp-squares").first.locator("a")
            squares.first.focus()
            visit.page.keyboard.press("ArrowRight")
            visit.page.keyboard.press("ArrowDown")
            visit.page.keyboard.press("ArrowUp")
            focused = visit.page.evaluate("document.activeElement.getAttribute('href')")
            assert focused == squares.nth(1).get_attribute("href")
            visit.page.keyboard.press("Tab")
            other = visit.page.evaluate(
                "[...document.querySelectorAll('.vp-squares')].indexOf("
                "document.activeElement.closest('.vp-squares'))"
            )
            assert other == 1, "one stop of the Tab key for all squares"

    def test_a_part_of_the_bar_leads_to_those_claims(self, browser, address):
        with Visit(browser, address, FIRST) as visit:
            visit.page.locator(".vp-bar a.ev-false").click()
            visit.page.wait_for_url("**/claims.html?verdict=false**")
            visit.page.wait_for_selector(".claim-filters:visible")
            assert visible(visit) == [
                row["id"]
                for chapter in ledger_page.in_order_of_the_book(r["chapter"] for r in ROWS)
                for row in ROWS
                if row["chapter"] == chapter and row["verdict"] == "false"
            ]

    def test_symptoms_are_folded_and_there(self, browser, address):
        with Visit(browser, address, FIRST, java_script_enabled=False) as visit:
            folds = visit.page.locator("details.symptoms")
            assert folds.count() >= 4
            assert visit.page.locator("details.symptoms[open]").count() == 0
            assert visit.page.locator("details.symptoms tbody tr").count() >= 25


@pytest.mark.site
@pytest.mark.slow
@site_test
class TestLedger:
    def test_complete_without_a_script(self, browser, address):
        with Visit(browser, address, LEDGER, java_script_enabled=False) as visit:
            assert sorted(visible(visit)) == sorted(row["id"] for row in ROWS)
            assert not visit.page.locator(".claim-filters").is_visible()

    def test_filters_and_their_count(self, browser, address):
        with Visit(browser, address, LEDGER) as visit:
            visit.page.get_by_role("combobox", name="Verdict").select_option("v-true-but")
            visit.page.get_by_role("combobox", name="Whose").select_option("n-N2")
            wanted = {r["id"] for r in ROWS if r["verdict"] == "true, but" and "N2" in r["notes"]}
            assert set(visible(visit)) == wanted
            status = visit.page.locator(".claim-filters [role=status]")
            assert status.inner_text() == f"{len(wanted)} of {len(ROWS)} claims"
            assert "verdict=true-but&whose=N2" in visit.page.url
            visit.page.get_by_role("combobox", name="Chapter").select_option("c-selu")
            some = {r["id"] for r in ROWS if r["chapter"] == "selu"} & wanted
            assert set(visible(visit)) == some
            visit.page.get_by_role("button", name="Show all").click()
            visit.page.wait_for_function(
                f"document.querySelectorAll('.claim-row:not([hidden])').length == {len(ROWS)}"
            )

    def test_an_anchor_opens_its_row_even_past_a_filter(self, browser, address):
        with Visit(browser, address, f"{LEDGER}?verdict=false#claim-one-sided") as visit:
            row = visit.page.locator("#claim-one-sided")
            row.wait_for(state="visible")
            assert row.locator("details").get_attribute("open") is not None
            visit.page.evaluate("location.hash = '#claim-irreversible'")
            visit.page.wait_for_selector("#claim-irreversible details[open]")

    def test_each_cell_that_a_row_or_a_result_names_exists(self, site):
        text = (site / LEDGER).read_text(encoding="utf-8")
        links = set(re.findall(r'href="((?:evidence/)?[\w-]+\.html)#([^"]+)"', text))
        assert len(links) > len([row for row in ROWS if row["verdict"] != "untested"])
        for page, anchor in links:
            assert f'id="{anchor}"' in (site / "book" / page).read_text(encoding="utf-8"), (
                page,
                anchor,
            )

    def test_no_verdict_is_lost_on_a_narrow_phone(self, browser, address):
        with Visit(browser, address, LEDGER, viewport=NARROW) as visit:
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
            boxes = visit.page.locator(".claim-row .ev-badge").evaluate_all(
                "badges => badges.map(b => b.getBoundingClientRect()).map(b => [b.left, b.right])"
            )
            assert len(boxes) == len(ROWS)
            assert all(0 <= left < right <= NARROW["width"] for left, right in boxes)
            told = visit.page.locator("table.published .agrees").count()
            assert told == len(published.results())
            assert not violations(visit.page)

    @pytest.mark.parametrize("page", [FIRST, LEDGER])
    def test_open_folds_are_accessible(self, browser, address, page):
        for scheme in ("light", "dark"):
            with Visit(browser, address, page, scheme=scheme) as visit:
                visit.page.evaluate(
                    "document.querySelectorAll('main details').forEach(d => d.open = true)"
                )
                assert not violations(visit.page)
