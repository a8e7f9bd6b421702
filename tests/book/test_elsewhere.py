"""Chapters run as on another processor: nothing is stored, and no failure is overlooked."""

import sys

import notebooks
import pytest
from nbclient.exceptions import CellExecutionError

pytestmark = [pytest.mark.notebooks, pytest.mark.slow]

HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# A chapter
"""


def chapter(*cells):
    return HEAD + "".join(f"\n```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells)


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of our own; ``run(...)`` is the command line."""
    monkeypatch.setattr(notebooks, "BOOK", tmp_path)

    def stored():
        return {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}

    def run(*names, **chapters):
        for name, text in chapters.items():
            path = tmp_path / f"{name.replace('evidence_', 'evidence/')}.md"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        before = stored()
        monkeypatch.setattr(sys, "argv", ["notebooks.py", "--elsewhere", *names])
        try:
            notebooks.main()
        finally:
            assert stored() == before

    return run


def test_the_kernel_computes_without_vector_instructions(book, capsys):
    settings = (
        f"import os\nfor k, v in {notebooks.ELSEWHERE}.items():\n    assert os.environ[k] == v"
    )
    torch = "import torch\nassert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'"
    ledger = "assert os.environ['RELUBOOK_LEDGER'] == 'check'"
    book(one=chapter(settings, torch, ledger))
    assert capsys.readouterr().out == "one: holds\n"


def test_every_failing_cell_is_named_and_the_exit_is_not_zero(book, capsys):
    failing = chapter("x = 1", "assert x == 2, 'no such x'", "print(x)", "raise KeyError(x)")
    with pytest.raises(SystemExit) as stop:
        book(bad=failing, good=chapter("x = 1"))
    assert stop.value.code == "not true on every processor: bad"
    out = capsys.readouterr().out
    assert "bad: fails\n  cell 2: AssertionError: no such x\n  cell 4: KeyError: 1\n" in out
    assert "good: holds\n" in out


def test_names_choose(book, capsys):
    book("good", bad=chapter("raise KeyError"), good=chapter("x = 1"))
    assert capsys.readouterr().out == "good: holds\n"
    with pytest.raises(SystemExit, match="no notebook named worse"):
        book("worse")


def test_two_at_a_time_are_named_by_their_paths_in_order(book, capsys):
    """A chapter and its evidence share the last part of their name."""
    waits = chapter("import time\ntime.sleep(1)")
    with pytest.raises(SystemExit, match="processor: evidence/one$"):
        book("--jobs=2", one=waits, evidence_one=chapter("1 / 0"), two=chapter("x = 1"))
    out = capsys.readouterr().out
    wanted = "one: holds\ntwo: holds\nevidence/one: fails\n  cell 1: ZeroDivisionError"
    assert out.startswith(wanted)


def test_a_failing_notebook_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "BOOK", tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebooks.py"])
    for name, cell in (("bad", "1 / 0"), ("good", "print(1)")):
        (tmp_path / f"{name}.md").write_text(chapter(cell), encoding="utf-8")
    with pytest.raises(SystemExit, match="not run to the end: bad"):
        notebooks.main()
    out = capsys.readouterr().out
    assert out.startswith("bad: fails: ZeroDivisionError")
    assert "good: run in" in out
    assert {p.name for p in tmp_path.glob("*.ipynb")} == {"good.ipynb"}


def test_the_usual_run_stops_at_a_failing_cell(tmp_path):
    path = tmp_path / "bad.md"
    path.write_text(
        chapter("assert 'ATEN_CPU_CAPABILITY' not in __import__('os').environ", "1 / 0")
    )
    notebook = notebooks.read_source(path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(notebook)
