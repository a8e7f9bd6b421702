"""Timings as ratios within one run."""

import pytest

from relubook.evidence import timing
from relubook.evidence.timing import interleaved_seconds


def test_functions_take_turns(monkeypatch):
    order = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(clock))
    seconds = interleaved_seconds(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, calls=2
    )
    assert order == ["a", "a", "b", "b"] * 4
    assert seconds == {"a": [0.5] * 3, "b": [0.5] * 3}


def test_bad_input():
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved_seconds({})
    with pytest.raises(ValueError, match="at least 1"):
        interleaved_seconds({"a": int}, repeats=0)
