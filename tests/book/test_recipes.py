"""Each recipe runs as it stands on the page, after the page's first block."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "book" / "recipes.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def blocks(section):
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


RECIPES = [
    pytest.param(block, id=f"{section.splitlines()[0]}-{number}")
    for section in SECTIONS[1:]
    for number, block in enumerate(blocks(section))
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning", "ignore:.pin_memory")
@pytest.mark.filterwarnings("ignore:.*many workers", "ignore:The number of training batches")
def test_recipe_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (first,) = blocks(SECTIONS[0])
    assert len(recipe.splitlines()) <= 12
    exec(compile(first + recipe, str(PAGE), "exec"), {"__name__": "recipe"})


def test_every_heading_has_its_recipe():
    assert all(len(section.split()) > 20 for section in SECTIONS)
    assert all(blocks(section) for section in SECTIONS)


def test_code_needs_no_scrolling():
    code = re.findall(r"^```\w+\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(code) > 10
    assert [line for block in code for line in block.splitlines() if len(line) > 76] == []
