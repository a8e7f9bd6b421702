"""The notebooks' experiments: found, computed in parallel, resumed, and never stale."""

import json
import os
import sys
from pathlib import Path

import experiments
import notebooks
import pytest
from experiments import Experiment, compute, define, is_stale

from relubook.evidence.results import assert_agrees, load

pytestmark = pytest.mark.notebooks

HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# A notebook
"""
SETUP = """%pip install --quiet nothing
import relubook as rb

SEED = rb.setup()"""
LAB = """import functools
import os

import torch

def note(*words):
    with open(os.environ["TOY_CALLS"], "a") as file:
        print(*words, file=file)

@functools.cache
def third(s):  # the laboratory; a cache must reach the workers too
    return s / 3

def scaled(a, s):
    return a + third(s)

data = torch.arange(3.0)"""
TOY = """from relubook.evidence.results import computation

VALUES = [1, 2, 3]

@computation("toy", grid={"a": VALUES, "b": ["x", "y"]}, seeds=range(4))
def toy(seeds, *, a, b):
    note(a, b, len(seeds), os.getpid(), torch.get_num_threads(), os.getcwd())
    if os.environ.get("TOY_STOP") == f"{a}{b}":
        raise KeyboardInterrupt
    return {"value": [scaled(a, s) + data[0] for s in seeds], "big": [a > 1] * len(seeds)}"""


def cell(source, *tags):
    return f"\n```{{code-cell}} ipython3\n:tags: [{', '.join(tags)}]\n\n{source}\n```\n"


def notebook(setup=SETUP, lab=LAB, toy=TOY):
    other = cell("raise AssertionError('this cell is no part of the laboratory')")
    return HEAD + cell(setup, "setup") + other + cell(lab, "lab") + other + cell(toy, "experiment")


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one evidence notebook; ``run(*words)`` is the command line."""
    folder = tmp_path / "book"
    (folder / "evidence").mkdir(parents=True)
    monkeypatch.setattr(notebooks, "BOOK", folder)
    monkeypatch.setenv("RELUBOOK_JOBS", "1")
    monkeypatch.setenv("TOY_CALLS", str(tmp_path / "calls"))

    class Book:
        results = folder / "results"
        text = folder / "evidence" / "toy.md"

        def run(self, *words):
            command = ["experiments.py", "--folder", str(self.results), *words]
            monkeypatch.setattr(sys, "argv", command)
            return experiments.main()

        def calls(self):
            path = tmp_path / "calls"
            found = path.read_text().splitlines() if path.exists() else []
            path.unlink(missing_ok=True)
            return [line.split() for line in found]

    Book.text.write_text(notebook(), encoding="utf-8")
    return Book()


def experiment() -> Experiment:
    return experiments.experiments()["toy"]


def test_compute_store_and_load(book, capsys):
    assert book.run("--list") == 0
    assert "evidence/toy" in (shown := capsys.readouterr().out)
    assert "missing" in shown
    assert book.run() == 0
    assert "toy: stored as toy.json" in capsys.readouterr().out
    stored = load("toy", book.results)
    assert stored.seeds == (0, 1, 2, 3)
    assert stored.cell(a=2, b="y") == {"value": [2.0, 2.33333, 2.66667, 3.0], "big": [True] * 4}
    assert {"python", "torch", "numpy"} <= set(stored.record["versions"])
    assert not list(book.results.glob("*partial*"))
    here = {call[5] for call in book.calls()}
    assert here == {str(Path.cwd())}, "cells run in a folder of their own, the grid where it was"
    assert_agrees(stored, define(experiment()).run(grid={"a": [2], "b": ["x"]}, seeds=[1, 2]))
    book.calls()
    assert book.run() == 0
    assert "nothing to do" in capsys.readouterr().out
    assert not book.calls()
    assert book.run("toy") == 0
    assert len(book.calls()) == 6
    with pytest.raises(SystemExit):
        book.run("tory")
    assert "no experiment 'tory'; known: toy" in capsys.readouterr().err


def test_goes_on_after_an_interruption(book, monkeypatch):
    def interrupted():
        with monkeypatch.context() as patch:
            patch.setenv("TOY_STOP", "2y")
            assert book.run("toy") == 130

    interrupted()
    partial = book.results / "toy.partial"
    assert partial.exists()
    assert not (book.results / "toy.json").exists()
    # A line cut short does no harm.
    partial.write_text(partial.read_text() + '{"key": [2, "y"], "meas')
    book.calls()
    assert book.run("toy") == 0
    assert [call[:2] for call in book.calls()] == [["2", "y"], ["3", "x"], ["3", "y"]]
    whole = define(experiment()).run().cells
    assert dict(load("toy", book.results).cells) == whole
    # What other code began is not gone on with.
    interrupted()
    book.calls()
    book.text.write_text(notebook(lab=LAB.replace("s / 3", "s / 4")), encoding="utf-8")
    assert book.run("toy") == 0
    assert len(book.calls()) == 6


@pytest.mark.slow
def test_workers_get_what_the_cells_define(book, monkeypatch):
    """A function of a notebook travels with its laboratory; each worker has one thread."""
    monkeypatch.setenv("RELUBOOK_JOBS", "2")
    compute(experiment(), book.results)
    calls = book.calls()
    assert len(calls) == 6
    assert str(os.getpid()) not in {call[3] for call in calls}
    assert {call[4] for call in calls} == {"1"}
    stored = load("toy", book.results)
    assert list(stored.cells) == [(a, b) for a in (1, 2, 3) for b in "xy"]
    assert stored.cell(a=3, b="x")["value"] == [3.0, 3.33333, 3.66667, 4.0]
    monkeypatch.setenv("RELUBOOK_JOBS", "0")
    with pytest.raises(ValueError, match="RELUBOOK_JOBS must be a number of 1 or more, not '0'"):
        compute(experiment(), book.results)


def test_full_disk_leaves_the_old_file(book, monkeypatch):
    path = compute(experiment(), book.results)
    before, replace = path.read_bytes(), os.replace

    def full(source, target):
        if Path(target) == path:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        compute(experiment(), book.results)
    assert path.read_bytes() == before
    assert sorted(p.name for p in book.results.iterdir()) == ["toy.json", "toy.partial"]


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"lab": LAB.replace("s / 3", "s / 4")}, True),
        ({"lab": LAB.replace("arange(3.0)", "arange(4.0)")}, True),
        ({"toy": TOY.replace("a > 1", "a > 2")}, True),
        ({"toy": TOY.replace("[1, 2, 3]", "[1, 2]")}, True),
        ({"toy": TOY.replace("range(4)", "range(5)")}, True),
        ({"lab": LAB + "\n\nunused = 3"}, False),
        ({"lab": LAB.replace("# the laboratory", "# another comment")}, False),
        ({"lab": LAB.replace("a + s / 3", "(\n        a + s / 3\n    )")}, False),
        ({"lab": "import torch", "toy": LAB + "\n\n" + TOY}, False),
        ({"setup": SETUP.replace("nothing", "something")}, False),
    ],
)
def test_what_makes_a_result_stale(book, change, stale):
    compute(experiment(), book.results)
    assert not is_stale(experiment(), book.results)
    book.text.write_text(notebook(**change), encoding="utf-8")
    assert is_stale(experiment(), book.results) is stale


def test_a_name_stands_for_one_experiment(book):
    book.text.with_name("other.md").write_text(notebook(), encoding="utf-8")
    with pytest.raises(ValueError, match="'toy' is defined in evidence/other too"):
        experiments.experiments()


def test_seeds_of_stored_results_do_not_move(book, monkeypatch):
    monkeypatch.setenv("RELUBOOK_SEED", "1000000")
    toy = TOY.replace("+ data[0]", "+ SEED")
    book.text.write_text(notebook(toy=toy), encoding="utf-8")
    compute(experiment(), book.results)
    assert load("toy", book.results).cell(a=1, b="x")["value"][0] == 1


EXPERIMENTS = experiments.experiments()


@pytest.mark.parametrize("made", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_what_is_stored_was_computed_by_the_notebook_as_it_is(made):
    assert not is_stale(made), f"{made.name} is stale: make full NAMES={made.name}"


def test_what_is_stored_is_small_and_belongs_to_a_notebook_that_shows_it():
    stored = {path.stem: path for path in notebooks.RESULTS.glob("*.json")}
    assert stored.keys() - {"replications"} == EXPERIMENTS.keys()
    for name, path in stored.items():
        seeds = json.loads(path.read_text(encoding="utf-8"))["seeds"] if name in EXPERIMENTS else []
        many = len(seeds) if isinstance(seeds, list) else seeds["last"] + 1 - seeds["first"]
        limit = max(400_000, 5_000 * many)
        assert path.stat().st_size < limit, f"{name}: store fewer quantities or seeds"
        assert json.loads(path.read_text(encoding="utf-8"))
    for made in EXPERIMENTS.values():
        source = notebooks.read_source(notebooks.texts()[made.notebook])
        code = "\n".join(
            cell.source
            for cell in source.cells
            if cell.cell_type == "code" and "experiment" not in cell.metadata.get("tags", [])
        )
        assert f'"{made.name}"' in code
        assert "load" in code
        assert "assert_agrees" in code
