"""What several test modules share: the repository's folders and the book's own tools."""

import sys
import time
from pathlib import Path

import processes
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


@pytest.fixture
def two_processes(monkeypatch, tmp_path):
    """Run a function of a rank, and more, in a group of two processes that talk on loopback."""
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def run(function, *arguments, seconds=240):
        given = (tmp_path / "store").as_uri(), function, arguments
        both = torch.multiprocessing.spawn(processes.run, given, nprocs=2, join=False)
        end = time.monotonic() + seconds
        while not both.join(timeout=1):
            if time.monotonic() > end:
                for process in both.processes:
                    process.kill()
                pytest.fail(f"two processes were not done after {seconds} seconds")

    return run
