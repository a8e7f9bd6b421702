"""Reading elsewhere: as a PDF, by a link, after a wrong address, as a notebook, much later."""

import json
import re
import subprocess
from pathlib import Path

import last_run
import pdf
import pytest
import yaml
from bs4 import BeautifulSoup
from pypdf import PdfReader
from visits import Visit

pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]

ROOT = Path(__file__).resolve().parents[2]
TWO = [("", [("book/intro", 0)]), ("Dying units", [("book/how-units-die", 0)])]


@pytest.fixture(scope="module")
def printed(browser, site, tmp_path_factory):
    """Two pages of the book, printed as `make pdf` prints all of them."""
    path = tmp_path_factory.mktemp("pdf") / "two.pdf"
    pdf.make(site, path, TWO, browser)
    return PdfReader(path)


def test_pdf_has_contents_with_the_right_page_numbers(printed):
    text = printed.pages[1].extract_text().replace("ﬁ", "fi")
    assert text.index("Contents") < text.index("Dying units") < text.index("How units die")
    for title in ("The ReLU Book", "How units die"):
        number = int(re.search(rf"{title}\s+(\d+)", text)[1])
        assert title in printed.pages[number - 1].extract_text().replace("ﬁ", "fi")[:60]
    assert number > 3
    first, part, chapters = printed.outline
    assert (first.title, part.title) == ("The ReLU Book", "Dying units")
    assert [chapter.title for chapter in chapters] == ["How units die"]
    assert printed.get_destination_page_number(chapters[0]) == number - 1


def test_pdf_has_page_numbers_code_figures_and_mathematics(printed):
    texts = [page.extract_text() for page in printed.pages]
    for number, text in enumerate(texts[1:], 2):
        assert str(number) in text.split()
    assert any("def one_step(data, rate=1.0):" in text for text in texts)
    assert sum(len(page.images) for page in printed.pages) >= 5
    assert not any(re.search(r"\\eta|\\sum|\\\(", text) for text in texts), "formulas are not set"


def test_pdf_holds_every_page_but_the_package_s():
    toc = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
    printed = [page for _, chapters in pdf.parts() for page, _ in chapters]
    assert printed == [page for page in toc if not page.startswith("book/api")]


def test_pdf_prints_the_ledger_s_rows_folded_and_in_their_own_style(site):
    ledger = pdf.article(site, "book/claims", set(), "")
    rows = ledger.select(".claim-row details")
    assert len(rows) > 100
    assert not any(row.has_attr("open") for row in rows)
    assert any(".claim-row" in style.string for style in ledger.select("style"))
    chapter = pdf.article(site, "book/how-units-die", set(), "")
    assert all(solution.has_attr("open") for solution in chapter.select("details.solution"))


def test_pdf_is_made_and_linked(site):
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    runs = [step.get("run") for step in steps["test"]["steps"]]
    assert runs.index("bash .ci/run") < runs.index("make pdf")
    page = BeautifulSoup((site / "book" / "intro.html").read_text(encoding="utf-8"), "html.parser")
    (link,) = page.select("footer a[href$='relubook.pdf'], .bd-footer-content a[href$='.pdf']")
    assert link["href"].startswith("https://")


def test_folded_text_is_printed_where_a_reader_would_miss_it(browser, address):
    """Solutions are printed, the code of figures is not, and nothing is cut off at the margin."""
    with Visit(browser, address, "book/how-units-die.html") as visit:
        visit.page.emulate_media(media="print")
        solution = visit.page.locator("details.solution").first
        assert solution.locator("p").last.is_visible()
        assert not visit.page.locator("details.hide").first.is_visible()
        assert not visit.page.locator(".bd-sidebar-primary, .bd-header-article").first.is_visible()
        assert (
            visit.page.locator("div.cell_input pre:visible")
            .first.evaluate("pre => getComputedStyle(pre).whiteSpace")
            .startswith("pre-wrap")
        )


def test_a_wrong_address_leads_somewhere(browser, site):
    text = (site / "404.html").read_text(encoding="utf-8")
    page = BeautifulSoup(text, "html.parser")
    base = page.select_one("base")["href"]
    assert base.startswith("https://")
    assert not page.select("script, link, img")
    for link in page.select("a"):
        assert (site / link["href"]).is_file()


def test_the_site_s_map_lists_every_page(site):
    places = re.findall(r"<loc>https://[^/]+/[^/]+/(.*?)</loc>", (site / "sitemap.xml").read_text())
    pages = {path.relative_to(site).as_posix() for path in (site / "book").rglob("*.html")}
    assert set(places) == pages


def test_root_page_says_what_the_book_is(site):
    page = BeautifulSoup((site / "index.html").read_text(encoding="utf-8"), "html.parser")
    assert page.select_one("meta[name=description]")["content"]
    assert page.select_one("meta[property='og:image']")["content"].endswith("card.png")
    assert (site / page.select_one("a")["href"]).is_file()


def test_download_button_gives_the_notebook(browser, address):
    with Visit(browser, address, "book/how-units-die.html", accept_downloads=True) as visit:
        visit.page.locator(".dropdown-download-buttons > button").click()
        with visit.page.expect_download() as download:
            visit.page.locator("a.btn-download-source-button").click()
        got = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    kept = json.loads((ROOT / "book" / "how-units-die.ipynb").read_text(encoding="utf-8"))
    assert [cell["source"] for cell in got["cells"]] == [cell["source"] for cell in kept["cells"]]


def test_page_of_runs_lists_every_notebook_and_result(site):
    text = (site / "book" / "last-run.html").read_text(encoding="utf-8")
    page = BeautifulSoup(text, "html.parser")
    runs, stored = ([*table.select("tbody tr")] for table in page.select("article table"))
    names = [row.select_one("a")["href"].removesuffix(".html") for row in runs]
    written = [p.relative_to(ROOT / "book") for p in (ROOT / "book").rglob("*.ipynb")]
    assert sorted(names) == sorted(path.with_suffix("").as_posix() for path in written)
    results = {p.stem for p in (ROOT / "book" / "results").glob("*.json")} - {"replications"}
    assert {row.select_one("code").get_text() for row in stored} == results
    stamp = json.loads((ROOT / "book" / "how-units-die.ipynb").read_text())["metadata"]
    assert f"torch {stamp['relubook']['versions']['torch']}" in page.get_text()


def test_days_are_those_of_the_history(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "a"], check=True)
    commit = [*git, "commit", "-q", "-m", "a", "--date=2020-02-02T00:00:00"]
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2020-02-02T00:00:00")
    subprocess.run(commit, check=True)
    monkeypatch.setattr(last_run, "BOOK", tmp_path)
    assert last_run.stored_on(tmp_path / "a") == "2020-02-02"
    clone = tmp_path / "clone"
    source = f"file://{tmp_path}"
    subprocess.run(["git", "clone", "-q", "--depth=1", source, str(clone)], check=True)
    monkeypatch.setattr(last_run, "BOOK", clone)
    assert last_run.stored_on(clone / "a") == ""
