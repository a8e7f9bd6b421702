"""Intervals for independent samples: the network is the sample.

Samples are one finite number a network, shape (n,) with n >= 2; ``confidence`` is the coverage,
strictly between 0 and 1. ValueError otherwise.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from relubook._optional import require

__all__ = ["Estimate", "base_seed", "mean_interval", "median_interval", "paired_interval"]
__all__ += [
    "FEW",
    "common_value",
    "finite_samples",
    "interval",
    "proportion_interval",
    "scale",
    "seeds",
]

T = TypeVar("T")
Samples = Sequence[float] | Any
Range = tuple[float, float] | None

FEW = 5
"""If fewer samples than this differ from a common value, only an exact bound will do."""


@dataclass(frozen=True)
class Estimate:
    """A measured quantity with both ends of its interval, in the unit of the samples.

    ``n`` counts the independent samples (networks, not units or epochs) behind it.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def __str__(self) -> str:
        coverage = "" if self.confidence == 0.95 else f", {100 * self.confidence:.4g}%"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n = {self.n}{coverage})"


def base_seed() -> int:
    """Return the seed that all draws of a notebook start from: ``RELUBOOK_SEED``, by default 0.

    ValueError if the variable is not a whole number of 0 or more.
    """
    wanted = os.environ.get("RELUBOOK_SEED", "0")
    if not wanted.isdecimal():
        raise ValueError(f"RELUBOOK_SEED must be a whole number of 0 or more, not {wanted!r}")
    return int(wanted)


def seeds(n: int, start: int = 0) -> range:
    """Return n seeds, one a network, from ``start`` above the base seed on."""
    first = base_seed() + start
    return range(first, first + n)


def scale(*, quick: T, full: T) -> T:
    """Choose the size of an experiment: ``quick`` in a notebook, ``full`` under ``make full``.

    ValueError if the environment variable ``RELUBOOK_SCALE`` says neither of the two.
    """
    wanted = os.environ.get("RELUBOOK_SCALE", "quick")
    if wanted not in ("quick", "full"):
        raise ValueError(f"RELUBOOK_SCALE must be 'quick' or 'full', not {wanted!r}")
    return full if wanted == "full" else quick


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless a coverage lies strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, not {confidence!r}")


def _samples(samples: Samples, confidence: float) -> Any:
    check_confidence(confidence)
    np = require("numpy", "intervals")
    values = np.asarray(samples, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"samples must be one-dimensional, not of shape {values.shape}")
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 samples, not {len(values)}")
    if not np.isfinite(values).all():
        bad = f"{(~np.isfinite(values)).sum()} of {len(values)} samples are not finite"
        raise ValueError(f"{bad}: decide how diverged networks count before")
    return values


def mean_interval(samples: Samples, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of samples with Student's interval, exact for normal ones."""
    stats, values = require("scipy.stats", "intervals"), _samples(samples, confidence)
    mean, error = values.mean(), stats.sem(values)
    low = high = mean
    if error:
        low, high = stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return Estimate(float(mean), float(low), float(high), len(values), confidence)


def proportion_interval(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Return the share of successes among n >= 1 trials with Clopper and Pearson's exact interval.

    After 0 successes its upper end is about ``3.7 / n`` (two-sided, at 95%).
    """
    check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share must have 0 <= successes <= n, n >= 1, not {successes} of {n}")
    proportion = require("statsmodels.stats.proportion", "intervals of proportions")
    low, high = proportion.proportion_confint(successes, n, 1 - confidence, method="beta")
    return Estimate(successes / n, float(low), float(high), n, confidence)


def median_interval(samples: Samples, *, confidence: float = 0.95) -> Estimate:
    """Return the median of samples, n >= 6 at 95%, with an interval that assumes no distribution.

    It is the sign test turned round: its ends are two of the samples, its coverage is the wanted
    one or more. ValueError if there are too few samples for it.
    """
    np, stats = require("numpy", "intervals"), require("scipy.stats", "intervals")
    values = _samples(samples, confidence)
    middle = float(np.median(values))
    low, high = stats.quantile_test(values, q=middle, p=0.5).confidence_interval(confidence)
    if not (math.isfinite(low) and math.isfinite(high)):
        few = f"{len(values)} samples are too few"
        raise ValueError(f"{few} for an interval of the median at {confidence:g}")
    return Estimate(middle, float(low), float(high), len(values), confidence)


def paired_interval(first: Samples, second: Samples, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of ``first - second``, two remedies tried on the same seeds.

    Truth values (collapsed or not) give the difference of the two shares with the adjusted
    interval of Bonett and Price, which holds its level for few samples and shares near 0 too;
    numbers give Student's interval of the differences. ValueError if the lengths differ.

    Source: Bonett and Price 2012, https://doi.org/10.3102/1076998611411915
    """
    np, stats = require("numpy", "intervals"), require("scipy.stats", "intervals")
    truths = all(np.asarray(sample).dtype == bool for sample in (first, second))
    a, b = _samples(first, confidence), _samples(second, confidence)
    if len(a) != len(b):
        raise ValueError(f"paired samples must have one length, not {len(a)} and {len(b)}")
    if not truths:
        return mean_interval(a - b, confidence=confidence)
    n, only_a, only_b = len(a), int((a > b).sum()), int((a < b).sum())
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    reach = stats.norm.ppf((1 + confidence) / 2) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = max(-1.0, p - q - reach), min(1.0, p - q + reach)
    return Estimate((only_a - only_b) / n, float(low), float(high), n, confidence)


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
    x, alpha = np.asarray(samples), 1 - confidence
    if x.ndim != 1 or not len(x):
        raise ValueError(f"samples must be one value a network, shape (n,), not {x.shape}")
    check_confidence(confidence)
    truths, x, n = x.dtype == bool, x.astype(float), len(x)
    if bad := int((~np.isfinite(x)).sum()):
        raise ValueError(f"{bad} of {n} samples are not finite: say by nonfinite= how they count")
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

    Args:
        samples: One number or truth value a network, shape (n,); else ValueError.
        nonfinite: "omit", or the number that NaN and infinity count as; None refuses them by a
            ValueError: an overflowed network is not silent, and how it counts is for you to say.
    """
    np = require("numpy", "intervals")
    x = np.asarray(samples)
    if x.ndim != 1:
        raise ValueError(f"samples must be one value a network, shape (n,), not {x.shape}")
    finite = np.isfinite(x)
    if (bad := int((~finite).sum())) and nonfinite is None:
        raise ValueError(
            f"{bad} of {len(x)} samples are not finite: nonfinite= says how they count"
        )
    if bad:
        x = x[finite] if nonfinite == "omit" else np.where(finite, x, float(nonfinite or 0))
    return x, bad
