"""Measure the built site with Lighthouse, served on loopback and compressed as hosts do.

Run by `make lighthouse`, which needs Node, npm and Chromium, and a quiet machine for the marks of
speed.  Each page is measured five times as a desktop and as a phone; the table shows medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from serving import served

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
PAGES = ("book/intro", "book/claims", "book/learning-rate-and-optimizer")
FORMS = ("desktop", "mobile")
VERSION = "12.8.2"


def measure(program: list[str], url: str, form: str) -> dict[str, float]:
    """Return Lighthouse's marks of one visit, 0 to 100, and some of its numbers."""
    flags = "--headless=new --no-sandbox --disable-gpu"
    command = [*program, url, "--quiet", "--output=json", f"--chrome-flags={flags}"]
    command += ["--preset=desktop"] if form == "desktop" else []
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    answer = subprocess.run(
        command,
        env={"CHROME_PATH": chromium} | os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        sys.exit(answer.stderr)
    report = json.loads(answer.stdout)
    marks = {name: 100 * c["score"] for name, c in report["categories"].items()}
    for name in ("first-contentful-paint", "largest-contentful-paint", "total-blocking-time"):
        marks[name] = report["audits"][name]["numericValue"]
    marks["layout shift"] = report["audits"]["cumulative-layout-shift"]["numericValue"]
    marks["KB"] = report["audits"]["total-byte-weight"]["numericValue"] / 1000
    for name, category in report["categories"].items():
        if name != "performance" and category["score"] < 1:
            ids = [
                a["id"] for a in category["auditRefs"] if report["audits"][a["id"]]["score"] == 0
            ]
            print(f"  {url} {form}: {name} loses by {', '.join(ids)}")
    return marks


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--form", choices=FORMS, action="append")
    options = parser.parse_args()
    own = os.environ.get("LIGHTHOUSE")
    program = [own] if own else ["npx", "--yes", f"lighthouse@{VERSION}"]
    if shutil.which(program[0]) is None:
        sys.exit("Lighthouse needs Node and npm")
    with served(SITE) as (address, _):
        for page in options.pages:
            for form in options.form or FORMS:
                visits = [
                    measure(program, f"{address}/{page}.html", form) for _ in range(options.times)
                ]
                middle = {n: statistics.median(v[n] for v in visits) for n in visits[0]}
                numbers = ", ".join(f"{n} {v:.4g}" for n, v in middle.items())
                print(f"{page}, {form}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
