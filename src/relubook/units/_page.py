"""A report as a page of HTML that stands alone: no script, and nothing to load."""

from html import escape

from relubook.units.report import STATES, Report

HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{0}</title><style>
:root {{ color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }}
div {{ overflow-x: auto; }} summary {{ margin-top: .8rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #888; text-align: right; }}
:is(th, td):nth-child(-n + 2) {{ text-align: left; }}
i {{ display: inline-block; height: .8rem; width: 100%; outline: 1px solid; }}
</style><main><h1>{0}</h1>
"""


def page(report: Report, title: str) -> str:
    """Return a report's table, then each site, with a bar for its dead share, to unfold."""
    lines = [HEAD.format(escape(title)), '<div tabindex="0" role="region" aria-label="Sites">']
    lines += [report._repr_html_(), "</div><h2>Units, and a bar for the share that is dead</h2>"]
    for site in report:
        bar = f"background: linear-gradient(90deg, currentcolor {site.dead_fraction:.2%}, #8883 0)"
        head = f'<summary>{escape(repr(site))}<i style="{bar}"></i></summary>'
        place = f"shape {site.shape}" + f", {site.location}" * bool(site.location)
        lines.append(f"<details>{head}<ul><li>{escape(place)}</li>")
        for k, state in enumerate(STATES):
            units = ", ".join(map(str, (site.state == k).nonzero().flatten().tolist()))
            lines += [f"<li>{state}: {units}</li>"] * bool(units and state != "mixed")
        lines.append("</ul></details>")
    return "\n".join([*lines, "</main></html>\n"])
