"""Other seeds give other numbers, and what the claims' verdicts come to there is kept."""

import ast
import json
import os
import subprocess
import sys

import notebooks
import pytest
import replications

from relubook.evidence.claims import WORDS, ledger

TEXTS = notebooks.texts()

pytestmark = pytest.mark.notebooks
each = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def code_of(text):
    return [notebooks.python_of(source) for source in replications.sources_of(text)]


def fixed_seeds(source):
    """Return the calls of manual_seed in a cell whose seed nothing can move."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("manual_seed")
        and not any(isinstance(inner, ast.Name) for inner in ast.walk(node.args[0]))
    ]


@each
def test_every_draw_starts_from_the_base_seed(text):
    for source in code_of(text):
        assert not fixed_seeds(source), source


def test_a_fixed_seed_is_noticed():
    fixed = "torch.Generator().manual_seed(10000000)"
    assert fixed_seeds(f"g = {fixed}\nh = torch.Generator().manual_seed(SEED + 1)") == [fixed]


# Runs cells up to their first fifty draws and prints what generators were seeded with.
FIRST_DRAWS = """
import json, sys
import matplotlib
import torch
from relubook.evidence import results

matplotlib.use("agg")
seeds, plain = [], torch.Generator


class Enough(Exception):
    pass


class Generator(plain):
    def manual_seed(self, seed):
        seeds.append(int(seed))
        if len(seeds) == 50:
            raise Enough
        return super().manual_seed(seed)


# A slice of a stored result is drawn from the seeds that it was stored with.
results.Computation.run = results.assert_agrees = lambda *_, **__: None
torch.Generator, scope = Generator, {"__name__": "__main__"}
try:
    for number, source in enumerate(json.load(sys.stdin)):
        exec(compile(source, f"<cell {number}>", "exec"), scope)
except Enough:
    pass
print(json.dumps(seeds), file=sys.__stdout__)
"""


def first_draws(sources, base, folder):
    variables = os.environ | {"RELUBOOK_SEED": base, "RELUBOOK_LEDGER": "record"}
    variables |= {"RELUBOOK_VERDICTS": str(folder / "verdicts.json"), "RELUBOOK_PROGRESS": "0"}
    run = subprocess.run(
        [sys.executable, "-c", FIRST_DRAWS],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        check=False,
        env=variables,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@each
def test_other_base_seeds_give_other_draws(text, tmp_path):
    draws = [first_draws(code_of(text), base, tmp_path) for base in ("0", "1000000")]
    assert draws[0]
    assert draws[0] != draws[1]


@pytest.mark.slow
def test_results_change_with_the_base_seed(pair, tmp_path):
    """The model chapter prints a number that it draws."""
    printed = []
    for seed in (0, 1_000_000, 1_000_000):
        notebook = notebooks.read_source(pair)
        notebooks.execute(notebook, seed=seed)
        drawn = next(cell for cell in notebook.cells if "SEED)" in cell.source)
        printed.append(drawn.outputs[0].text)
    assert printed[0] != printed[1] == printed[2]


def test_what_rests_on_a_stored_result():
    """Through names, loops and functions; what is computed in the notebook does not."""
    cells = [
        "from relubook.evidence.results import load\nx = 1",
        "one, two = map(load, ('a', 'b'))\nfresh = 3",
        "for key, value in two.cells.items():\n    kept = value",
        "def share(p):\n    local = one.cells[p]\n    return local",
        "local = fresh",
        "claim('first').check(part('so', kept, at_least=1))",
        "claim('second').check(part('so', share(1), at_least=1))",
        "claim('third').check(part('so', fresh + local, at_least=1))",
        "%matplotlib inline\nclaim('fourth').check(part('so', load('c').cells, at_least=1))",
    ]
    assert replications.stored_claims(cells) == ["first", "second", "fourth"]


def test_a_flip_is_another_word_and_not_another_limit():
    words = {"0": "true, but", "1": "true", "2": "undecided", "elsewhere": "true, but"}
    assert replications.flips(words) == {"2": "undecided"}


@pytest.mark.slow
def test_verdicts_of_all_settings_are_kept(pair, tmp_path, monkeypatch, capsys):
    """The words of the model's evidence; a claim is false at every other base."""
    evidence = pair.parent / "evidence" / "toy.md"
    source = evidence.read_text(encoding="utf-8").replace(
        'claim("wide-boundary").cite(\n    ("Glorot", "https://proceedings.mlr.press/v15/'
        'glorot11a.html"),\n    finding="It is.",\n)',
        "from relubook.evidence.claims import part\n\nassert SEED != 2_000_000\n"
        'claim("wide-boundary").check(part("At base 0", holds=SEED == 0, kind="code"))',
    )
    assert "At base 0" in source
    evidence.write_text(source, encoding="utf-8")
    rows = [
        {"id": "one-sided", "chapter": "toy", "whose": "", "statement": "", "verdict": "cited"},
        {"id": "wide-boundary", "chapter": "toy", "whose": "", "statement": "", "verdict": "true"},
        {"id": "cheap", "chapter": "other", "whose": "", "statement": "", "verdict": "true"},
    ]
    kept = tmp_path / "replications.json"
    monkeypatch.setattr(notebooks, "BOOK", pair.parent)
    monkeypatch.setattr(notebooks, "ledger", lambda: rows)
    monkeypatch.setattr(replications, "REPLICATIONS", kept)
    monkeypatch.setattr(replications, "SETTINGS", ("1000000", "2000000", "elsewhere"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["replications.py", *words])
        return replications.main(), capsys.readouterr().out

    kept.write_text(
        json.dumps(
            {
                "claims": {"cheap": {"0": "true", "1": "true"}, "gone": {"0": "true"}},
                "stored": ["cheap"],
                "notebooks": {},
                "details": {},
            }
        )
    )
    status, out = run("--jobs", "2")
    assert status == 1
    assert "wide-boundary: true, but at 1000000 false" in out
    assert "2000000: fails\n  cell 4: AssertionError" in out
    assert "not judged in every setting: wide-boundary" in out
    stored = json.loads(kept.read_text())
    settings = ["0", "1000000", "2000000", "elsewhere"]
    assert stored["claims"]["one-sided"] == dict.fromkeys(settings, "cited")
    words = {"0": "true", "1000000": "false", "elsewhere": "true"}
    assert stored["claims"]["wide-boundary"] == words
    assert stored["details"]["wide-boundary"]["1000000"]["parts"] == ["fails"]
    assert stored["stored"] == ["cheap"]
    assert set(stored["claims"]) == {"one-sided", "wide-boundary", "cheap"}
    assert "nothing to do" in run()[1]
    # A flip that is known is no failure; one that is new is.
    evidence.write_text(source.replace("assert SEED != 2_000_000", "pass"), encoding="utf-8")
    monkeypatch.setattr(replications, "SETTINGS", ("1000000", "elsewhere"))
    assert run("--jobs", "2")[0] == 0


@pytest.mark.skipif(not replications.REPLICATIONS.exists(), reason="make verdicts was never run")
def test_replications_are_those_of_the_ledger():
    stored, rows = replications.read(), {row["id"]: row for row in ledger()}
    judged = {claim_id for claim_id, row in rows.items() if row["verdict"] != "untested"}
    assert set(stored["claims"]) == judged, "run make verdicts"
    for claim_id, words in stored["claims"].items():
        assert set(words) == {"0", *replications.SETTINGS}
        assert set(words.values()) <= set(WORDS)
        assert words["0"].partition(",")[0] == rows[claim_id]["verdict"].partition(",")[0]
        assert words["0"] == "undecided" or not replications.flips(words), (
            f"{claim_id} flips: judge it anew on a larger sample, fixed beforehand"
        )
    resting = [
        claim_id
        for name, text in TEXTS.items()
        if notebooks.is_evidence(name)
        for claim_id in replications.stored_claims(replications.sources_of(text))
    ]
    assert set(stored["stored"]) == set(resting)
