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

    def run(*names, **chapters):
        for name, text in chapters.items():
            (tmp_path / f"{name}.md").write_text(text, encoding="utf-8")
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        monkeypatch.setattr(sys, "argv", ["notebooks.py", "--elsewhere", *names])
        try:
            notebooks.main()
        finally:
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

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
    with pytest.raises(SystemExit, match="no chapter named worse"):
        book("worse")


def test_the_usual_run_stops_at_a_failing_cell(tmp_path):
    path = tmp_path / "bad.md"
    path.write_text(
        chapter("assert 'ATEN_CPU_CAPABILITY' not in __import__('os').environ", "1 / 0")
    )
    notebook = notebooks.read_source(path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(notebook)
