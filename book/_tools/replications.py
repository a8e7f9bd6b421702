"""Judge the claims again from other seeds and as on another processor: `make verdicts`.

The evidence notebooks run with three other base seeds (`RELUBOOK_SEED`) and without vector
instructions; nothing of them is stored but the words of their verdicts, in
book/results/replications.json, which the ledger shows. What draws a stored result is marked: it was
not computed again. Without FORCE=1 only those notebooks run that have changed since.
"""

import argparse
import ast
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import notebooks
from notebooks import failures_of, fingerprint, python_of, read_source, verdicts_of

from relubook._files import write_whole

REPLICATIONS = notebooks.RESULTS / "replications.json"
BASES = (1_000_000, 2_000_000, 3_000_000)
SETTINGS = (*map(str, BASES), "elsewhere")


def judge_again(text: Path, *, setting: str, folder: Path) -> str:
    """Run an evidence notebook in another setting, and leave its verdicts in a folder."""
    notebook, elsewhere = read_source(text), setting == "elsewhere"
    record, seed = verdicts_of(text, folder), 0 if elsewhere else int(setting)
    notebooks.execute(notebook, record=record, elsewhere=elsewhere, seed=seed, to_the_end=True)
    # A stated number may contradict the text; the verdicts count all the same.
    failures = failures_of(notebook)
    return "\n  ".join([f"{setting}: fails", *failures]) if failures else f"{setting}: judged"


def stored_claims(cells: Iterable[str]) -> list[str]:
    """Return the claims of a notebook whose evidence rests on a stored result.

    Args:
        cells: Sources. A name rests on a stored result if ``load``, or another such name, stands in
            the statement that binds it; so does a claim whose check uses such a name.
    """
    resting, found = {"load"}, []
    for source in cells:
        for statement in ast.parse(python_of(source)).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            nodes = list(ast.walk(statement))
            names = [node for node in nodes if isinstance(node, ast.Name)]
            if not resting & {node.id for node in names}:
                continue
            if isinstance(statement, ast.FunctionDef):
                resting.add(statement.name)
            else:
                resting |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
            found += [
                str(node.args[0].value)
                for node in nodes
                if isinstance(node, ast.Call)
                and ast.unparse(node.func).split(".")[-1] == "claim"
                and isinstance(node.args[0], ast.Constant)
            ]
    return found


def sources_of(text: Path) -> list[str]:
    """Return the sources of a notebook's code cells."""
    return [cell.source for cell in read_source(text).cells if cell.cell_type == "code"]


def flips(words: Mapping[str, str]) -> dict[str, str]:
    """Return the settings in which a claim got another verdict; another limit is no other one."""
    own = words.get("0", "").partition(",")[0]
    return {where: word for where, word in words.items() if word.partition(",")[0] != own}


def read() -> dict[str, Any]:
    """Return what is stored: words by claim and setting, what rests on stored results, details."""
    if not REPLICATIONS.exists():
        return {"claims": {}, "stored": [], "notebooks": {}, "details": {}}
    return json.loads(REPLICATIONS.read_text(encoding="utf-8"))


def write(kept: Mapping[str, Any]) -> None:
    """Store the replications, one line a claim."""
    order = [row["id"] for row in notebooks.ledger()]
    lines = []
    for key in ("claims", "details", "notebooks"):
        entries = kept[key]
        names = [i for i in order if i in entries] if key != "notebooks" else sorted(entries)
        body = ",\n  ".join(
            f"{json.dumps(name)}: {json.dumps(entries[name], ensure_ascii=False)}" for name in names
        )
        lines.append(f' "{key}": {{\n  {body}\n }}' if body else f' "{key}": {{}}')
    stored = [claim_id for claim_id in order if claim_id in kept["stored"]]
    lines.append(f' "stored": {json.dumps(stored)}')
    write_whole(REPLICATIONS, "{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    """Judge again and say what flipped; the exit is 1 if a flip is new or a kernel died."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as evidence/properties; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="how many to run at a time")
    parser.add_argument("--force", action="store_true", help="run what has not changed too")
    options = parser.parse_args()
    texts = {n: t for n, t in notebooks.chosen(options.names).items() if notebooks.is_evidence(n)}
    kept, again = read(), options.force or bool(options.names)
    stamps = {name: fingerprint(read_source(text)) for name, text in texts.items()}
    texts = {n: t for n, t in texts.items() if again or kept["notebooks"].get(n) != stamps[n]}
    recorded = {row["id"]: row["verdict"] for row in notebooks.ledger()}
    known = {claim_id: flips(words) for claim_id, words in kept["claims"].items()}
    chapters = {text.stem for text in texts.values()}
    judged = {row["id"] for row in notebooks.ledger() if row["chapter"] in chapters}
    for key in ("claims", "details"):
        kept[key] = {i: v for i, v in kept[key].items() if i not in judged and i in recorded}
    kept["stored"] = [i for i in kept["stored"] if i not in judged]
    kept["stored"] += [i for text in texts.values() for i in stored_claims(sources_of(text))]
    broken = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            way = {"setting": setting, "folder": Path(folder)}
            for name, said in notebooks.for_each(texts, judge_again, jobs=options.jobs, **way):
                print(f"{name}: {said}", flush=True)
                broken += [name] if said.startswith("fails") else []
                path = verdicts_of(texts[name], Path(folder))
                found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                for claim_id, record in found.items():
                    words = kept["claims"].setdefault(claim_id, {"0": recorded[claim_id]})
                    words[setting] = record["verdict"]
                    parts = [part["verdict"] for part in record.get("parts", [])]
                    how = {"condition": record["condition"], "parts": parts}
                    kept["details"].setdefault(claim_id, {})[setting] = how
                write(kept)
    kept["notebooks"] |= {name: stamps[name] for name in texts if name not in broken}
    write(kept)
    fresh = []
    for claim_id, words in kept["claims"].items():
        for where, word in flips(words).items():
            print(f"{claim_id}: {words['0']}, but at {where} {word}")
            if known.get(claim_id, {}).get(where) != word:
                fresh.append(claim_id)
    missing = [i for i in judged if set(kept["claims"].get(i, {})) != {"0", *SETTINGS}]
    if missing:
        print(f"not judged in every setting: {', '.join(sorted(missing))}")
    if not texts:
        print("nothing to do: no evidence has changed")
    return 1 if fresh or broken or missing else 0


if __name__ == "__main__":
    sys.exit(main())
