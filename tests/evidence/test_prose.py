"""A number in prose is contradicted by its interval, and by nothing less."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from relubook.evidence.prose import says
from relubook.evidence.statistics import interval

SHARES = np.random.default_rng(0).beta(2, 4, 60)  # of mean 1/3


def test_symmetric_samples_get_students_interval():
    x = np.concatenate([0.5 + SHARES / 2, 0.5 - SHARES / 2])
    mean, low, high = interval(x, confidence=0.99)
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx(stats.t.interval(0.99, 119, 0.5, stats.sem(x)))


def test_a_mirror_image_gets_the_mirrored_interval():
    mean, low, high = interval(SHARES, confidence=0.999)
    assert interval(1 - SHARES, confidence=0.999) == pytest.approx((1 - mean, 1 - high, 1 - low))
    assert interval(10 * SHARES - 3, within=None, confidence=0.999) == pytest.approx(
        (10 * mean - 3, 10 * low - 3, 10 * high - 3)
    )


def test_halls_correction_is_undone_by_its_cubic():
    """Hall's f(T) = T + k T**2 / 3 + k**2 T**3 / 27 + k / 6 leads the ends back to Student's."""
    mean, *ends = interval(SHARES, confidence=0.99)
    k = stats.skew(SHARES, bias=False) / math.sqrt(60)
    back = [(mean - end) / stats.sem(SHARES) for end in ends]
    back = [t + k * t**2 / 3 + k**2 * t**3 / 27 + k / 6 for t in back]
    assert k > 0.01
    assert back == pytest.approx(stats.t.ppf([0.995, 0.005], 59))


@pytest.mark.parametrize("n", [1, 7, 30, 200])
@pytest.mark.parametrize("confidence", [0.95, 0.999])
def test_a_common_value_never_gives_a_zero_width_interval(n, confidence):
    most = 1 - (1 - confidence) ** (1 / n)
    assert interval(np.zeros(n), confidence=confidence) == (0, 0, pytest.approx(most))
    mean, low, high = interval(np.full(n, 0.3), confidence=confidence)
    assert mean == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.3 * (1 - most), 0.3 + 0.7 * most))


def test_last_digits_do_not_make_a_spread():
    x = 0.3 + np.arange(40) * 1e-16
    assert len(np.unique(x)) > 5
    assert interval(x, confidence=0.999) == pytest.approx(
        interval(np.full(40, 0.3), confidence=0.999)
    )


def test_four_that_differ_get_the_exact_bound_and_five_hall():
    x = np.zeros(50)
    x[:4] = 0.5, 0.6, 0.7, 0.8
    share = stats.binomtest(4, 50, alternative="less").proportion_ci(0.999).high
    assert interval(x, confidence=0.999)[1:] == (0, pytest.approx(share))
    x[4] = 0.9
    mean, low, high = interval(x, confidence=0.999)
    assert 0 <= low < mean < high
    assert high - mean > 2 * (mean - low)  # skewed to the right, and so is the interval


def test_nothing_is_known_of_an_unbounded_quantity_without_spread():
    assert interval(np.ones(40), within=None, confidence=0.999) == (1, -math.inf, math.inf)
    assert interval(np.ones(40), within=(0, math.inf), confidence=0.999)[1:] == (
        pytest.approx(0.001 ** (1 / 40)),
        math.inf,
    )


@pytest.mark.parametrize("k", [0, 1, 17, 30])
def test_truth_values_get_clopper_and_pearsons_interval(k):
    x = np.arange(30) < k
    low = stats.beta.ppf(0.0005, k, 31 - k) if k else 0
    high = stats.beta.ppf(0.9995, k + 1, 30 - k) if k < 30 else 1
    assert interval(x, confidence=0.999) == pytest.approx((k / 30, low, high))
    assert interval(torch.tensor(x)) == interval(x.tolist()) == interval(x)


SKEWED = {
    "many small, few large": (lambda draw, size: draw.beta(0.3, 3, size), 1 / 11),
    "a tenth of networks differ": (
        lambda draw, size: (draw.random(size) < 0.1) * draw.integers(1, 5, size) / 32,
        0.1 * 2.5 / 32,
    ),
    "one network in fifty differs": (lambda draw, size: (draw.random(size) < 0.02) * 1.0, 0.02),
    "many near one": (lambda draw, size: 1 - draw.beta(0.5, 5, size), 1 - 1 / 11),
    "symmetric": (lambda draw, size: draw.random(size), 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SKEWED)
def test_coverage_of_skewed_shares(name):
    """At 99% at most 2% of intervals miss; of Student's up to a tenth do."""
    sample, mean = SKEWED[name]
    draws = sample(np.random.default_rng(1), (500, 30))
    missed = 0
    for x in draws:
        _, low, high = interval(x, confidence=0.99)
        missed += not low <= mean <= high
    assert missed <= 10


def test_only_the_whole_interval_contradicts():
    mean, low, high = interval(SHARES, confidence=0.999)
    assert 0.2 < low < mean < high < 0.45
    says(SHARES, "about a third", 0.3, 0.36)
    says(SHARES, "at most the lower end", 0, low + 1e-9)
    says(SHARES, "at least the upper end", high - 1e-9, 1)
    with pytest.raises(AssertionError, match=r"'about two thirds', 0\.6 to 0\.7; the mean is 0\.3"):
        says(SHARES, "about two thirds", 0.6, 0.7)
    with pytest.raises(AssertionError, match=r"99\.9% interval"):
        says(SHARES, "less than the lower end", 0, low - 1e-9)


def test_samples_may_be_tensors_lists_and_differences():
    says(torch.tensor(SHARES), "about a third", 0.3, 0.36)
    says(SHARES.tolist(), "about a third", 0.3, 0.36)
    says(SHARES - SHARES[::-1], "no difference", 0, 0, within=(-1, 1))
    says(100 * SHARES, "over ten", 10, math.inf, within=None)
    with pytest.raises(AssertionError):
        says(SHARES - 1, "no difference", 0, 0, within=(-1, 1))


def test_a_median_is_a_share():
    says(SHARES < 0.5, "most below a half", 0.5, 1)
    with pytest.raises(AssertionError):
        says(SHARES < 0.2, "most below a fifth", 0.5, 1)


def test_equal_samples_contradict_by_their_exact_bound():
    with pytest.raises(AssertionError):
        says(np.zeros(30), "about half", 0.4, 0.6)
    says(np.zeros(30), "some", 0.1, 0.5)  # 0 of 30 leaves room for 20%


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_samples_count_as_stated_or_are_refused(bad):
    x = np.append(np.full(5, bad), SHARES)
    with pytest.raises(ValueError, match="5 of 65 samples are not finite"):
        says(x, "about a third", 0.3, 0.36)
    says(x, "about a third", 0.3, 0.36, nonfinite="omit")
    says(x, "nearly a third", 0.25, 0.32, nonfinite=0)
    with pytest.raises(AssertionError):
        says(np.append(np.full(60, bad), SHARES), "about a third", 0.3, 0.36, nonfinite=1)
    says(SHARES < 0.5, "most below a half", 0.5, 1, nonfinite=0)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, r"shape \(n,\), not \(0,\)"),
        (0.5, {}, r"shape \(n,\), not \(\)"),
        ([[0.1, 0.2]], {}, r"shape \(n,\), not \(1, 2\)"),
        ([0.1, 1.2], {}, r"from 0\.1 to 1\.2 lie outside within=\(0, 1\)"),
        ([0.1, math.nan], {"nonfinite": 2}, "lie outside"),
        ([0.1, math.nan], {"nonfinite": "drop"}, "drop"),
    ],
)
def test_bad_samples_are_named(samples, options, message):
    with pytest.raises(ValueError, match=message):
        says(samples, "about half", 0.4, 0.6, **options)


@pytest.mark.parametrize(
    ("low", "high", "within"),
    [
        (0.6, 0.4, (0, 1)),
        (0, 1, (0, 1)),
        (-1, 2, (0, 1)),
        (-math.inf, math.inf, None),
        (math.nan, 1, (0, 1)),
    ],
)
def test_words_that_nothing_could_contradict_are_refused(low, high, within):
    with pytest.raises(ValueError, match="'something' must leave out"):
        says(SHARES, "something", low, high, within=within)


def test_confidence_is_a_probability():
    with pytest.raises(ValueError, match="confidence must lie strictly between 0 and 1, not 99"):
        interval(SHARES, confidence=99)
