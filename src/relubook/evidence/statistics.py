"""Intervals for independent samples: the network is the sample."""

import math
import os
from collections.abc import Sequence
from typing import Any

from relubook._optional import require

__all__ = ["FEW", "base_seed", "common_value", "finite_samples", "interval", "median_interval"]
__all__ += ["seeds"]

Samples = Sequence[float] | Any
Range = tuple[float, float] | None

FEW = 5
"""If fewer samples than this differ from a common value, only an exact bound will do."""


def base_seed() -> int:
    """Return the notebooks' seed, ``RELUBOOK_SEED`` or 0; ValueError unless whole and >= 0."""
    wanted = os.environ.get("RELUBOOK_SEED", "0")
    if not wanted.isdecimal():
        raise ValueError(f"RELUBOOK_SEED must be a whole number of 0 or more, not {wanted!r}")
    return int(wanted)


def seeds(n: int, start: int = 0) -> range:
    """Return n seeds, one a network, from ``start`` above the base seed on."""
    first = base_seed() + start
    return range(first, first + n)


def interval(
    samples: Samples, *, confidence: float = 0.95, within: Range = (0, 1)
) -> tuple[float, float, float]:
    """Return the mean of independent samples and both ends of its interval.

    Truth values get Clopper and Pearson's exact interval, numbers Student's, corrected by Hall's
    cubic transformation: shares of dead units are skewed, and Student's alone misses their mean
    up to 20 times too often. Where fewer than 5 samples differ from a common value c, Student's
    may have no width. The mean then lies at most P(X != c) of the way from c to an end of the
    range, and P has an exact bound: with 0 of n it is ``1 - (1 - confidence) ** (1 / n)``.

    Args:
        samples: One finite number or truth value a network, shape (n,), n >= 1; else ValueError.
        confidence: Coverage, strictly between 0 and 1; else ValueError.
        within: The least and the greatest value possible, else ValueError; None if unbounded.

    Returns mean, lower and upper end; the ends are infinite where nothing is known.

    Source: Hall 1992, https://doi.org/10.1111/j.2517-6161.1992.tb01872.x
    """
    np, stats = require("numpy", "intervals"), require("scipy.stats", "intervals")
    x, _ = finite_samples(samples, None)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, not {confidence!r}")
    truths, x, n, alpha = x.dtype == bool, x.astype(float), len(x), 1 - confidence
    low, high = within or (-math.inf, math.inf)
    if x.min() < low or x.max() > high:
        raise ValueError(f"samples from {x.min():g} to {x.max():g} lie outside within={within}")
    mean = float(x.mean())
    if truths:
        exact = stats.binomtest(int(x.sum()), n).proportion_ci(confidence, method="exact")
        return mean, float(exact.low), float(exact.high)
    common, differ = common_value(x)
    if differ < FEW:
        most = float(stats.beta.ppf(confidence, differ + 1, n - differ))
        return mean, common + most * (low - common), common + most * (high - common)
    skew = float(stats.skew(x, bias=False)) / math.sqrt(n)
    t = stats.t.ppf([1 - alpha / 2, alpha / 2], n - 1)
    if abs(skew) > 1e-9:
        t = 3 / skew * (np.cbrt(1 + skew * (t - skew / 6)) - 1)
    ends = mean - float(stats.sem(x)) * t
    return mean, max(low, float(ends[0])), min(high, float(ends[1]))


def common_value(samples: Samples) -> tuple[float, int]:
    """Return the most frequent value of samples, and how many differ by more than last digits."""
    np = require("numpy", "intervals")
    values, counts = np.unique(np.asarray(samples).astype("float32"), return_counts=True)
    return float(values[counts.argmax()]), int(counts.sum() - counts.max())


def finite_samples(samples: Samples, nonfinite: float | str | None) -> tuple[Any, int]:
    """Return samples ready for an interval, and how many of them were not finite.

    They are one number or truth value a network, shape (n,), n >= 1; else ValueError. ``nonfinite``
    is "omit", or the number that NaN and infinity count as; None refuses them by a ValueError: an
    overflowed network is not silent, and how it counts is for you to say.
    """
    np = require("numpy", "intervals")
    x = np.asarray(samples)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"samples must be one value a network, shape (n,), not {x.shape}")
    finite = np.isfinite(x)
    if (bad := int((~finite).sum())) and nonfinite is None:
        raise ValueError(
            f"{bad} of {len(x)} samples are not finite: nonfinite= says how they count"
        )
    if bad:
        x = x[finite] if nonfinite == "omit" else np.where(finite, x, float(nonfinite or 0))
    return x, bad


def median_interval(
    samples: Samples, *, confidence: float = 0.95
) -> tuple[float, float, float, int]:
    """Return the median, an interval that assumes no distribution, and the number of samples.

    It is the sign test turned round: its ends are two of the samples, its coverage is the wanted
    one or more. ValueError if there are too few samples for it (six at 95%).
    """
    np, stats = require("numpy", "intervals"), require("scipy.stats", "intervals")
    x, _ = finite_samples(samples, None)
    middle = float(np.median(x))
    ends = stats.quantile_test(x, q=middle, p=0.5).confidence_interval(confidence)
    if not (math.isfinite(ends.low) and math.isfinite(ends.high)):
        few = f"{len(x)} samples are too few"
        raise ValueError(f"{few} for an interval of the median at {confidence:g}")
    return middle, float(ends.low), float(ends.high), len(x)
