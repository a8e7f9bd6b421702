import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from relubook.evidence.statistics import (
    base_seed,
    mean_interval,
    median_interval,
    paired_interval,
    proportion_interval,
    scale,
    seeds,
)

numbers = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=40)


@settings(max_examples=30, deadline=None)
@given(numbers)
def test_mean_interval_equals_students(values):
    got = mean_interval(values)
    if np.ptp(values) <= 1e-9 * np.abs(values).max():  # scipy warns of such
        assert (got.low, got.high) == pytest.approx((got.value, got.value), rel=1e-8)
        return
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert got.n == len(values)


@pytest.mark.parametrize(("k", "n"), [(0, 30), (30, 30), (7, 30), (1, 1)])
def test_proportion_interval_equals_the_binomial_test(k, n):
    got = proportion_interval(k, n)
    want = scipy.stats.binomtest(k, n).proportion_ci(0.95, "exact")
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)


@pytest.mark.slow
def test_intervals_cover_at_their_level():
    rng = np.random.default_rng(0)
    trials, n = 400, 40
    hits = dict.fromkeys(("mean", "median", "share", "paired"), 0)
    for _ in range(trials):
        x = rng.exponential(size=n)
        mean, median = mean_interval(x), median_interval(x)
        hits["mean"] += mean.low <= 1 <= mean.high
        hits["median"] += median.low <= math.log(2) <= median.high
        k = rng.binomial(n, 0.1)
        share = proportion_interval(int(k), n)
        hits["share"] += share.low <= 0.1 <= share.high
        base = rng.random(n)
        a, b = base < 0.3, (base + 0.15 * rng.random(n)) < 0.3
        truth = 0.3 - (0.3 - 0.075)
        paired = paired_interval(a, b)
        hits["paired"] += paired.low <= truth <= paired.high
    for name, count in hits.items():
        assert count / trials > (0.88 if name == "mean" else 0.92), (name, count / trials)


def test_ends_of_the_median_are_order_statistics():
    """At n = 40 the sign test leaves the 14th to the 27th value at 95%."""
    x = np.random.default_rng(1).permutation(40) + 1.0
    got = median_interval(x)
    assert (got.value, got.low, got.high, got.n) == (20.5, 14, 27, 40)
    assert 2 * scipy.stats.binom(40, 0.5).cdf(13) <= 0.05 < 2 * scipy.stats.binom(40, 0.5).cdf(14)


def test_scale(monkeypatch):
    monkeypatch.delenv("RELUBOOK_SCALE", raising=False)
    assert scale(quick=30, full=500) == 30
    monkeypatch.setenv("RELUBOOK_SCALE", "full")
    assert scale(quick=30, full=500) == 500
    monkeypatch.setenv("RELUBOOK_SCALE", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        scale(quick=30, full=500)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0]), "at least 2 samples"),
        (lambda: mean_interval([1.0, math.nan]), "1 of 2 samples are not finite"),
        (lambda: mean_interval([[1.0, 2.0]]), "one-dimensional"),
        (lambda: mean_interval([1.0, 2.0], confidence=1.0), "confidence.*1.0"),
        (lambda: median_interval([1.0, 2.0, 3.0]), "3 samples are too few"),
        (lambda: proportion_interval(3, 2), "3 of 2"),
        (lambda: paired_interval([1.0, 2.0], [1.0, 2.0, 3.0]), "not 2 and 3"),
    ],
)
def test_named_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_variable_moves_every_seed(monkeypatch):
    monkeypatch.delenv("RELUBOOK_SEED", raising=False)
    assert (base_seed(), seeds(3), seeds(2, 10)) == (0, range(3), range(10, 12))
    monkeypatch.setenv("RELUBOOK_SEED", "1000000")
    assert seeds(2, 10) == range(1_000_010, 1_000_012)
    monkeypatch.setenv("RELUBOOK_SEED", "-1")
    with pytest.raises(ValueError, match="RELUBOOK_SEED must be a whole number"):
        base_seed()
