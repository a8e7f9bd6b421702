"""Published results beside ours, each as far as it was checked; ``published.toml`` lists them."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import NormalDist
from typing import Any

from relubook.evidence.claims import ledger

BOOK = Path(__file__).resolve().parents[1]
LIST = BOOK / "published.toml"
AGREES = {
    "yes": "\u2713 agrees",
    "no": "\u2717 differs",
    "open": "? not settled",
    "none": "\u2013 no test",
}
COLUMNS = ("Published", "Ours", "Interval", "How far checked")


def results() -> list[dict[str, Any]]:
    """Return the list."""
    return tomllib.loads(LIST.read_text(encoding="utf-8"))["results"]


FILES = [
    LIST,
    *(BOOK / "results" / f"{row['result']}.json" for row in results() if "result" in row),
    *(BOOK / f"{row['output']}.ipynb" for row in results() if "output" in row),
]
"""What the table is made from, beside the ledger."""


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (hits * (n - hits) / n + z * z / 4) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


def percent(*shares: float) -> str:
    """Return shares in percent, with the digits that their distance deserves."""
    digits = 0 if max(shares) - min(shares) > 0.03 else 1 if max(shares) > 0.01 else 2
    return " to ".join(f"{100 * share:.{digits}f}" for share in shares)


def stored_share(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the share of a stored result's networks and its interval."""
    path = BOOK / "results" / f"{row['result']}.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    (cell,) = (c for c in cells if all(c["at"][k] == v for k, v in row["at"].items()))
    counts = cell["measured"][row["key"]]
    hits, n = int(sum(counts)), len(counts) * row.get("each", 1)
    low, high = wilson(hits, n)
    share = percent(low, hits / n, high).split(" to ")[1]
    return f"{share}% of {n:,}", f"{percent(low, high)}%"


def printed(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a chapter's stored output says."""
    notebook = json.loads((BOOK / f"{row['output']}.ipynb").read_text(encoding="utf-8"))
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    text = "".join("".join(o.get("text", "")) for o in outputs)
    (found,) = re.findall(row["pattern"], text)
    return found, row["interval"]


def judged(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the number and the interval of a part of a claim, as its card has them."""
    (claim,) = (c for c in ledger() if c["id"] == row["claim"])
    (part,) = (p for p in claim["parts"] if p["sentence"] == row["part"])
    value, low, high = re.match(r"(.+?) \((\S+) to (\S+)\),", part["numbers"]).groups()  # type: ignore[union-attr]
    unit = "%" * value.endswith("%")
    interval = f"{low} to {high}{unit} ({part['n']:,} networks)"
    return f"{value} {row.get('reads', '')}".strip(), interval


def ours(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return what the book found, and how surely."""
    for key, find in (("result", stored_share), ("output", printed), ("claim", judged)):
        if key in row:
            return find(row)
    return row["ours"], row["interval"]


def cell_of(row: Mapping[str, Any]) -> str:
    """Return where the cell stands, seen from the ledger."""
    if "cell" in row:
        return row["cell"]
    (claim,) = (c for c in ledger() if c["id"] == row["claim"])
    return f"evidence/{claim['chapter']}.html#claim-{claim['id']}"


def table(rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Return the table; every cell names its column, for phones, where rows become cards."""
    body = ""
    for row in results() if rows is None else rows:
        label, address = row["source"]
        value, interval = ours(row)
        cells = (
            f'{escape(row["published"])} <a class="reference external" href="{escape(address)}">'
            f"{escape(label)}</a>",
            f'{escape(value)} <a class="reference internal" href="{escape(cell_of(row))}">cell</a>',
            escape(interval),
            f'<span class="agrees agrees-{row["agrees"]}">{AGREES[row["agrees"]]}</span> '
            f"{escape(row['checked'])}",
        )
        body += f'<tr><th scope="row">{escape(row["what"])}</th>' + "".join(
            f'<td data-column="{name}"><div>{cell}</div></td>'
            for name, cell in zip(COLUMNS, cells, strict=True)
        )
        body += "</tr>"
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Result", *COLUMNS))
    return f'<table class="published"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
