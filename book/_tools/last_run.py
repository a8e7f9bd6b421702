"""The page that says when and with which versions everything was last run."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

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
    """Return for each notebook its title, its day and its versions; evidence behind its chapter."""
    rows = []
    paths = sorted(
        (text.with_suffix(".ipynb") for text in texts().values()),
        key=lambda path: (path.stem, path.parent.name == EVIDENCE),
    )
    for path in paths:
        name = path.relative_to(BOOK).with_suffix("").as_posix()
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        with_ = versions(notebook["metadata"]["relubook"]["versions"])
        day = stored_on(path) or "not known here"
        rows.append({"name": f"[{title}]({name}.ipynb)", "day": day, "with": with_})
    return rows


def results() -> list[dict[str, str]]:
    """Return for each stored result its name, its day, its cost, its versions and its machine."""
    rows = []
    for path in sorted((BOOK / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "date" not in result:
            continue
        where = result.get("machine", "")
        if not where and "+cpu" in result["versions"]["torch"]:
            where = "on processors alone (PyTorch's CPU build)"
        row = {"name": f"`{result['name']}`", "day": result["date"]}
        row |= {"minutes": f"{result['duration'] / 60:.1f}"}
        rows.append(row | {"with": ", ".join(filter(None, [versions(result["versions"]), where]))})
    return rows


def table(rows: list[dict[str, str]], heads: dict[str, str]) -> list[str]:
    """Return a Markdown table, and above it what its rows ran with."""
    ran = [row["with"] for row in rows]
    common = max(ran, key=ran.count)
    others = {
        with_: ", ".join(row["name"] for row in rows if row["with"] == with_)
        for with_ in ran
        if with_ != common
    }
    lines = [f"{'Most' if others else 'All'} ran with {common}.", ""]
    lines += [f"With {with_}: {names}." for with_, names in others.items()]
    lines += ["", "|" + "|".join(heads.values()) + "|"]
    lines += ["|" + "|".join("--:" if c == "minutes" else "---" for c in heads) + "|"]
    lines += ["|" + "|".join(row[c] for c in heads) + "|" for row in rows]
    return [*lines, ""]


class LastRun(SphinxDirective):
    """``{last-run}``: a table of the notebooks and one of the stored results."""

    def run(self) -> list[nodes.Node]:
        """Return the two sections."""
        self.env.note_reread()
        lines = ["## Notebooks", ""]
        lines += table(notebooks(), {"name": "Notebook", "day": "Outputs stored"})
        lines += ["## Stored results", ""]
        lines += ["What takes longer than a reader waits was computed once and stored.", ""]
        heads = {"name": "Result", "day": "Day", "minutes": "Minutes, one core"}
        lines += table(results(), heads)
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)
