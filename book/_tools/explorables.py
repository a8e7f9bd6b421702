"""Figures that move without a kernel: where pages show them, and what they show without a script.

A plain page places one by the directive ``{explorable} NAME``, a chapter, which is also a notebook,
by the comment ``<!-- explorable: NAME -->`` in front of a paragraph. The content, or the paragraph,
is the sentence that stands beside the picture, and instead of it in Colab. A script in
``_static/explorables`` draws the figure; it loads on the pages that show it, and nowhere else.
"""

import html
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import on_off
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

BOOK = Path(__file__).resolve().parents[1]
SCRIPTS = BOOK / "_static" / "explorables"
TITLES = {
    "kill-a-unit": "Kill a unit",
    "born-dead": "Born dead",
    "bend-a-line": "Bend a line",
    "take-the-largest": "Take the largest",
    "the-map": "The map: dead units by learning rate",
    "who-dies": "Who dies, who learns?",
    "on-off": "On/off: which unit is silent on which image",
}
RESULTS = {"born-dead": "born-dead", "the-map": "rate-map", "who-dies": "who-dies"}
"""The stored result that a figure draws."""


def stored(name: str) -> dict[str, Any]:
    """Return a stored result as JSON has it."""
    return json.loads((BOOK / "results" / f"{name}.json").read_text(encoding="utf-8"))


def born_dead() -> dict[str, Any]:
    """Return how many of the stored networks are born dead, by width and depth."""
    result = stored("born-dead")
    seeds = result["seeds"]["last"] - result["seeds"]["first"] + 1
    dead = {
        cell["at"]["width"]: {
            key.removeprefix("both "): sum(counts)
            for key, counts in cell["measured"].items()
            if key.startswith("both ")
        }
        for cell in result["cells"]
    }
    return {"networks": 1000 * seeds, "dead": dead}


def the_map() -> dict[str, Any]:
    """Return dead units and right answers of every stored network, as whole numbers.

    By optimizer and data: for each rate a list of the networks' counts, None where one overflowed.
    """
    result, units, images = stored("rate-map"), 32, 359
    cells: dict[str, Any] = {}

    def counts(values: list[float], of: int) -> list[int | None]:
        return [None if math.isnan(value) else round(value * of) for value in values]

    for cell in result["cells"]:
        at, measured = cell["at"], cell["measured"]
        kept = cells.setdefault(at["optimizer"], {}).setdefault(at["data"], {})
        for name, of in (("layer1", units), ("layer2", units), ("accuracy", images)):
            kept.setdefault(name, []).append(counts(measured[name], of))
    rates, networks = result["grid"]["rate"], len(cells["SGD"]["centered"]["accuracy"][0])
    sizes = {"units": units, "images": images, "networks": networks}
    return {"rates": rates, **sizes, "cells": cells}


def who_dies() -> dict[str, Any]:
    """Return fate and accuracy of the map's networks on digits under SGD.

    By images and depth: the rates, and for each treatment and rate a run of two characters a
    network, thousandths in base 36, "--" where one overflowed.
    """
    methods = {
        "nothing": "nothing",
        "mean": "mean only",
        "rms": "rms only",
        "both": "both",
        "clipping": "clipping",
    }
    images = {"come": "as they come", "centered": "centered"}
    cells: dict[str, Any] = {}

    def packed(shares: list[float]) -> str:
        return "".join("--" if math.isnan(v) else on_off.base36(round(1000 * v)) for v in shares)

    for cell in stored("who-dies")["cells"]:
        data, way, depth, optimizer, method, rate = cell["at"]["point"].split()
        if (data, optimizer) != ("digits", "SGD") or method not in methods:
            continue
        empty = {name: {"dead": [], "accuracy": []} for name in methods}
        setting = cells.setdefault(f"{images[way]} {depth}", {"rates": [], "found": empty})
        if method == "nothing":
            setting["rates"].append(float(rate))
        for name, shares in cell["measured"].items():
            setting["found"][method][name].append(packed(shares))
    sizes = {"networks": 30, "depths": ["3", "8", "20"], "images": list(images.values())}
    return {**sizes, "methods": methods, "cells": cells}


def silent_units() -> dict[str, Any]:
    """Return what `make stills` stored of one network."""
    return json.loads(on_off.DATA.read_text(encoding="utf-8"))


DATA: dict[str, Callable[[], dict[str, Any]]] = {
    "born-dead": born_dead,
    "the-map": the_map,
    "who-dies": who_dies,
    "on-off": silent_units,
}
"""What a figure draws of its stored result."""


def data(name: str) -> str:
    """Return the numbers that a figure needs, as JSON that is safe inside a script tag.

    They travel in the page, for a page opened as a file may not fetch another.
    """
    text = json.dumps(DATA[name]() if name in DATA else {}, separators=(",", ":"))
    return text.replace("</", "<\\/")


class explorable(nodes.General, nodes.Element):  # noqa: N801 -- docutils names nodes so
    """A figure; its children are the sentence that stands for it everywhere else."""


def figure(env: Any, name: str, *, compact: bool = False) -> explorable:
    """Return a figure's node, still without its sentence; ExtensionError for an unknown name."""
    if name not in TITLES:
        raise ExtensionError(f"{env.docname}: no explorable {name!r}, only {', '.join(TITLES)}")
    still = SCRIPTS / f"{name}.html"
    for path in (Path(__file__), still):
        env.note_dependency(str(path))
    if name in RESULTS:
        env.note_dependency(str(BOOK / "results" / f"{RESULTS[name]}.json"))
    if name == "on-off":
        env.note_dependency(str(on_off.DATA))
    return explorable(name=name, compact=compact, still=still.read_text(encoding="utf-8"))


class Explorable(SphinxDirective):
    """``{explorable} NAME``; ``:compact:`` folds the finer controls away on small screens."""

    required_arguments = 1
    has_content = True
    option_spec = {"compact": lambda _: True}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Return the figure's node."""
        self.assert_has_content()
        node = figure(self.env, self.arguments[0], compact="compact" in self.options)
        self.state.nested_parse(self.content, self.content_offset, node)
        return [node]


class Comments(SphinxTransform):
    """``<!-- explorable: NAME -->`` and the paragraph behind it, in a notebook's Markdown."""

    default_priority = 400
    form = re.compile(r"\s*<!--\s*explorable:\s*([\w-]+)\s*-->\s*")
    elsewhere = " (On the book's page.)"  # what a notebook adds, which cannot show the figure

    def apply(self, **_: Any) -> None:
        """Replace each comment by its figure and move the paragraph into it."""
        for comment in list(self.document.findall(nodes.raw)):
            match = self.form.fullmatch(comment.astext())
            if match is None:
                continue
            node = figure(self.env, match[1])
            after = comment.next_node(descend=False, siblings=True)
            if not isinstance(after, nodes.paragraph):
                raise ExtensionError(f"{self.env.docname}: {match[1]} needs a sentence after it")
            after.parent.remove(after)
            for text in list(after.findall(nodes.Text)):
                text.parent.replace(text, nodes.Text(text.removesuffix(self.elsewhere)))
            node += after
            comment.replace_self(node)


def visit(self: Any, node: explorable) -> None:
    """Open the figure: the still, the data, and then the sentence."""
    name, compact = node["name"], " data-compact" if node["compact"] else ""
    title, numbers = html.escape(TITLES[name]), data(name)
    self.body.append(
        f'<figure class="rb-explorable" id="explorable-{name}" data-explorable="{name}"{compact} '
        f'aria-label="{title}"><div class="rb-stage">{node["still"]}</div>'
        f'<script type="application/json">{numbers}</script><figcaption>'
    )


def depart(self: Any, node: explorable) -> None:
    """Close the figure."""
    self.body.append(
        "<noscript><p><em>A still: with JavaScript this figure has controls.</em></p></noscript>"
        "</figcaption></figure>\n"
    )


def sentence(self: Any, node: nodes.Node) -> None:
    """Let only a figure's sentence speak."""


def add_assets(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Load a figure's script and style where it is shown."""
    shown = [] if doctree is None else doctree.findall(explorable)
    if names := dict.fromkeys(node["name"] for node in shown):
        app.add_css_file("explorables.css")
        for name in ("core", *names):
            app.add_js_file(f"explorables/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> None:
    """Register nodes, directive and transform."""
    other = (sentence, sentence)
    kinds = dict.fromkeys(("latex", "text", "man", "texinfo"), other)
    app.add_node(explorable, html=(visit, depart), **kinds)
    app.add_directive("explorable", Explorable)
    app.add_transform(Comments)
    app.connect("html-page-context", add_assets, priority=800)


def still(browser: Any, name: str) -> str:
    """Return the markup of the picture that a script draws first, without its controls."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    page.set_content(
        f'<figure data-explorable="{name}"><div class="rb-stage"></div>'
        f'<script type="application/json">{data(name)}</script></figure>'
    )
    for script in ("core", name):
        page.add_script_tag(path=str(SCRIPTS / f"{script}.js"))
    markup = page.locator(".rb-panels").evaluate(
        """panels => {
            for (const node of panels.querySelectorAll('[tabindex], [role=slider]'))
              for (const name of [...node.getAttributeNames()])
                if (/^(aria-|tabindex|role)/.test(name)) node.removeAttribute(name);
            return panels.outerHTML;
        }"""
    )
    context.close()
    return f'<div class="rb-still">{markup}</div>\n'


def main() -> None:
    """Draw the stills anew: `make stills`."""
    import shutil

    from playwright.sync_api import sync_playwright

    on_off.write()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for name in TITLES:
            path = SCRIPTS / f"{name}.html"
            path.write_text(still(browser, name), encoding="utf-8", newline="\n")
            print(path.name)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
