"""The page that says when and with which versions everything was last run."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from notebooks import EVIDENCE, texts
from sphinx.util.docutils import SphinxDirective

BOOK = Path(__file__).resolve().parents[1]


def git(*arguments: str) -> str:
    """Return what git says about the book, or nothing where it knows nothing."""
    answer = subprocess.run(
        ["git", *arguments], cwd=BOOK, capture_output=True, text=True, check=False
    )
    return "" if answer.returncode else answer.stdout.strip()


def stored_on(path: Path) -> str:
    """Return the day on which a file last changed, or nothing where the history is cut off."""
    if git("rev-parse", "--is-shallow-repository") != "false":
        return ""
    return git("log", "-1", "--format=%cs", "--", str(path))


def versions(of: Mapping[str, str]) -> str:
    """Return versions as words, without local tags such as +cpu."""
    return ", ".join(f"{name} {version.partition('+')[0]}" for name, version in of.items())


def notebooks() -> list[dict[str, str]]:
    """Return for each notebook, in the order of its name, its day and its versions."""
    rows = []
    for path in sorted(text.with_suffix(".ipynb") for text in texts().values()):
        name = path.relative_to(BOOK).with_suffix("").as_posix()
        notebook = json.loads(path.read_text(encoding="utf-8"))
        stamp = notebook["metadata"].get("relubook", {})
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        link = f"[{title}]({name}.ipynb)"
        ran = {"name": link, "day": stored_on(path), "versions": versions(stamp["versions"])}
        rows.append(ran | {"room": EVIDENCE if EVIDENCE in name else ""})
    return rows


def results() -> list[dict[str, Any]]:
    """Return what each stored result says of its computation."""
    found = []
    for path in sorted((BOOK / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "date" in result:
            found.append(result)
    return found


class LastRun(SphinxDirective):
    """``{last-run}``: a table of the notebooks and one of the stored results."""

    def run(self) -> list[nodes.Node]:
        """Return the two sections."""
        self.env.note_reread()
        ran = notebooks()
        common = max((row["versions"] for row in ran), key=[r["versions"] for r in ran].count)
        lines = ["## Notebooks", "", f"All with {common}, if nothing else is said.", ""]
        lines += ["| Notebook | Outputs stored | Other versions |", "|---|---|---|"]
        for row in ran:
            other = "" if row["versions"] == common else row["versions"]
            lines.append(f"| {row['name']} | {row['day'] or 'not known here'} | {other} |")
        lines += ["", "## Stored results", ""]
        lines += ["What takes longer than a reader waits was computed once and stored.", ""]
        lines += [
            "| Result | Computed | Minutes of one core | With | On |",
            "|---|---|--:|---|---|",
        ]
        for result in results():
            kind = "processor" if "+cpu" in result["versions"]["torch"] else "not recorded"
            lines.append(
                f"| `{result['name']}` | {result['date']} | {result['duration'] / 60:.1f} | "
                f"{versions(result['versions'])} | {result.get('machine', kind)} |"
            )
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)
