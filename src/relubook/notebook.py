"""What every chapter calls first: house style, fixed seeds, one thread."""

import random
import time

import torch

from relubook._optional import require
from relubook.plots import use_style

__all__ = ["running_time", "setup"]

_started: float | None = None


def setup(*, seed: int = 0, threads: int = 1) -> None:
    """Prepare a notebook: figures in the house style, seeds fixed, threads limited.

    Args:
        seed: Seeds Python's, NumPy's and torch's global generators. Experiments still pass their
            own seeds.
        threads: Threads for torch. One is fastest for the book's small networks, and sums then
            come out the same on every run.

    Raises:
        ValueError: If ``seed`` is negative or ``threads`` is below 1.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    global _started
    _started = time.process_time()
    np = require("numpy", "seeding")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    use_style()


def running_time() -> float:
    """Return the seconds of processor time since :func:`setup` was called.

    With one thread that is the running time on an idle machine; on a busy one it stays the same.

    Raises:
        RuntimeError: If it was not called.
    """
    if _started is None:
        raise RuntimeError("call relubook.setup() first: running time counts from there")
    return time.process_time() - _started
