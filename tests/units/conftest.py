"""Every test of the room starts from the same random state, and leaves it as it was."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
