import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.weightstats import ttost_paired

from relubook.evidence.statistics import (
    bootstrap_interval,
    compare_paired,
    equivalence,
    mean_difference,
    mean_interval,
    median_interval,
    paired_interval,
    proportion_difference,
    proportion_interval,
    scale,
)

numbers = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=40)


@settings(max_examples=30, deadline=None)
@given(numbers)
def test_mean_interval_equals_students(values):
    got = mean_interval(values)
    if np.std(values) == 0:
        assert got.low == got.value == got.high
        return
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert got.n == len(values)


@settings(max_examples=30, deadline=None)
@given(numbers, numbers)
def test_mean_difference_equals_welchs(first, second):
    got = mean_difference(first, second, confidence=0.9)
    assert (got.value, got.n) == (np.mean(first) - np.mean(second), min(len(first), len(second)))
    if min(np.std(first), np.std(second)) < 1e-6:  # scipy warns of lost digits there
        assert got.low <= got.value <= got.high
        return
    low, high = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.9)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-7, abs=1e-7)


def test_mean_difference_of_constant_groups_has_no_width():
    got = mean_difference([2.0] * 3, [0.5] * 4)
    assert (got.low, got.value, got.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(("k", "n"), [(0, 30), (30, 30), (7, 30), (1, 1)])
def test_proportion_interval_equals_the_binomial_test(k, n):
    got = proportion_interval(k, n)
    want = scipy.stats.binomtest(k, n).proportion_ci(0.95, "exact")
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)


def test_intervals_cover_at_their_level():
    rng = np.random.default_rng(0)
    trials, n = 400, 40
    hits = dict.fromkeys(("mean", "median", "share", "paired", "difference"), 0)
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
        two = proportion_difference(int(rng.binomial(n, 0.3)), n, int(rng.binomial(n, 0.2)), n)
        hits["difference"] += two.low <= 0.1 <= two.high
    for name, count in hits.items():
        assert count / trials > (0.88 if name == "mean" else 0.92), (name, count / trials)


def test_bootstrap_and_median_agree():
    x = np.random.default_rng(1).normal(size=200)
    a, b = bootstrap_interval(x, resamples=2000), median_interval(x)
    assert a.value == b.value == np.median(x)
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.05)
    assert bootstrap_interval(x, resamples=500) == bootstrap_interval(x, resamples=500)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=60))
def test_truth_values_take_mcnemars_test(pairs):
    a, b = np.array(pairs).T
    row = compare_paired({"a": a, "b": b}).rows[0]
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    want = mcnemar(table, exact=True).pvalue if (a != b).any() else 1.0
    assert row.p_value == pytest.approx(want)
    assert row.difference.value == pytest.approx(a.mean() - b.mean())
    assert -1 <= row.difference.low <= row.difference.high <= 1


def test_comparisons_are_corrected_together():
    rng = np.random.default_rng(2)
    seeds = rng.normal(size=40)
    runs = {
        "plain": seeds + 0.1 * rng.normal(size=40),
        "same": seeds + 0.1 * rng.normal(size=40),
        "better": seeds - 0.3 + 0.1 * rng.normal(size=40),
    }
    family = compare_paired(runs)
    assert len(family) == 3
    raw = [scipy.stats.ttest_rel(runs[r.first], runs[r.second]).pvalue for r in family]
    order = np.argsort(raw)
    holm, running = np.empty(3), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (3 - rank) * raw[index]))
        holm[index] = running
    assert [r.p_value for r in family] == pytest.approx(list(holm))
    assert family["better", "plain"].verdict == "smaller"
    assert family["plain", "better"].verdict == "larger"
    assert family["plain", "same"].verdict == "undecided"
    turned = family["better", "plain"].difference
    assert turned.low < turned.value < turned.high < 0
    alone = paired_interval(runs["plain"], runs["same"])
    wide = family["plain", "same"].difference
    assert wide.high - wide.low > alone.high - alone.low
    assert "holm" in repr(family)
    assert list(family.to_frame()["verdict"]) == [r.verdict for r in family]
    against = compare_paired(runs, baseline="plain", test="wilcoxon")
    assert [(r.first, r.second) for r in against] == [("same", "plain"), ("better", "plain")]
    assert against["better", "plain"].verdict == "smaller"
    with pytest.raises(KeyError, match="not compared"):
        against["same", "better"]


def test_false_alarms_of_a_family_stay_below_the_level():
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(20):
        runs = {str(k): rng.normal(size=20) for k in range(6)}
        alarms += any(row.verdict != "undecided" for row in compare_paired(runs))
    # 15 comparisons each: uncorrected, half of the families would raise one.
    assert alarms <= 4


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [(0.0, 0.1, "equivalent"), (0.0, 10.0, "undecided"), (2.0, 0.1, "different")],
)
def test_equivalence(shift, spread, verdict):
    rng = np.random.default_rng(4)
    a = rng.normal(size=50)
    b = a - shift + spread * rng.normal(size=50)
    got = equivalence(a, b, margin=0.5)
    assert got.verdict == verdict
    want = ttost_paired(a, b, -0.5, 0.5)[0]
    assert got.p_value == pytest.approx(want, abs=1e-9)
    assert (got.p_value < 0.05) == (verdict == "equivalent")
    assert got.difference.confidence == pytest.approx(0.9)
    assert equivalence(a, a, margin=0.5).verdict == "equivalent"


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
        (lambda: proportion_difference(1, 2, 3, 2), "3 of 2"),
        (lambda: paired_interval([1.0, 2.0], [1.0, 2.0, 3.0]), "not 2 and 3"),
        (lambda: mean_difference([1.0, 2.0], [1.0]), "at least 2 samples"),
        (lambda: mean_difference([1.0, 2.0], [1.0, math.inf]), "1 of 2 samples are not finite"),
        (lambda: compare_paired({"a": [1.0, 2.0]}), "at least two remedies"),
        (lambda: compare_paired({"a": [1, 2], "b": [1, 2]}, baseline="c"), "'c' is none of a, b"),
        (lambda: compare_paired({"a": [1, 2], "b": [1, 2]}, test="z"), "'z'"),
        (lambda: equivalence([1, 2], [1, 2], margin=0), "margin"),
    ],
)
def test_named_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
