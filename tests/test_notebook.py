"""What every chapter calls first."""

import random

import matplotlib as mpl
import numpy as np
import pytest
import torch

from relubook import book as notebook


@pytest.fixture(autouse=True)
def _restored():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()
    with mpl.rc_context():
        yield
    torch.random.set_rng_state(state)
    torch.set_num_threads(threads)
    random.setstate(python)
    np.random.set_state(numpy)


def test_setup_fixes_seeds_threads_and_style():
    draws = []
    for _ in range(2):
        notebook.setup(seed=3)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert torch.get_num_threads() == 1
    assert mpl.rcParams["figure.facecolor"] == "white"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seed": -1}, "seed must not be negative"), ({"threads": 0}, "threads must be at least 1")],
)
def test_bad_arguments_leave_the_random_state(arguments, message):
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=message):
        notebook.setup(**arguments)
    assert torch.equal(before, torch.random.get_rng_state())


def test_running_time_counts_from_setup(monkeypatch):
    monkeypatch.setattr(notebook, "_started", None)
    with pytest.raises(RuntimeError, match="call relubook.setup"):
        notebook.running_time()
    notebook.setup()
    assert 0 <= notebook.running_time() < 60
