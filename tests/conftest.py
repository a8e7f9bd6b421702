"""What several test modules share: the repository's folders and the book's own tools."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_tools"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def _one_thread_and_restored_randomness():
    """Run on one thread, and give each test the global random state as it was."""
    torch.set_num_threads(1)
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)
