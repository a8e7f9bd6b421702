"""A small chapter with its evidence, run once, for tests that break one thing in it."""

import shutil
from pathlib import Path

import notebooks
import pytest

MODEL = Path(__file__).with_name("model")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Return a folder with the model chapter, executed, and the text of its evidence."""
    folder = tmp_path_factory.mktemp("model") / "book"
    shutil.copytree(MODEL, folder)
    notebooks.refresh(folder / "toy.md")
    return folder


@pytest.fixture
def pair(model, tmp_path) -> Path:
    """Return the text of a copy of the model chapter; its evidence lies beside it."""
    shutil.copytree(model, tmp_path / "book")
    return tmp_path / "book" / "toy.md"
