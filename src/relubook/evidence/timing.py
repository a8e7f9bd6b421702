"""Timings that survive a noisy machine: processor time, interleaved, to be compared as ratios."""

import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["interleaved_seconds"]


def interleaved_seconds(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int = 40, calls: int = 1
) -> dict[str, list[float]]:
    """Time functions in turn, A B C A B C, so that a slow moment of the machine hits all alike.

    After one round that is not counted there are ``repeats`` rounds of so many ``calls`` of each
    function: raise these for functions of microseconds. ValueError if any of the three is none.

    Returns seconds of processor time per call, all threads together, one number a round, by name.
    """
    if not functions:
        raise ValueError("functions must name at least one function: there is nothing to time")
    if repeats < 1 or calls < 1:
        raise ValueError(f"repeats and calls must be at least 1, not {repeats} and {calls}")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = time.process_time()
            for _ in range(calls):
                function()
            seconds[name].append((time.process_time() - started) / calls)
    return {name: taken[1:] for name, taken in seconds.items()}
