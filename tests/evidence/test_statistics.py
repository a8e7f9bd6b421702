import math

import numpy as np
import pytest
import scipy.stats

from relubook.evidence.statistics import base_seed, common_value, median_interval, seeds


@pytest.mark.slow
def test_median_interval_covers_at_its_level():
    draws = np.random.default_rng(0).exponential(size=(400, 40))
    ends = [median_interval(x)[1:3] for x in draws]
    assert np.mean([low <= math.log(2) <= high for low, high in ends]) > 0.92


def test_ends_of_the_median_are_order_statistics():
    """At n = 40 the sign test leaves the 14th to the 27th value at 95%."""
    x = np.random.default_rng(1).permutation(40) + 1.0
    assert median_interval(x) == (20.5, 14, 27, 40)
    assert 2 * scipy.stats.binom(40, 0.5).cdf(13) <= 0.05 < 2 * scipy.stats.binom(40, 0.5).cdf(14)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([1.0, 2.0, 3.0], "3 samples are too few"),
        ([1.0, math.nan], "1 of 2 samples are not finite"),
        ([[1.0, 2.0]], r"shape \(n,\), not \(1, 2\)"),
    ],
)
def test_median_of_bad_samples(samples, message):
    with pytest.raises(ValueError, match=message):
        median_interval(samples)


def test_last_digits_do_not_make_values_differ():
    assert common_value([0.3, 0.3 + 1e-12, 0.5]) == (pytest.approx(0.3), 1)


def test_one_variable_moves_every_seed(monkeypatch):
    monkeypatch.delenv("RELUBOOK_SEED", raising=False)
    assert (base_seed(), seeds(3), seeds(2, 10)) == (0, range(3), range(10, 12))
    monkeypatch.setenv("RELUBOOK_SEED", "1000000")
    assert seeds(2, 10) == range(1_000_010, 1_000_012)
    monkeypatch.setenv("RELUBOOK_SEED", "-1")
    with pytest.raises(ValueError, match="RELUBOOK_SEED must be a whole number"):
        base_seed()
