"""Print the built site as one PDF, _build/html/relubook.pdf: `make pdf`.

Chromium prints it twice: the first print tells on which page each chapter begins, the second says
so in the contents.  Code that is folded on the site (plots, checks) is left out, and so is the
reference of the package.
"""

import html
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import urljoin, urlparse

import yaml
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Browser, sync_playwright
from pypdf import PdfReader, PdfWriter
from serving import served

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
NAME = "relubook.pdf"
STYLE = (ROOT / "book" / "_tools" / "pdf.css").read_text(encoding="utf-8")
LEFT_OUT = (
    "script, noscript, form, button, .headerlink, .prev-next-area, details.hide, .toctree-wrapper"
)
FIRST_PAGE = "book/intro"
MATHJAX = """window.MathJax = {loader: {load: ["core", "input/tex", "output/chtml"]},
  options: {processHtmlClass: "tex2jax_process|mathjax_process|math|output_area"}}"""


def slug(page: str) -> str:
    """Return the name by which the book's one document knows a page."""
    return page.removeprefix("book/").replace("/", "-")


Parts = list[tuple[str, list[tuple[str, int]]]]


def parts() -> Parts:
    """Return the parts of the book, each with its pages and their depth."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    found: Parts = [("", [(toc["root"], 0)])]
    for part in toc["parts"]:
        pages = []
        for chapter in part["chapters"]:
            pages.append((chapter["file"], 0))
            pages += [(section["file"], 1) for section in chapter.get("sections", [])]
        found.append((part["caption"], [p for p in pages if "/api" not in p[0]]))
    return found


def title_of(site: Path, page: str) -> str:
    """Return a page's title."""
    soup = BeautifulSoup((site / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    heading = soup.select_one("article.bd-article h1")
    for mark in soup.select(".headerlink"):
        mark.decompose()
    return heading.get_text().strip() if heading else page


def article(site: Path, page: str, pages: set[str], base: str) -> Tag:
    """Return a page's text, with names and links that hold in the book as one document."""
    soup = BeautifulSoup((site / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    text = soup.select_one("article.bd-article")
    assert text is not None, page
    for node in text.select(LEFT_OUT):
        node.decompose()
    own = slug(page)
    for node in text.select("[id]"):
        node["id"] = f"{own}--{node['id']}"
    for node in text.select("details"):
        if not node.find_parent(class_="claim-row"):  # a row of the ledger folds its evidence
            node["open"] = ""
    for node in text.select("[src]"):
        node["src"] = urljoin(f"/{page}.html", str(node["src"]))
        if node.name == "img":
            node["loading"] = "eager"
    for link in text.select("a[href]"):
        address = urlparse(urljoin(f"/{page}.html", str(link["href"])))
        target = address.path.strip("/").removesuffix(".html")
        if address.netloc:
            continue
        if target in pages:
            name = f"{slug(target)}--{address.fragment}" if address.fragment else slug(target)
            link["href"] = f"#{name}"
        else:
            link["href"] = urljoin(
                base, f"{address.path}#{address.fragment}".lstrip("/").rstrip("#")
            )
    for node in text.select("svg [href^='#']"):
        node["href"] = f"#{own}--{str(node['href'])[1:]}"
    section = soup.new_tag("section", id=own)
    section["class"] = "chapter"
    for link in soup.select("link[rel=stylesheet]")[1:]:  # the first is every page's
        sheet = site / page / ".." / str(link["href"]).partition("?")[0]
        style = soup.new_tag("style")
        style.string = f"#{own} {{ {sheet.resolve().read_text(encoding='utf-8')} }}"
        section.append(style)
    section.append(text)
    return section


def document(site: Path, listed: Parts, numbers: dict[str, int]) -> str:
    """Return the whole book as one page; the contents name the pages that are known."""
    pages = {page for _, chapters in listed for page, _ in chapters}
    front = BeautifulSoup((site / f"{FIRST_PAGE}.html").read_text(encoding="utf-8"), "html.parser")
    canonical = front.select_one("link[rel=canonical]")
    base = str(canonical["href"]).removesuffix(f"{FIRST_PAGE}.html") if canonical else "/"
    title = str(front.title.string) if front.title else ""
    contents, texts = [], []
    for caption, chapters in listed:
        rows = []
        for page, depth in chapters:
            text = article(site, page, pages, base)
            name = title_of(site, page)
            own = slug(page)
            rows.append(
                f'<li class="depth{depth}"><a href="#{own}">{html.escape(name)}</a>'
                f"<span>{numbers.get(own, 0)}</span></li>"
            )
            texts.append(str(text))
        contents.append(f'<p class="part">{html.escape(caption)}</p><ul>{"".join(rows)}</ul>')
    return (
        '<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8"/>'
        f"<title>{html.escape(title.split(' — ')[-1])}</title>"
        f'<link rel="stylesheet" href="/_static/site.css"/><style>{STYLE}</style>'
        f"<script>{MATHJAX}</script>"
        '<script defer src="/_static/mathjax/startup.js"></script></head><body>'
        f'<div class="cover"><img src="/_static/logo.svg" alt=""/><p>The ReLU Book</p>'
        f'<p class="small">The site has figures that move, and all code: '
        f'<a href="{base}">{base}</a></p></div>'
        f'<nav class="contents"><p class="head">Contents</p>{"".join(contents)}</nav>'
        f'<div class="bd-content"><div class="bd-article-container">{"".join(texts)}</div></div>'
        "</body></html>"
    )


def first_pages(path: Path) -> dict[str, int]:
    """Return on which page each named place of a PDF stands."""
    reader = PdfReader(path)
    numbers = {page.indirect_reference: n for n, page in enumerate(reader.pages, start=1)}
    places = reader.named_destinations.items()
    return {name.lstrip("/"): numbers[place["/Page"].indirect_reference] for name, place in places}


def make(site: Path, path: Path, listed: Parts, browser: Browser) -> None:
    """Print these pages of a built site into a file."""
    page = browser.new_page()
    page.set_default_timeout(600_000)
    with served(site) as (address, _), tempfile.TemporaryDirectory() as folder:

        def draw(to: Path, numbers: dict[str, int], **options: bool) -> None:
            whole = site / f"whole-book-{len(numbers)}.html"  # two names: browsers keep pages
            whole.write_text(document(site, listed, numbers), encoding="utf-8")
            try:
                page.goto(f"{address}/{whole.name}", wait_until="networkidle")
                page.wait_for_function("MathJax.startup?.promise")
                page.evaluate(
                    "MathJax.startup.promise.then(() => document.fonts.ready).then(String)"
                )
                page.pdf(path=to, prefer_css_page_size=True, print_background=True, **options)
            finally:
                whole.unlink()

        draft, whole = Path(folder) / "draft.pdf", Path(folder) / NAME
        draw(draft, {})
        draw(whole, first_pages(draft), tagged=True)
        writer = PdfWriter(clone_from=whole)  # Chromium's own outline says each title twice
        numbers = first_pages(whole)
        for caption, chapters in listed:
            part = None
            for name, _ in chapters:
                number = numbers[slug(name)] - 1
                if part is None and caption:
                    part = writer.add_outline_item(title=caption, page_number=number)
                writer.add_outline_item(title=title_of(site, name), page_number=number, parent=part)
        writer.write(path)
    page.close()


def main() -> None:
    """Print the book."""
    if not (SITE / f"{FIRST_PAGE}.html").is_file():
        sys.exit("there is no site to print: run make book")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        make(SITE, SITE / NAME, parts(), browser)
        browser.close()
    print(f"{len(PdfReader(SITE / NAME).pages)} pages: {SITE / NAME}")


if __name__ == "__main__":
    main()
