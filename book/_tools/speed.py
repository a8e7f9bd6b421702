"""What makes a first visit light: one style sheet, scripts that wait, images that know their size.

Also what other programs read: descriptions, cards for links shared, addresses, a map of the site;
and a page for addresses that lead nowhere.
"""

import html
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlparse

import imagesize
from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx

THEME = ("basic.css", "styles/bootstrap.css", "styles/pydata-sphinx-theme.css", "icons.css")
"""The theme's own styles; what extensions and the book add to every page comes behind them."""
BUNDLE = "site.css"
UNUSED = ("togglehint", "toggleopenonprint")
IMAGE = re.compile(r"<img\b(?![^>]*\bwidth=)[^>]*?\bsrc=\"([^\"]+)\"[^>]*>")
WORDS = 155
"""Letters of a description; searchers show no more."""
MATHJAX = {"load": ["core", "input/tex", "output/chtml", "ui/lazy", "a11y/assistive-mml"]}
"""Without its menu, half of MathJax; formulas are set where a reader comes near them."""


def configure(app: Sphinx, config: Any) -> None:
    """Name the site's address after the repository's; load the parts of MathJax that are used."""
    owner, name = urlparse(config.html_theme_options["repository_url"]).path.strip("/").split("/")
    config.html_baseurl = config.html_baseurl or f"https://{owner.lower()}.github.io/{name}/"
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = (config.mathjax3_config or {}) | {"loader": MATHJAX}


def collect_styles(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Remember the styles of every page, before this page adds its own."""
    names = [str(sheet.filename) for sheet in context["css_files"]]
    context["everywhere"] = app.env.styles_everywhere = names  # type: ignore[attr-defined]


def slim(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Let one file hold the styles of every page, and let scripts wait for the page."""
    everywhere = context.pop("everywhere")
    used = [str(sheet.filename) for sheet in context["css_files"]]
    app.env.styles_everywhere = [n for n in everywhere if n in used]  # type: ignore[attr-defined]
    context["css_files"] = [s for s in context["css_files"] if str(s.filename) not in everywhere]
    scripts = []
    formulas = 'class="math' in context.get("body", "")
    for script in context["script_files"]:
        attributes = dict(script.attributes)
        name = str(script.filename or attributes.get("body")).lower()
        if any(word in name for word in UNUSED) or ("mathjax" in name and not formulas):
            continue
        # The search page's own scripts want theirs at once, the inline one the options.
        if script.filename and page != "search" and "documentation_options" not in name:
            attributes.setdefault("defer", "defer")
            script = type(script)(script.filename, priority=script.priority, **attributes)
        scripts.append(script)
    context["script_files"] = scripts
    whole = f'<a href="{app.config.html_baseurl}relubook.pdf">The whole book as one PDF</a>'
    runs = f'<a href="{context["pathto"]("book/last-run")}">when everything was last run</a>'
    context["theme_extra_footer"] = f"<p>{whole} · {runs}</p>"


def shortened(text: str) -> str:
    """Return the first sentences of a text, or its first words, that fit a description."""
    text = " ".join(text.split())
    if len(text) <= WORDS:
        return text
    ends = [m.end() for m in re.finditer(r"[.?!](?= )", text[: WORDS + 1])]
    if ends and ends[-1] > WORDS // 2:
        return text[: ends[-1]]
    return text[: text.rfind(" ", 0, WORDS)].rstrip(",;:") + " …"


def describe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Add the description, from the short answer or the first paragraph, and the card."""
    soup = BeautifulSoup(context.get("body") or "", "html.parser")
    title = BeautifulSoup(context.get("title") or "", "html.parser").get_text()
    for formula in soup.select(".math, .MathJax"):
        formula.string = re.sub(r"\\[()\[\]]", "", formula.get_text())
    question = soup.select_one("h1 + p > em:only-child")
    asked = re.findall(r"(?:And )?([^.?!]+\?)", question.get_text())[-1:] if question else []
    told = [p.get_text().removeprefix("The short answer.") for p in soup.select("div.answer p")]
    told += [p.get_text() for p in soup.select("p") if len(p.get_text()) > 40]
    told = ["".join(f"{part} " for part in (*asked, *told[:1]))]
    text = shortened(
        told[0].strip() or f"{title}: a page of {app.config.html_title}, an open book."
    )
    base = app.config.html_baseurl
    figure = soup.select_one("div.cell_output img")
    picture = figure["src"] if figure else "_static/card.png"
    picture = urljoin(base + page, str(picture)) if figure else base + str(picture)
    tags = {
        "og:title": title,
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:description": text,
        "og:url": context.get("pageurl") or base,
        "og:image": picture,
    }
    lines = [f'<meta name="description" content="{html.escape(text)}"/>']
    lines += [f'<meta property="{n}" content="{html.escape(v)}"/>' for n, v in tags.items()]
    lines += ['<meta name="twitter:card" content="summary_large_image"/>']
    context["metatags"] = (context.get("metatags") or "") + "\n" + "\n".join(lines)


def bundle(static: Path, names: list[str]) -> str:
    """Return style sheets as one; their pictures are inside or lie beside the result."""
    texts = []
    for name in names:
        text = (static / name).read_text(encoding="utf-8")
        text = re.sub(r"@charset[^;]*;|/\*# sourceMappingURL.*?\*/", "", text)
        texts.append(f"/* {name} */\n{text.strip()}\n")
    return "".join(texts)


def sized(text: str, page: Path) -> str:
    """Return a page whose images say their size; all but its first figure load when near."""
    article = text.find('<article class="bd-article"')
    figures = 0

    def tag(match: re.Match[str]) -> str:
        nonlocal figures
        path = (page.parent / match[1]).resolve()
        width, height = imagesize.get(path) if path.is_file() else (-1, -1)
        size = f' width="{round(width)}" height="{round(height)}"' if width > 0 else ""
        figures += match.start() > article
        if "logo__image" in match[0]:
            return match[0]
        late = not (match.start() > article and figures == 1)
        wait = ' loading="lazy" decoding="async"' if late else ' fetchpriority="high"'
        return match[0].replace("<img", f"<img{size}{wait}", 1)

    return IMAGE.sub(tag, text)


def site_map(base: str, pages: list[str]) -> str:
    """Return the list of pages that searchers ask for."""
    places = "".join(f"<url><loc>{base}{page}.html</loc></url>\n" for page in pages)
    schema = "http://www.sitemaps.org/schemas/sitemap/0.9"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="{schema}">\n{places}</urlset>\n'


def plain_page(title: str, text: str, more: str = "") -> str:
    """Return a page that needs nothing beside it."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{title}</title>{more}<style>:root{{color-scheme:light dark}}"
        "body{font:1.1rem/1.6 sans-serif;max-width:34rem;margin:15vh auto;padding:0 1rem}</style>"
        f"</head>\n<body><main><h1>{title}</h1>{text}</main></body></html>\n"
    )


def write_pages(app: Sphinx, out: Path) -> None:
    """Write the root page, the page for wrong addresses, and the map of the site."""
    base, first = app.config.html_baseurl, app.config.root_doc
    pages = sorted(app.env.found_docs)
    (out / "sitemap.xml").write_text(site_map(base, pages), encoding="utf-8", newline="\n")
    head = re.search(
        r'<meta name="description".*?<meta name="twitter:card"[^>]*>',
        (out / f"{first}.html").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    turn = f'{head[0] if head else ""}<link rel="canonical" href="{base}{first}.html"/>'
    turn += f'<meta http-equiv="refresh" content="0; url={first}.html"/>'
    text = f'<p><a href="{first}.html">Read the book</a></p>'
    root = plain_page(app.config.html_title, text, turn)
    (out / "index.html").write_text(root, encoding="utf-8", newline="\n")
    links = {first: "the first page", "book/glossary": "the glossary", "search": "search"}
    text = "<p>Silent on this input: there is no such page. It may have moved; try "
    text += (
        ", ".join(f'<a href="{page}.html">{words}</a>' for page, words in links.items()) + ".</p>"
    )
    lost = plain_page("No unit fires here", text, f'<base href="{base}"/>')
    (out / "404.html").write_text(lost, encoding="utf-8", newline="\n")


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Write the bundle, size the images, leave out the parts of MathJax that nothing loads."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    if names := getattr(app.env, "styles_everywhere", None):
        text = bundle(out / "_static", [*THEME, *(n.removeprefix("_static/") for n in names)])
        (out / "_static" / BUNDLE).write_text(text, encoding="utf-8", newline="\n")
    write_pages(app, out)
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if (better := sized(text, page)) != text:
            page.write_text(better, encoding="utf-8", newline="\n")
    mathjax = out / "_static" / "mathjax"
    for unused in ("sre", "input/mml", "output/svg", "adaptors"):
        shutil.rmtree(mathjax / unused, ignore_errors=True)
    for unused in mathjax.glob("*-*.js"):
        unused.unlink()


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the steps; the icons are drawn before the style that holds them."""
    app.connect("config-inited", configure)
    app.connect("html-page-context", collect_styles, priority=1)
    app.connect("html-page-context", describe, priority=600)
    app.connect("html-page-context", slim, priority=950)
    app.connect("build-finished", finish, priority=600)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
