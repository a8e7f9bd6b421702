"""Stored results: computed in parallel, resumed, loaded, compared with a live slice."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from relubook.chapters.one_network import flipped_verdicts
from relubook.evidence import results
from relubook.evidence.results import (
    Results,
    assert_agrees,
    computation,
    compute,
    get,
    is_stale,
    load,
    main,
)

CALLS = []


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(results, "_REGISTRY", {})
    monkeypatch.setattr(results, "MODULES", ())
    monkeypatch.setenv("RELUBOOK_JOBS", "1")
    CALLS.clear()

    @computation("toy", grid={"a": [1, 2, 3], "b": ["x", "y"]}, seeds=4)
    def toy(seeds, *, a, b):
        CALLS.append((a, b, len(seeds)))
        return {"value": [a + s / 3 for s in seeds], "big": [a > 1] * len(seeds)}

    return toy


def test_compute_store_and_load(toy, tmp_path):
    path = compute("toy", tmp_path)
    assert path == tmp_path / "toy.json"
    stored = load("toy", tmp_path)
    assert stored.seeds == (0, 1, 2, 3)
    assert stored.cell(a=2, b="y") == {
        "value": [2.0, 2.33333, 2.66667, 3.0],
        "big": [True] * 4,
    }
    assert set(stored.record) == {"versions", "date", "duration", "fingerprint"}
    assert {"python", "torch", "numpy"} <= set(stored.record["versions"])
    assert not list(tmp_path.glob("*partial*"))
    assert "toy" in repr(stored)
    with pytest.raises(KeyError, match="no cell"):
        stored.cell(a=4, b="x")


def test_goes_on_after_an_interruption(toy, tmp_path, monkeypatch):
    measure = results.Computation.measure

    def stop(self, key, seeds):
        if len(CALLS) == 3:
            raise KeyboardInterrupt
        return measure(self, key, seeds)

    def interrupted():
        CALLS.clear()
        with monkeypatch.context() as patch:
            patch.setattr(results.Computation, "measure", stop)
            assert main(["toy", "--folder", str(tmp_path)]) == 130

    interrupted()
    partial = tmp_path / "toy.partial"
    assert partial.exists()
    assert not (tmp_path / "toy.json").exists()
    # A line cut short does no harm.
    partial.write_text(partial.read_text() + '{"key": [2, "y"], "meas')
    CALLS.clear()
    compute("toy", tmp_path)
    assert CALLS == [(2, "y", 4), (3, "x", 4), (3, "y", 4)]
    whole = load("toy", tmp_path)
    assert dict(whole.cells) == {point: toy.measure(point, toy.seeds) for point in toy.points()}
    # What other code began is not gone on with.
    interrupted()
    monkeypatch.setattr(results.Computation, "fingerprint", lambda self: "other")
    CALLS.clear()
    compute("toy", tmp_path)
    assert len(CALLS) == 6


@computation("threads", grid={"a": [1, 2, 3, 4]}, seeds=2)
def threads(seeds, *, a):
    return {"threads": [torch.get_num_threads()] * len(seeds), "worker": [os.getpid()] * 2}


@pytest.mark.slow
def test_workers_compute_in_parallel_on_one_thread_each(monkeypatch, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for jobs in ("2", "1"):
        monkeypatch.setenv("RELUBOOK_JOBS", jobs)
        compute("threads", tmp_path)
        stored = load("threads", tmp_path)
        assert list(stored.cells) == [(1,), (2,), (3,), (4,)]
        assert {n for cell in stored.cells.values() for n in cell["threads"]} == {1}
        workers = {n for cell in stored.cells.values() for n in cell["worker"]}
        assert (os.getpid() in workers) == (jobs == "1")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    monkeypatch.setenv("RELUBOOK_JOBS", "0")
    with pytest.raises(ValueError, match="RELUBOOK_JOBS must be a number of 1 or more, not '0'"):
        compute("threads", tmp_path)


@pytest.mark.slow
def test_what_a_notebook_defines_reaches_the_workers(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("RELUBOOK_JOBS", "2")
    compute("toy", tmp_path)
    assert CALLS == []
    assert load("toy", tmp_path).cell(a=2, b="y")["big"] == [True] * 4


def test_full_disk_leaves_the_old_file(toy, tmp_path, monkeypatch):
    path = compute("toy", tmp_path)
    before = path.read_bytes()

    def full(source, target):
        if Path(target) == path:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        compute("toy", tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.json", "toy.partial"]


def test_stale_results_are_found(toy, tmp_path, monkeypatch):
    compute("toy", tmp_path)
    assert not is_stale("toy", tmp_path)
    path = tmp_path / "toy.json"
    before = path.read_text()
    for key, value in (("fingerprint", "0"), ("seeds", [0, 1]), ("grid", {"a": [1], "b": ["x"]})):
        path.write_text(json.dumps(json.loads(before) | {key: value}))
        assert is_stale("toy", tmp_path), key
    with pytest.raises(FileNotFoundError, match="make full NAMES=nothing"):
        load("nothing", tmp_path)


@pytest.fixture
def chance(monkeypatch, tmp_path):
    """A stored result of 40 seeds, skewed and with a few overflows, and a slice run again."""
    monkeypatch.setattr(results, "_REGISTRY", {})
    monkeypatch.setattr(results, "MODULES", ())
    monkeypatch.setenv("RELUBOOK_JOBS", "1")
    draw = np.random.default_rng(0).exponential(size=40)

    @computation("chance", grid={"a": [1, 2]}, seeds=40)
    def chance(seeds, *, a):
        loss = [math.nan if s in (8, 9) else float(a * draw[s]) for s in seeds]
        return {"loss": loss, "dead": [bool(draw[s] < 1) for s in seeds]}

    compute("chance", tmp_path)
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


def test_commands(toy, tmp_path, capsys):
    assert main(["--list", "--folder", str(tmp_path)]) == 0
    assert "missing" in capsys.readouterr().out
    assert main(["--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "stored as toy.json" in shown.out
    assert shown.err == ""
    assert main(["--folder", str(tmp_path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert len(CALLS) == 6
    assert main(["toy", "--folder", str(tmp_path)]) == 0
    assert len(CALLS) == 12
    with pytest.raises(SystemExit):
        main(["tory", "--folder", str(tmp_path)])
    assert "no computation 'tory'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "grid", "seeds", "message"),
    [
        ("Two Words", {}, 3, "hyphens"),
        ("two", {}, 0, "at least one seed"),
        ("two", {"a": []}, 3, "at least one value of 'a'"),
    ],
)
def test_bad_declarations(toy, name, grid, seeds, message):
    with pytest.raises(ValueError, match=message):
        computation(name, grid=grid, seeds=seeds)


def test_bad_functions(toy):
    @computation("short", grid={}, seeds=3)
    def short(seeds):
        return {"x": [1, 2]}

    with pytest.raises(ValueError, match="2 numbers of 'x' for 3 seeds"):
        short.run()
    with pytest.raises(ValueError, match="no computation 'shrt'; known: short"):
        get("shrt")


def test_what_is_registered_runs_and_is_not_stale():
    """Every stored result was computed by the sources as they are."""
    names = [n for n in results.result_names() if get(n).function.__module__ != __name__]
    assert len(names) == 6
    for name in names:
        assert get(name).function.__module__.startswith("relubook.")
        assert not is_stale(name), f"{name} is stale: make full NAMES={name}"


def test_what_the_readme_says_of_one_network():
    stored = load("one-network")
    for lr, better, wrong in ((0.001, "none", 0.29), (0.01, "batch", 0.32)):
        plain, normed = (
            stored.cell(activation="relu", normalization=n, lr=lr)["accuracy"]
            for n in ("none", "batch")
        )
        flips = flipped_verdicts(plain, normed)
        assert flips.difference.n == 500
        assert (flips.difference.low > 0) == (better == "none")
        assert (flips.difference.high < 0) == (better == "batch")
        assert flips.flipped == pytest.approx(wrong, abs=0.04)
        assert flips.same_seed == pytest.approx(wrong, abs=0.05)


@pytest.mark.slow
def test_one_network_agrees_with_what_is_stored():
    grid = {"activation": ["relu"], "normalization": ["none"], "lr": [0.01]}
    live = get("one-network").run(grid=grid, seeds=range(30))
    assert_agrees(load("one-network"), live, rounding=0.001)


@pytest.mark.slow
def test_command_line_knows_the_registry():
    run = subprocess.run(
        [sys.executable, "-m", "relubook", "results", "--list"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert "one-network" in run.stdout


def test_flipped_verdicts_by_hand():
    flips = flipped_verdicts([1.0, 2.0, 3.0], [0.0, 2.5, 1.0])
    assert flips.difference.value == pytest.approx(5 / 6)
    # Of the six pairs of different seeds, 1 - 2.5 and 2 - 2.5 (own seed) apart: two lose, one ties.
    assert flips.flipped == pytest.approx(1 / 6)
    assert flips.ties == pytest.approx(1 / 6)
    assert flips.same_seed == pytest.approx(1 / 3)


def test_flipped_verdicts_of_normal_samples():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 2000), rng.normal(0, 1, 2000)
    flips = flipped_verdicts(a, b)
    import scipy.stats

    assert flips.flipped == pytest.approx(scipy.stats.norm.cdf(-0.5 / math.sqrt(2)), abs=0.02)
    assert flips.needed == pytest.approx((2.8 * math.sqrt(2) / 0.5) ** 2, rel=0.15)
    with pytest.raises(ValueError, match="not 2 and 3"):
        flipped_verdicts([1, 2], [1, 2, 3])
