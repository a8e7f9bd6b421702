"""Stored results: declared, run in part, loaded, compared with a live slice."""

import json
import math

import numpy as np
import pytest

from relubook.evidence.results import Results, assert_agrees, computation, load


def store(made, folder):
    """Store a computation as `make full` does, its grid and seeds as they are declared."""
    live = made.run()
    cells = [
        {"at": dict(zip(live.grid, key, strict=True)), "measured": measured}
        for key, measured in live.cells.items()
    ]
    head = {"name": made.name, "grid": made.grid, "seeds": made.seeds, "cells": cells}
    head |= {"versions": {}, "date": "2020-02-20", "duration": 1, "fingerprint": "0"}
    (folder / f"{made.name}.json").write_text(json.dumps(head))


@pytest.fixture
def toy():
    @computation("toy", grid={"a": [1, 2, 3], "b": ["x", "y"]}, seeds=4)
    def toy(seeds, *, a, b):
        return {"value": [a + s / 3 for s in seeds], "big": [a > 1] * len(seeds)}

    return toy


def test_store_and_load(toy, tmp_path):
    store(toy, tmp_path)
    stored = load("toy", tmp_path)
    assert stored.seeds == (0, 1, 2, 3)
    assert stored.cell(a=2, b="y") == {"value": [2.0, 2.33333, 2.66667, 3.0], "big": [True] * 4}
    assert set(stored.record) == {"versions", "date", "duration", "fingerprint"}
    assert repr(stored) == "Results('toy', a (3) x b (2), 4 seeds)"
    with pytest.raises(KeyError, match="no cell"):
        stored.cell(a=4, b="x")
    with pytest.raises(FileNotFoundError, match="make full NAMES=nothing"):
        load("nothing", tmp_path)


@pytest.fixture
def chance(tmp_path):
    """A stored result of 40 seeds, skewed and with a few overflows, and a slice run again."""
    draw = np.random.default_rng(0).exponential(size=40)

    @computation("chance", grid={"a": [1, 2]}, seeds=40)
    def chance(seeds, *, a):
        loss = [math.nan if s in (8, 9) else float(a * draw[s]) for s in seeds]
        return {"loss": loss, "dead": [bool(draw[s] < 1) for s in seeds]}

    store(chance, tmp_path)
    return load("chance", tmp_path), chance.run(grid={"a": [2]}, seeds=range(5, 40))


def moved(live, what, change):
    """The slice with every k-th number x of a quantity replaced by change(k, x)."""
    cell = dict(live.cells[2,])
    cell[what] = [change(k, x) for k, x in enumerate(cell[what])]
    return Results(live.name, live.grid, live.seeds, {(2,): cell})


def test_a_slice_agrees_unless_an_interval_says_otherwise(chance):
    stored, live = chance
    assert_agrees(stored, live)
    # Single networks elsewhere, and noise without direction, are chance.
    assert_agrees(stored, moved(live, "loss", lambda k, x: x + (k < 4)))
    assert_agrees(stored, moved(live, "loss", lambda k, x: x + (-1) ** k))
    assert_agrees(stored, moved(live, "dead", lambda k, x: not x if k < 4 else x))
    assert_agrees(stored, moved(live, "loss", lambda k, x: math.inf if k < 4 else x))
    # All of them elsewhere are not, be it by a common step or a scattered one.
    for change in (lambda k, x: x + 2, lambda k, x: x + 0.3 + 0.1 * math.sin(k)):
        with pytest.raises(AssertionError, match=r"chance at \(2,\), loss: mean .*rounding of 0"):
            assert_agrees(stored, moved(live, "loss", change))
        assert_agrees(stored, moved(live, "loss", change), rounding=2)
    with pytest.raises(AssertionError, match="dead: mean 1, stored"):
        assert_agrees(stored, moved(live, "dead", lambda k, x: True))
    with pytest.raises(AssertionError, match="share of finite loss: mean 0, stored 0.9429"):
        assert_agrees(stored, moved(live, "loss", lambda k, x: math.nan), rounding=5)


def test_a_slice_must_be_part_of_what_is_stored(toy, chance):
    stored, live = chance
    for other in (
        Results("other", live.grid, live.seeds, live.cells),
        Results("chance", {"b": [2]}, live.seeds, live.cells),
        Results("chance", live.grid, (*live.seeds, 99), live.cells),
    ):
        with pytest.raises(ValueError, match=r"must be a slice of Results\('chance'"):
            assert_agrees(stored, other)
    less = Results("chance", live.grid, live.seeds, {(2,): {"loss": live.cells[2,]["loss"]}})
    with pytest.raises(AssertionError, match=r"\['dead', 'loss'\] is stored, not \['loss'\]"):
        assert_agrees(stored, less)
    for grid, seeds, message in (
        ({"a": [9], "b": ["x"]}, [1], "a=9 must be among"),
        ({"a": [1]}, [1], "a slice of 'toy' must have"),
        ({"a": [1], "b": ["x"]}, [9], "seed 9"),
    ):
        with pytest.raises(ValueError, match=message):
            toy.run(grid=grid, seeds=seeds)


@pytest.mark.parametrize(
    ("name", "grid", "seeds", "message"),
    [
        ("Two Words", {}, 3, "hyphens"),
        ("two", {}, 0, "at least one seed"),
        ("two", {"a": []}, 3, "at least one value of 'a'"),
    ],
)
def test_bad_declarations(name, grid, seeds, message):
    with pytest.raises(ValueError, match=message):
        computation(name, grid=grid, seeds=seeds)


def test_bad_functions():
    @computation("short", grid={}, seeds=3)
    def short(seeds):
        return {"x": [1, 2]}

    with pytest.raises(ValueError, match="2 numbers of 'x' for 3 seeds"):
        short.run()
