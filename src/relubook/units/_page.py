"""A report as a page of HTML that stands alone: no script, and nothing to load."""

from html import escape
from pathlib import Path
from string import Template
from typing import Any

HEAD = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def page(report: Any, title: str) -> str:
    """Return a report's table, then each site, with a bar for its dead share, to unfold."""
    lines = [HEAD.substitute(title=escape(title)), report._repr_html_()]
    lines.append("</div><h2>Units, and a bar for the share that is dead</h2>")
    for site in report:
        bar = f"background: linear-gradient(90deg, currentcolor {site.dead_fraction:.2%}, #8883 0)"
        head = f'<summary>{escape(repr(site))}<i style="{bar}"></i></summary>'
        place = f"shape {site.shape}" + f", {site.location}" * bool(site.location)
        lines.append(f"<details>{head}<ul><li>{escape(place)}</li>")
        for k, state in enumerate(site.counts()):
            units = ", ".join(map(str, (site.state == k).nonzero().flatten().tolist()))
            lines += [f"<li>{state}: {units}</li>"] * bool(units and state != "mixed")
        lines.append("</ul></details>")
    return "\n".join([*lines, "</main></html>\n"])
