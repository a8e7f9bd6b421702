"""How light the built site is, and what it does not wait for."""

import base64
import io
import re
from pathlib import Path

import imagesize
import pytest
import serving
from bs4 import BeautifulSoup
from fontTools.ttLib import TTFont
from visits import PHONE, Visit

pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]

ROOT = Path(__file__).resolve().parents[2]
PAGES = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())


@pytest.fixture(scope="module")
def served(site):
    """Serve the site compressed, as hosts of sites do."""
    with serving.served(site) as (address, handler):
        yield address, handler


@pytest.mark.parametrize("page", PAGES)
def test_first_visit_is_light(browser, served, page):
    """As many bytes as come over the wire until a page with its first screen stands."""
    address, handler = served
    for viewport in (None, PHONE):
        handler.sent = 0
        with Visit(browser, address, f"{page}.html", viewport=viewport) as visit:
            assert not visit.failed
        assert 30_000 < handler.sent < (400_000 if page == "book/intro" else 700_000)


def parsed(site, page):
    return BeautifulSoup((site / f"{page}.html").read_text(encoding="utf-8"), "html.parser")


@pytest.mark.parametrize("page", PAGES)
def test_nothing_keeps_a_page_waiting(site, page):
    """One style (and one for moving figures), no long script before the text, no unused MathJax."""
    soup = parsed(site, page)
    styles = [link["href"].partition("?")[0] for link in soup.select("link[rel=stylesheet]")]
    assert styles[0].endswith("_static/site.css")
    assert len(styles) <= 3
    waits = [s["src"] for s in soup.select("script[src]") if not s.has_attr("defer")]
    assert all("documentation_options" in source for source in waits)
    assert bool(soup.select("script[src*=mathjax]")) == bool(soup.select(".math"))
    folder = (site / f"{page}.html").parent
    for place, image in enumerate(soup.select("article img")):
        if image["src"].endswith(".png"):
            size = imagesize.get(folder / image["src"])
            assert (int(image["width"]), int(image["height"])) == size
            assert place == 0 or image["loading"] == "lazy"


def test_the_style_of_all_pages_is_whole(site):
    style = (site / "_static" / "site.css").read_text(encoding="utf-8")
    for name in ("book.css", "icons.css", "basic.css", "pygments.css"):
        rule = (site / "_static" / name).read_text(encoding="utf-8").strip().splitlines()[-1]
        assert rule in style
    for address in re.findall(r"url\(['\"]?([^)'\"]+)", style):
        assert address.startswith(("data:", "%23")) or (site / "_static" / address).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_page_tells_programs_what_it_is(site, page):
    soup = parsed(site, page)
    told = soup.select_one("meta[name=description]")["content"]
    assert 40 <= len(told) <= 160
    card = {tag["property"]: tag["content"] for tag in soup.select("meta[property^='og:']")}
    assert card["og:description"] == told
    address = card["og:url"].removesuffix(f"{page}.html")
    assert soup.select_one("link[rel=canonical]")["href"] == card["og:url"]
    assert address.startswith("https://")
    assert (site / card["og:image"].removeprefix(address)).is_file()


def test_descriptions_differ(site):
    told = [parsed(site, page).select_one("meta[name=description]")["content"] for page in PAGES]
    assert len(set(told)) == len(told)


def test_icons_are_a_small_style_with_a_glyph_for_each_icon_shown(site):
    style = (site / "_static" / "icons.css").read_text()
    assert len(style) < 15_000
    assert not (site / "_static" / "vendor" / "fontawesome").exists()
    glyphs = set()
    for font in re.findall(r"base64,([\w+/=]+)", style):
        glyphs |= TTFont(io.BytesIO(base64.b64decode(font))).getBestCmap().keys()
    codes = dict(re.findall(r'\.(fa-[\w-]+):before\{content:"\\(\w+)"', style))
    assert {int(code, 16) for code in codes.values()} <= glyphs
    kinds = {"fa-solid", "fa-brands", "fa-lg"}
    for page in site.rglob("*.html"):
        for classes in re.findall(r'<i class="([^"]*)"', page.read_text(encoding="utf-8")):
            shown = set(re.findall(r"fa-[\w-]+", classes))
            assert shown - kinds <= codes.keys(), page
            assert shown & {"fa-solid", "fa-brands"} or {"fas", "fab"} & set(classes.split())
