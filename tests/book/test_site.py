"""The built site as its readers meet it: every page in a real browser, served from here."""

import re
import subprocess
from pathlib import Path
from urllib.parse import urlparse

import pytest
import replications
import yaml
from bs4 import BeautifulSoup
from visits import PHONE, Visit, violations

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000

# One process builds and serves the site for all of these.
pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]


PAGES = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
NOTEBOOKS = [page for page in PAGES if (ROOT / f"{page}.ipynb").exists()]
CHAPTERS = [page for page in NOTEBOOKS if "/evidence/" not in page]


@pytest.mark.parametrize("page", PAGES)
def test_page_is_complete_self_contained_and_light(browser, address, site, page):
    with Visit(browser, address, f"{page}.html") as visit:
        assert not visit.errors
        assert not visit.foreign
        visit.load_all()
        assert not visit.failed
        broken = visit.page.evaluate(
            "[...document.querySelectorAll('main img')]"
            ".filter(i => !i.naturalWidth).map(i => i.src)"
        )
        assert not broken
        untold = visit.page.evaluate(
            "[...document.querySelectorAll('main img')]"
            ".filter(i => !i.alt.trim() || /^(_images|[0-9a-f]{20,}|.*\\.(png|svg)$)/.test(i.alt))"
            ".map(i => i.src)"
        )
        assert not untold, "figures without alternative text"
        formulas = visit.page.locator("main .math").count()
        source = (ROOT / f"{page}.md").read_text(encoding="utf-8")
        assert formulas > 0 or not re.search(r"\$[^$]+\$", source)
        assert visit.page.locator("main .math mjx-container").count() >= formulas
        assert visit.page.locator("mjx-merror, [data-mjx-error]").count() == 0
    weight = {path: (site / path.strip("/")).stat().st_size for path in visit.loaded}
    own = sum(n for path, n in weight.items() if path.endswith(".html") or "/_images/" in path)
    assert own < MEGABYTE
    assert sum(n for path, n in weight.items() if "/mathjax/" not in path) < 1.5 * MEGABYTE


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_page_is_accessible_and_legible(browser, address, page, scheme):
    with Visit(browser, address, f"{page}.html", scheme=scheme) as visit:
        assert visit.page.evaluate("document.documentElement.dataset.theme") == scheme
        assert not violations(visit.page)


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_no_code_is_cut_off_on_a_laptop(browser, address, page):
    """Nobody scrolls a line of code sideways, unless it holds an address."""
    with Visit(browser, address, f"{page}.html") as visit:
        visit.page.evaluate("document.querySelectorAll('main details').forEach(d => d.open = true)")
        cut = visit.page.evaluate(
            "[...document.querySelectorAll('main div.cell pre')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1 && !/https:|git\\+/.test(e.innerText))"
            ".map(e => e.innerText)"
        )
        assert not cut, "\n---\n".join(cut)


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_a_phone(browser, address, page):
    with Visit(browser, address, f"{page}.html", viewport=PHONE) as visit:
        width = visit.page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"]
        too_wide = visit.page.evaluate(
            "[...document.querySelectorAll('main img')]"
            ".filter(i => i.getBoundingClientRect().right > innerWidth).map(i => i.src)"
        )
        assert not too_wide
        assert not violations(visit.page)


def repository() -> tuple[str, str]:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    return config["url"], config["branch"]


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_launch_buttons_lead_to_the_notebook_in_the_repository(browser, address, site, page):
    url, branch = repository()
    owner_and_name = urlparse(url).path.strip("/")
    with Visit(browser, address, f"{page}.html") as visit:
        links = visit.page.eval_on_selector_all("a", "links => links.map(a => a.href)")
    colab = [link for link in links if "colab.research.google.com" in link]
    binder = [link for link in links if "mybinder.org" in link]
    assert len(set(colab)) == 1
    assert len(set(binder)) == 1
    match = re.search(rf"/github/{re.escape(owner_and_name)}/blob/{branch}/(.+)$", colab[0])
    assert match, colab[0]
    assert match[1] == f"{page}.ipynb"
    assert match[1] in tracked()
    match = re.search(
        rf"/gh/{re.escape(owner_and_name)}/{branch}\?urlpath=lab/tree/(.+)$", binder[0]
    )
    assert match, binder[0]
    assert match[1] == f"{page}.ipynb"
    (download,) = (link for link in links if link.endswith(".ipynb") and address in link)
    assert (site / urlparse(download).path.strip("/")).is_file()


@pytest.mark.parametrize("page", CHAPTERS)
def test_evidence_stands_under_its_chapter_and_aside_of_the_way(browser, address, page):
    """The sidebar shows it below the chapter; previous and next lead from chapter to chapter."""
    evidence = page.replace("book/", "book/evidence/")
    with Visit(browser, address, f"{page}.html") as visit:
        shown = visit.page.locator(f"nav.bd-links li.current li a[href='{evidence[5:]}.html']")
        assert shown.inner_text() == "Evidence"
        turns = visit.page.locator(".prev-next-area a")
        for link in turns.evaluate_all("links => links.map(a => a.href)"):
            assert "/evidence/" not in link


def tracked() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listed.stdout.splitlines())


def test_the_ledger_shows_replications(site):
    stored = replications.read()
    text = (site / "book" / "claims.html").read_text(encoding="utf-8")
    assert text.count("Replicated in") == len(stored["claims"])
    assert text.count("Rests in part on a stored map") == len(stored["stored"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dead relu", {"book/born-dead"}),
        ("dying", {"book/how-units-die"}),
        ("0.01", {"book/leaky-family", "book/learning-rate-and-optimizer"}),
        ("leaky", {"book/leaky-family"}),
        ("死亡", {"book/how-units-die"}),
    ],
)
def test_search_finds_chapters_before_the_package(browser, address, words, expected):
    found = search(browser, address, words)
    package = [place for place, page in enumerate(found) if page.startswith("book/api")]
    chapters = [place for place, page in enumerate(found) if page in CHAPTERS]
    assert chapters
    assert not package or max(chapters) < min(package)
    assert expected <= set(found[:12])


@pytest.mark.parametrize("number", ["0.001", "0.01", "0.5"])
def test_search_for_a_number_finds_first_who_uses_it_most(browser, address, site, number):
    def uses(page):
        soup = BeautifulSoup((site / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
        return len(re.findall(rf"(?<![\d.]){number}(?!\d)", soup.select_one("article").get_text()))

    assert search(browser, address, number)[0] == max(CHAPTERS, key=uses)


def test_search_leaves_out_words_that_javascript_has_of_its_own(browser, address):
    assert search(browser, address, "dead constructors") == search(browser, address, "dead") != []


def search(browser, address, words):
    """Return the pages that the search finds, best first."""
    with Visit(browser, address, f"search.html?q={words}") as visit:
        visit.page.wait_for_selector("#search-results p.search-summary:has-text('found')")
        links = visit.page.eval_on_selector_all(
            "#search-results ul.search > li > a", "links => links.map(a => a.pathname.slice(1))"
        )
        assert not visit.errors
    return [link.removesuffix(".html") for link in links]


def test_front_address_leads_to_the_landing_page(browser, address):
    with Visit(browser, address, "index.html") as visit:
        visit.page.wait_for_url("**/book/intro.html")
        assert visit.page.locator("article h1").inner_text().startswith("The ReLU Book")


def test_no_page_names_another_host_for_a_resource(site):
    """What a browser would only load later (print style sheets, lazy images) counts too."""
    pattern = re.compile(
        r"<(?:img|script|link|iframe|source|video|audio)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)"
    )
    for page in PAGES:
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        tags = [m for m in pattern.finditer(text) if 'rel="canonical"' not in m[0]]
        assert not tags, f"{page}: {[m[1] for m in tags]}"
